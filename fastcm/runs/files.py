"""Files that are complete or absent when written, and not trusted when read.

What is read is plain data, safetensors and JSON, out of regular files: a link, a pipe, another
size, deep nesting or anything else is refused by name. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

WRITING = ".writing-"
REMOVING = ".removing-"
_MAX_STATE_BYTES = 16 * 2**20
_MAX_DEPTH = 64
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""What a checkpoint holds, by its name in the format."""


class CheckpointError(ValueError):
    """A checkpoint, or every checkpoint of a run, cannot be read."""


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that it holds either the old bytes or all the new ones."""
    temporary = path.with_name(f"{WRITING}{path.name}-{os.getpid()}")
    try:
        write(temporary, data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def create_file(path: Path, data: bytes) -> None:
    """Write a file unless there is one; of several processes that try at once, one does."""
    temporary = path.with_name(f"{WRITING}{path.name}-{os.getpid()}")
    try:
        write(temporary, data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links: nearly as good
            if not path.exists():
                temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def write(path: Path, data: bytes) -> dict[str, Any]:
    """Write a file and flush it to the disk; returns its size and SHA-256."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file and flush it; returns its size and SHA-256.

    `safetensors.torch.save` makes two copies of everything and holds the interpreter's lock
    meanwhile; this passes the memory of the tensors to the file, beside a training thread.

    Args:
        path: of the file.
        tensors: any layout and device; tied ones are written once for each name.

    Raises:
        ValueError: a dtype that is not one of `DTYPES`.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}, which a checkpoint cannot hold")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    sha = hashlib.sha256()
    with open(path, "wb") as file:
        for piece in (len(head).to_bytes(8, "little"), head):
            sha.update(piece)
            file.write(piece)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            memory = flat.view(torch.uint8).numpy().data
            sha.update(memory)
            file.write(memory)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": 8 + len(head) + end, "sha256": sha.hexdigest()}


def read_tensors(path: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a safetensors file of the given size and SHA-256.

    Raises:
        CheckpointError: it is anything else.
    """
    data = _recorded(path, entry)
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


def read_state(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: it is too large, nested too deeply, or not one object.
    """
    return _parsed(path, _read(path, at_most=_MAX_STATE_BYTES))


def read_recorded(path: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object in a file of the given size and SHA-256.

    Raises:
        CheckpointError: it is anything else.
    """
    return _parsed(path, _recorded(path, entry))


def check_recorded(path: Path, entry: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless a file has the given size and SHA-256; it is not held."""
    sha = hashlib.sha256()
    for piece in _pieces(path, exactly=entry["bytes"]):
        sha.update(piece)
    if sha.hexdigest() != entry["sha256"]:
        raise CheckpointError(f"{path} was altered: its SHA-256 differs from the one recorded")


def _recorded(path: Path, entry: Mapping[str, Any]) -> bytes:
    """The bytes of a file, if they are those that were recorded."""
    data = _read(path, exactly=entry["bytes"])
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise CheckpointError(f"{path} was altered: its SHA-256 differs from the one recorded")
    return data


def _parsed(path: Path, data: bytes) -> dict[str, Any]:
    depth = 0  # counted before parsing: the parser recurses
    for match in _STRING_OR_BRACKET.finditer(data):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(match[0], 0)
        if depth > _MAX_DEPTH:
            raise CheckpointError(f"{path} is nested more than {_MAX_DEPTH} deep")
    try:
        state = json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return state


def _read(path: Path, *, exactly: int | None = None, at_most: int | None = None) -> bytes:
    """The bytes of a regular file; its size is judged before it is read."""
    return b"".join(_pieces(path, exactly=exactly, at_most=at_most, size=-1))


def _pieces(
    path: Path, *, exactly: int | None = None, at_most: int | None = None, size: int = 2**20
) -> Iterator[bytes]:
    """The same, some bytes at a time; of size -1 all at once."""
    if path.is_symlink():
        raise CheckpointError(f"{path} is a symbolic link: a checkpoint has its files in itself")
    # a link put there since then is not followed, and a pipe not waited for
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        if exactly is not None and status.st_size != exactly:
            raise CheckpointError(f"{path} has {status.st_size} bytes instead of {exactly}")
        if at_most is not None and status.st_size > at_most:
            raise CheckpointError(f"{path} has {status.st_size} bytes, more than {at_most}")
        while piece := file.read(size):
            yield piece


def discard(path: Path) -> None:
    """Remove a directory or a link to one so that, if interrupted, no part keeps its name."""
    try:
        hidden = path.with_name(f"{REMOVING}{path.name}")
        _remove(hidden)
        path.rename(hidden)
        _remove(hidden)
    except OSError:  # it stays, whole or hidden: the next save tries again
        return


def clear(directory: Path) -> None:
    """Remove what an interrupted writer left in a directory; nobody may be writing to it."""
    for prefix in (WRITING, REMOVING):
        for left_over in directory.glob(f"{prefix}*"):
            _remove(left_over)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Flush the names in a directory to the disk."""
    if os.name != "posix":  # a directory cannot be opened elsewhere
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
