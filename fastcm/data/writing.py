"""Writes folders of shards."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastcm.data.datasets import as_tensor
from fastcm.data.images import demo_module
from fastcm.data.shards import FORMAT, INDEX, Shards, holds_shards, shards
from fastcm.runs.files import WRITING, replace_file, sync_directory, write_tensors

Format = Literal["npz", "safetensors", "tar"]


def write_shards(
    folder: str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    rows: int = 4096,
    format: Format = "npz",
) -> Shards:
    """Write batches to ``shard_000000.npz``, ... and what they hold to ``shards.json``, last.

    Args:
        folder: created; has no shards yet.
        batches: of any number of rows: x, (x, labels), or dicts of arrays by name, x among them;
            tensors or arrays, with which dtypes is up to the format.
        rows: of a shard; the last one has the rest.
        format: "npz"; "safetensors", which has bfloat16, too; or "tar", as of webdataset, of which
            uint8 samples ``[C, H, W]`` are PNG files.

    Returns:
        The shards, as `shards(folder)`.

    Raises:
        FileExistsError: there are shards in the folder.
        ValueError: batches that are not alike, or none.
    """
    if format not in _WRITERS:
        raise ValueError(f"format must be one of {', '.join(_WRITERS)}, got {format!r}")
    if rows < 1:
        raise ValueError(f"rows must be >= 1, got {rows}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if holds_shards(folder):
        raise FileExistsError(f"{folder} holds shards already: choose another folder")
    counts: dict[str, int] = {}
    for arrays in _cut(batches, rows):
        path = folder / f"shard_{len(counts):06d}.{format}"
        temporary = path.with_name(f"{WRITING}{path.name}")
        _WRITERS[format](temporary, arrays)
        temporary.replace(path)
        counts[path.name] = len(arrays["x"])
    if not counts:
        raise ValueError(f"no rows to write to {folder}")
    sync_directory(folder)
    write_index(folder, counts)
    return shards(folder)


def write_index(folder: Path, rows: Mapping[str, int]) -> None:
    """Say of a folder that it is complete, and how many rows each of its files has."""
    data = json.dumps({"format": FORMAT, "rows": dict(rows)}, indent=1).encode()
    replace_file(folder / INDEX, data)


def _cut(batches: Iterable[Any], rows: int) -> Iterator[dict[str, Tensor]]:
    """The same rows, so many at a time."""
    held: list[dict[str, Tensor]] = []
    count = 0
    for batch in batches:
        held.append(_arrays(batch))
        if held[0].keys() != held[-1].keys():
            raise ValueError(f"a batch holds {list(held[-1])}, those before {list(held[0])}")
        count += len(held[-1]["x"])
        while count >= rows:
            whole = _joined(held)
            yield {name: x[:rows] for name, x in whole.items()}
            held, count = [{name: x[rows:] for name, x in whole.items()}], count - rows
    if count:
        yield _joined(held)


def _joined(held: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(held) == 1:
        return held[0]
    try:
        return {name: torch.cat([arrays[name] for arrays in held]) for name in held[0]}
    except RuntimeError as error:
        raise ValueError(f"batches that are not alike: {error}") from error


def _arrays(batch: Any) -> dict[str, Tensor]:
    if isinstance(batch, tuple | list):
        batch = dict(zip(("x", "labels"), batch, strict=True))
    if not isinstance(batch, Mapping):
        batch = {"x": batch}
    arrays = {name: as_tensor(x).detach().cpu() for name, x in batch.items()}
    lengths = {name: len(x) if x.ndim else 0 for name, x in arrays.items()}
    if "x" not in arrays or len({*lengths.values()}) > 1:
        raise ValueError(f"a batch must hold x, and as many rows of others, got rows {lengths}")
    return arrays


def _write_npz(path: Path, arrays: dict[str, Tensor]) -> None:
    with open(path, "wb") as file:
        try:
            np.savez(file, **{name: x.numpy() for name, x in arrays.items()})  # type: ignore[arg-type]
        except TypeError as error:
            raise ValueError(f'{error}: format="safetensors" holds every dtype') from error


def _write_safetensors(path: Path, arrays: dict[str, Tensor]) -> None:
    write_tensors(path, arrays)


def _write_tar(path: Path, arrays: dict[str, Tensor]) -> None:
    x = arrays["x"]
    picture = x.dtype == torch.uint8 and x.ndim == 4 and x.shape[1] in (1, 3, 4)
    with tarfile.open(path, "w") as archive:
        for row in range(len(x)):
            for name, values in arrays.items():
                if name == "x" and picture:
                    kind, data = "png", _png(values[row])
                elif name == "labels":
                    kind, data = "cls", str(int(values[row])).encode()
                else:
                    kind, data = "npy" if name == "x" else f"{name}.npy", _npy(values[row])
                member = tarfile.TarInfo(f"{row:08d}.{kind}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def _npy(x: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, x.numpy())
    return file.getvalue()


def _png(x: Tensor) -> bytes:
    pixels = x.permute(1, 2, 0).contiguous().numpy()
    image = demo_module("PIL.Image").fromarray(pixels[..., 0] if len(x) == 1 else pixels)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


_WRITERS = {"npz": _write_npz, "safetensors": _write_safetensors, "tar": _write_tar}
