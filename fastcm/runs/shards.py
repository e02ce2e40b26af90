"""Tensors that several processes hold together, in the files of one checkpoint.

Of a group such as "model" each process writes the elements that it holds to a file of its own, and
an index says what they are elements of:

    model.00000.safetensors, model.00001.safetensors, ...
    model.index.json
        {"files": {"model.00000.safetensors": {"bytes": ..., "sha256": ...}, ...},
         "tensors": {"w": {"dtype": "F32", "shape": [5, 3],
                           "pieces": [["model.00000.safetensors", 0, 9], ...]}, ...}}

A piece [file, first, count] holds elements first to first + count - 1 of the flattened tensor,
under the tensor's name. The pieces of a tensor are all of it, each element once, or the index is
damaged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from fastcm.runs.files import (
    DTYPES,
    CheckpointError,
    check_recorded,
    read_recorded,
    read_tensors,
    write,
    write_tensors,
)
from fastcm.runs.pretrained import elements

INDEX = ".index.json"
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}

Groups = Mapping[str, Mapping[str, Tensor]]


class Place(NamedTuple):
    """Where the elements of one process lie in a tensor: from `first` on; the tensor's shape."""

    first: int
    shape: tuple[int, ...]


Places = Mapping[str, Mapping[str, Place]]


class Part(NamedTuple):
    """Elements start to stop of a flattened tensor are wanted, as what `made` makes of them."""

    start: int
    stop: int
    made: Callable[[Tensor], Tensor]


Select = Callable[[str, str, torch.Size], Part | None]
"""From group, name and shape of a tensor to what is wanted of it; None: all."""


def whole(group: str, name: str, shape: torch.Size) -> Part | None:
    """Select everything."""
    return None


def read_one(
    path: Path, group: str, entry: Mapping[str, Any], select: Select = whole
) -> dict[str, Tensor]:
    """The tensors of a group in one file, or the wanted parts, without the rest in memory.

    Args:
        path: of the file.
        group: its name.
        entry: size and SHA-256 of the file.
        select: what is wanted.

    Raises:
        CheckpointError: it is anything else.
    """
    if select is whole:
        return read_tensors(path, entry)
    check_recorded(path, entry)
    found = {}
    try:
        file: Any = safetensors.safe_open(path, framework="pt")
        for name in file.keys():  # noqa: SIM118
            shape = torch.Size(file.get_slice(name).get_shape())
            part = select(group, name, shape) or _all_of(shape)
            found[name] = part.made(elements(file, name, part.start, part.stop).clone())
    except (safetensors.SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    return found


def write_part(folder: Path, rank: int, groups: Groups, places: Places) -> dict[str, Any]:
    """Write what one process holds; returns a report for `write_indices`.

    Args:
        folder: of the checkpoint.
        rank: of the process.
        groups: its elements of each tensor, in the order of the flattened tensor; may be none.
        places: of the same names, where they lie.

    Raises:
        OSError: the folder is not there, or cannot be written to.
    """
    report = {}
    for group, tensors in groups.items():
        name, entry = f"{group}.{rank:05d}.safetensors", None
        if tensors:
            entry = write_tensors(folder / name, tensors)
        pieces = {
            key: (DTYPES[tensor.dtype], *places[group][key], tensor.numel())
            for key, tensor in tensors.items()
        }
        report[group] = {"file": name, "entry": entry, "pieces": pieces}
    return report


def write_indices(folder: Path, reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write the index of each group from the reports of all processes; returns their entries.

    Raises:
        ValueError: the pieces of a tensor are not the tensor.
    """
    entries = {}
    for group in reports[0]:
        files: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        for report in reports:
            mine = report[group]
            if mine["entry"] is not None:
                files[mine["file"]] = mine["entry"]
            for name, (dtype, first, shape, count) in mine["pieces"].items():
                one = {"dtype": dtype, "shape": list(shape), "pieces": []}
                known = tensors.setdefault(name, one)
                if (known["dtype"], known["shape"]) != (dtype, list(shape)):
                    raise ValueError(f"{group}: {name} is not the same tensor in all processes")
                known["pieces"].append([mine["file"], first, count])
        for name, entry in tensors.items():
            entry["pieces"].sort(key=lambda piece: piece[1])
            _check_tiles(f"{group}: {name}", entry)
        index = {"files": files, "tensors": tensors}
        data = json.dumps(index, separators=(",", ":")).encode()
        entries[f"{group}{INDEX}"] = write(folder / f"{group}{INDEX}", data)
    return entries


def read(
    folder: Path, group: str, entry: Mapping[str, Any], select: Select = whole
) -> dict[str, Tensor]:
    """The tensors of a group, or the wanted parts, out of the files that hold them.

    Args:
        folder: of the checkpoint.
        group: its name.
        entry: size and SHA-256 of its index.
        select: what is wanted.

    Raises:
        CheckpointError: index or files are not what was recorded, or make no tensors.
        OSError, ValueError, KeyError, TypeError: index or files are missing or malformed.
    """
    path = folder / f"{group}{INDEX}"
    index = read_recorded(path, entry)
    files, tensors = index["files"], index["tensors"]
    _check_files(path, folder, files)
    room = {name: files[name]["bytes"] for name in files}
    for name, described in tensors.items():
        _check_tiles(f"{path}: {name}", described)
        size = torch.empty((), dtype=_BY_NAME[described["dtype"]], device="cpu").element_size()
        for file, _, count in described["pieces"]:
            room[file] -= size * count
    if any(left < 0 for left in room.values()):  # before memory is taken for them
        raise CheckpointError(f"{path} names more elements than its files can hold")
    flat, made = {}, {}
    wanted: dict[str, list[tuple[str, int, int]]] = {}
    starts = {}
    for name, described in tensors.items():
        shape, dtype = torch.Size(described["shape"]), _BY_NAME[described["dtype"]]
        part = select(group, name, shape) or _all_of(shape)
        flat[name] = torch.empty(part.stop - part.start, dtype=dtype, device="cpu")
        starts[name], made[name] = part.start, part.made
        for file, first, count in described["pieces"]:
            if count and first < part.stop and part.start < first + count:
                wanted.setdefault(file, []).append((name, first, count))
    for file, pieces in wanted.items():
        held = read_tensors(folder / file, files[file])
        for name, first, count in pieces:
            _copy(f"{folder / file}: {name}", held[name], first, count, flat[name], starts[name])
    return {name: made[name](values) for name, values in flat.items()}


def _all_of(shape: torch.Size) -> Part:
    return Part(0, shape.numel(), lambda flat: flat.reshape(shape))


def _copy(what: str, source: Tensor, first: int, count: int, target: Tensor, start: int) -> None:
    """Those elements of a piece that a part, which begins at `start`, has."""
    if source.numel() != count or source.dtype != target.dtype:
        raise CheckpointError(
            f"{what} has {source.numel()} elements of {source.dtype}, its index says {count} of "
            f"{target.dtype}"
        )
    low, high = max(first, start), min(first + count, start + len(target))
    target[low - start : high - start] = source.flatten()[low - first : high - first]


def _check_files(path: Path, folder: Path, files: Mapping[str, Any]) -> None:
    for name, entry in files.items():
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path} names {name!r}, which is no file of its own")
        found = folder / name
        if not found.exists():
            raise CheckpointError(f"{found} is missing: the file of one process of the run")
        if type(entry["bytes"]) is not int or found.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{found} has {found.stat().st_size} bytes instead of {entry['bytes']}"
            )


def _check_tiles(what: str, described: Mapping[str, Any]) -> None:
    """Raise unless the pieces, in their order, are the whole tensor."""
    shape, pieces = described["shape"], described["pieces"]
    numbers = [*shape, *(n for _, *place in pieces for n in place)]
    if any(type(n) is not int or n < 0 for n in numbers):
        raise CheckpointError(f"{what} has a shape or pieces that are none")
    end = 0
    for _, first, count in pieces:
        if first != end:
            raise CheckpointError(f"{what}: a piece begins at element {first} instead of {end}")
        end += count
    if end != math.prod(shape):
        raise CheckpointError(f"{what}: {end} of {math.prod(shape)} elements are there")
