"""One shard: a file of arrays with the same number of rows, of which any rows can be read.

Arrays that lie in the file as they are (safetensors, and .npz that is not compressed) are mapped
into memory, so that only the pages with wanted rows are read.
"""

from __future__ import annotations

import json
import math
import mmap
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch

from fastcm.data.datasets import as_tensor
from fastcm.data.drawing import PARSING
from fastcm.data.tar_files import TarShard, index_tar
from fastcm.runs.files import DTYPES

SUFFIXES = (".npz", ".safetensors", ".tar")
_HEADERS: dict[tuple[int, int], Any] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_TORCH = {name: dtype for dtype, name in DTYPES.items()}
_MAX_HEADER = 64 * 2**20


@dataclass(frozen=True)
class Field:
    """What the rows of an array are."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class Shard(Protocol):
    """A shard that was opened: how many rows, of what."""

    rows: int
    fields: Mapping[str, Field]

    def read(self, index: Any, into: Mapping[str, tuple[Any, Any]]) -> None:
        """Read rows, in ascending order, of some arrays to places of the caller.

        Args:
            index: numbers of the rows, int64 numpy array.
            into: by the name of an array, a numpy matrix of bytes, a line for each row, and the
                lines to write to.
        """
        ...


@dataclass(frozen=True)
class _Column:
    """An array in a file; `offset` of its first byte, or None if it has to be unpacked."""

    field: Field
    rows: int
    offset: int | None

    @property
    def row_bytes(self) -> int:
        return math.prod(self.field.shape) * self.field.dtype.itemsize


class ArrayShard:
    """A .npz or .safetensors file."""

    def __init__(self, path: Path, columns: Mapping[str, _Column]) -> None:
        counts = {name: column.rows for name, column in columns.items()}
        if not counts or len({*counts.values()}) > 1:
            raise ValueError(f"its arrays must have the same number of rows, got {counts}")
        self.path, self._columns = path, columns
        self.rows = next(iter(counts.values()))
        self.fields: Mapping[str, Field] = {name: column.field for name, column in columns.items()}

    def read(self, index: Any, into: Mapping[str, tuple[Any, Any]]) -> None:
        with (
            open(self.path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            if 4 * len(index) > self.rows and hasattr(mmap, "MADV_WILLNEED"):
                mapped.madvise(mmap.MADV_WILLNEED)  # most pages are wanted: all at once
            for name, (out, lines) in into.items():
                out[lines] = self._lines(name, mapped, index)

    def _lines(self, name: str, mapped: mmap.mmap, index: Any) -> Any:
        """Rows of an array as bytes, ``[len(index), row_bytes]``, copied out of the map."""
        column = self._columns[name]
        if column.offset is None:
            array = as_tensor(_unpacked(self.path, name))
            table = array.reshape(column.rows, -1).view(torch.uint8).numpy()
        else:
            size = column.rows * column.row_bytes
            flat = np.frombuffer(mapped, np.uint8, size, column.offset)
            table = flat.reshape(column.rows, column.row_bytes)
        return table[index]


def open_shard(path: Path, *, size: int | None = None, channels: int | None = None) -> Shard:
    """Read what a shard says of itself, and none of its rows.

    Args:
        path: .npz, .safetensors or .tar.
        size, channels: of the images in a .tar, see `fastcm.data.image_folder`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or no shard; names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such shard: {path}")
    try:
        if path.suffix == ".tar":
            index = index_tar(path)
            shard = TarShard(path, index, size, 3 if channels is None else channels)
            shard.fields = {name: Field(*each) for name, each in shard.first_row().items()}
            return shard
        return ArrayShard(path, (_npz if path.suffix == ".npz" else _safetensors)(path))
    except Exception as error:  # zipfile, tarfile, json and decoders raise many kinds
        if isinstance(error, ImportError):
            raise
        raise ValueError(f"{path} is not a readable shard: {error}") from error


def _header(name: str, member: IO[bytes]) -> tuple[tuple[int, ...], bool, Any]:
    """Shape, whether in Fortran's order, and dtype of an array, of which the data is next."""
    version = np.lib.format.read_magic(member)
    if version not in _HEADERS:
        raise ValueError(f"{name} is of a version of .npy that is not read")
    with PARSING:
        shape, fortran, dtype = _HEADERS[version](member)
    return shape, fortran, dtype


def _unpacked(path: Path, name: str) -> Any:
    """An array of a .npz that does not lie there as it is; `numpy.load` would parse unguarded."""
    with zipfile.ZipFile(path) as archive:
        inside = f"{name}.npy" if f"{name}.npy" in archive.namelist() else name
        with archive.open(inside) as member:
            shape, fortran, dtype = _header(inside, member)
            flat = np.frombuffer(bytearray(member.read()), dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


def _npz(path: Path) -> dict[str, _Column]:
    columns = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            with archive.open(info) as member:
                shape, fortran, dtype = _header(info.filename, member)
                header = member.tell()
            if dtype.hasobject or not shape:
                raise ValueError(f"{info.filename} is no array of rows: {dtype} {list(shape)}")
            torch_dtype = torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype
            offset = None
            if info.compress_type == zipfile.ZIP_STORED and not fortran and dtype.isnative:
                file.seek(info.header_offset + 26)  # lengths of the name and of what follows it
                lengths = file.read(4)
                name, extra = (int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
                offset = info.header_offset + 30 + name + extra + header
                if info.file_size != header + math.prod(shape) * dtype.itemsize:
                    raise ValueError(f"{info.filename} has {info.file_size} bytes")
            columns[info.filename.removesuffix(".npy")] = _Column(
                Field(tuple(shape[1:]), torch_dtype), shape[0], offset
            )
    return columns


def _safetensors(path: Path) -> dict[str, _Column]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise ValueError(f"it has {size} bytes, and a header of {length}")
        header = json.loads(file.read(length))
    columns = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, (rows, *shape) = _TORCH[entry["dtype"]], entry["shape"]
        start, end = (8 + length + int(at) for at in entry["data_offsets"])
        whole = end - start == math.prod((rows, *shape)) * dtype.itemsize
        if not whole or not 8 + length <= start <= end <= size:
            raise ValueError(f"{name} lies at bytes {start}..{end} of {size}")
        columns[name] = _Column(Field(tuple(shape), dtype), rows, start)
    return columns
