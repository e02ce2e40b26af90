"""Data sets by their name or path, and the pairs of noise and sample that a teacher makes."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from fastcm import ops, rng
from fastcm.data.datasets import Dataset, array_file, as_tensor, read_arrays
from fastcm.data.images import digits, holds_images, image_folder, photographs
from fastcm.data.pair_files import PAIRS as PAIRS
from fastcm.data.pair_files import SETTINGS as SETTINGS
from fastcm.data.pair_files import indices_of as indices_of
from fastcm.data.pair_files import pair_files
from fastcm.data.shards import Shards, holds_shards, shards


def pairs(path: str | os.PathLike[str]) -> Dataset:
    """Read what ``fastcm pairs`` wrote; the noise is made anew from the seed and the indices.

    Args:
        path: the folder. Its shards may hold any range of indices without a gap.

    Returns:
        float32 ``[N, 2, ...]``: sample and noise, with labels where the teacher had classes.

    Raises:
        FileNotFoundError: there is no such folder, or no shard in it.
        ValueError: it holds something else; a shard is missing, damaged or of another shape.
    """
    found = pair_files(Path(path))
    xs: list[Tensor] = []
    labels: list[Tensor] = []
    for held, file in found.files:
        arrays = read_arrays(file)
        x = as_tensor(arrays["x"]) if "x" in arrays else torch.empty(0)
        if x.shape != (len(held), *found.shape) or x.dtype != torch.float32:
            raise ValueError(
                f"{file} must hold {len(held)} samples {list(found.shape)} in float32, got "
                f"{x.dtype} {list(x.shape)}"
            )
        key = rng.NoiseKey(found.seed, first_sample=held.start)
        xs.append(torch.stack([x, ops.noise(x.shape, key, stream=rng.SAMPLE)], 1))
        if "labels" in arrays:
            labels.append(as_tensor(arrays["labels"]))
    return Dataset(torch.cat(xs), torch.cat(labels) if labels else None, paired=True)


NAMES = {"digits": digits, "photographs": photographs}
"""Data sets that come with scikit-learn."""


def load(
    spec: str | os.PathLike[str], *, size: int | None = None, channels: int | None = None
) -> Dataset | Shards:
    """The data set that `spec` names: one of `NAMES`, a folder of images, shards or pairs, a file.

    Args:
        spec: the name or path.
        size: for a folder of images or of archives, see `image_folder`.
        channels: for a folder, default 3, see `image_folder`.

    Raises:
        FileNotFoundError: no such path.
        ValueError: the path is of another kind, or `size` is given without a folder.
    """
    path = Path(spec)
    if spec not in NAMES and (path / SETTINGS).exists() and size is None and channels is None:
        return pairs(path)
    if spec not in NAMES and path.is_dir():
        if holds_shards(path) and not holds_images(path):
            return shards(path, size=size, channels=channels)
        return image_folder(path, size=size, channels=3 if channels is None else channels)
    for name, value in (("size", size), ("channels", channels)):
        if value is not None:
            raise ValueError(f"{name} applies to a folder of images, got {name}={value} for {spec}")
    if isinstance(spec, str) and spec in NAMES:
        return NAMES[spec]()
    if path.suffix.lower() in (".npy", ".npz"):
        return array_file(path)
    accepted = (
        'expected "digits", "photographs", a folder of images or shards, or a .npy or .npz file'
    )
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {spec}; {accepted}")
    raise ValueError(f"cannot read data from {spec}; {accepted}")
