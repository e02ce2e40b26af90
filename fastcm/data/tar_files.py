"""Shards that are tar archives, named as webdataset does: members of one name are one row.

``000017.jpg`` and ``000017.cls`` are a sample and its label. Of a member's name what stands before
its first dot is the row, and what follows says what it holds: jpg, jpeg, png, webp or bmp, and npy,
are the sample; cls, or a json that is a number or has a "label", its label; ``NAME.npy`` a
condition of that name. Others are passed over.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastcm.data.datasets import as_tensor
from fastcm.data.drawing import PARSING
from fastcm.data.images import IMAGE_SUFFIXES, demo_module, read_image

Members = dict[str, tuple[str, int, int]]
"""Of a row, by the name of an array: the member's kind, offset and size."""


def index_tar(path: Path) -> list[Members]:
    """Where the rows of an archive lie; its headers are read, and nothing else.

    Raises:
        ValueError, tarfile.TarError: it is damaged, or a row lacks what others have.
    """
    rows: list[Members] = []
    last = None
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            folder, _, base = member.name.rpartition("/")
            key, dot, kind = base.partition(".")
            held = _name_of(kind.lower())
            if not member.isfile() or not dot or held is None:
                continue
            if (folder, key) != last:
                rows.append({})
                last = folder, key
            name, kind = held
            if name == "labels" and name in rows[-1] and kind == "json":
                continue  # cls comes first, whatever the order
            rows[-1][name] = (kind, member.offset_data, member.size)
        end = archive.offset
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(512) != bytes(512):
            raise ValueError("it has no end: it was cut off")
    if not rows:
        raise ValueError("it holds no sample: no member ends in .jpg, .png or .npy")
    names = {*rows[0]}
    for number, row in enumerate(rows):
        if {*row} != names:
            raise ValueError(f"row {number} holds {sorted(row)}, the first {sorted(names)}")
    return rows


def _name_of(kind: str) -> tuple[str, str] | None:
    """The array that a member belongs to, and how it is read."""
    if f".{kind}" in IMAGE_SUFFIXES:
        return "x", "image"
    if kind == "npy":
        return "x", "npy"
    if kind in ("cls", "json"):
        return "labels", kind
    if kind.endswith(".npy"):
        return kind.removesuffix(".npy"), "npy"
    return None


class TarShard:
    """An archive; see `fastcm.data.shard_files.Shard`."""

    def __init__(self, path: Path, index: list[Members], size: int | None, channels: int) -> None:
        self.path, self.rows, self._index = path, len(index), index
        self._size, self._channels = size, channels
        self.fields: Mapping[str, Any] = {}

    def first_row(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of everything in it; a json that holds no label is none."""
        with open(self.path, "rb") as file:
            kind, offset, size = self._index[0].get("labels", ("", 0, 0))
            file.seek(offset)
            if kind == "json" and not _has_label(file.read(size)):
                for row in self._index:
                    del row["labels"]
            first = {name: self._value(file, 0, name) for name in self._index[0]}
        return {name: (tuple(value.shape), value.dtype) for name, value in first.items()}

    def read(self, index: Any, into: Mapping[str, tuple[Any, Any]]) -> None:
        with open(self.path, "rb") as file:
            for i, row in enumerate(index.tolist()):
                for name, (out, lines) in into.items():
                    value = self._value(file, row, name)
                    wanted = self.fields[name]
                    if (tuple(value.shape), value.dtype) != (wanted.shape, wanted.dtype):
                        raise ValueError(
                            f"{self.path}: {name} of row {row} is {value.dtype} "
                            f"{list(value.shape)}, those before {wanted}; images of several sizes "
                            "need size="
                        )
                    flat = value.contiguous().reshape(-1).view(torch.uint8)
                    out[lines[i]] = flat.numpy()

    def _value(self, file: BinaryIO, row: int, name: str) -> Tensor:
        kind, offset, size = self._index[row][name]
        file.seek(offset)
        data = file.read(size)
        try:
            if kind == "image":
                demo_module("PIL")
                return read_image(io.BytesIO(data), self._size, self._channels)
            if kind == "npy":
                with PARSING:
                    array = np.load(io.BytesIO(data), allow_pickle=False)
                return as_tensor(array)
            held = json.loads(data)
            if isinstance(held, dict):
                held = held["label"]
            return torch.tensor(int(held), dtype=torch.int64, device="cpu")
        except ImportError:
            raise
        except Exception as error:  # decoders raise many kinds on damaged files
            raise ValueError(
                f"{self.path}: {name} of row {row} cannot be read: {type(error).__name__}: {error}"
            ) from error


def _has_label(data: bytes) -> bool:
    try:
        held = json.loads(data)
    except ValueError:
        return False
    return isinstance(held, int) or (isinstance(held, dict) and "label" in held)
