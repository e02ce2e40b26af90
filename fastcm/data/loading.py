"""Data sets by their name or path, and the pairs of noise and sample that a teacher makes."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import Tensor

from fastcm import ops, rng
from fastcm.data.datasets import Dataset, array_file, as_tensor, read_arrays
from fastcm.data.images import digits, image_folder, photographs
from fastcm.runs.files import read_state

SETTINGS = "samples.json"
"""In a folder that ``fastcm sample`` or ``fastcm pairs`` fills: what its samples are."""

PAIRS = "pairs"
"""The format of shards of ``fastcm pairs``, by the indices that they hold."""

_NAME = re.compile(r"(\d+)(?:\.png|-(\d+)\.npz)")


def indices_of(name: str) -> range | None:
    """The indices of the samples in a file of such a folder, by its name; None for other files."""
    match = _NAME.fullmatch(name)
    return match and range(int(match[1]), int(match[2] or match[1]) + 1)


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
    folder = Path(path)
    settings = read_state(folder / SETTINGS)
    if settings.get("format") != PAIRS:
        raise ValueError(
            f"{folder} holds samples without their noise: make pairs with `fastcm pairs`"
        )
    if not isinstance(settings.get("seed"), int) or not isinstance(settings.get("shape"), list):
        raise ValueError(f"{folder / SETTINGS} does not say the seed and shape of its pairs")
    shape = tuple(settings["shape"])
    end: int | None = None
    xs: list[Tensor] = []
    labels: list[Tensor] = []
    found = ((indices_of(file.name), file) for file in folder.glob("*.npz"))
    shards = [(held.start, held.stop, file) for held, file in found if held is not None]
    for first, stop, file in sorted(shards):
        if end is not None and first > end:
            raise ValueError(
                f"{folder} has no shard of the pairs {end}..{first - 1}: the same `fastcm pairs` "
                "again makes what is missing"
            )
        if end is not None and first < end:
            raise ValueError(f"{file} holds pairs below {end} that another shard holds, too")
        end = stop
        arrays = read_arrays(file)
        x = as_tensor(arrays["x"]) if "x" in arrays else torch.empty(0)
        if x.shape != (end - first, *shape) or x.dtype != torch.float32:
            raise ValueError(
                f"{file} must hold {end - first} samples {list(shape)} in float32, got "
                f"{x.dtype} {list(x.shape)}"
            )
        key = rng.NoiseKey(settings["seed"], first_sample=first)
        xs.append(torch.stack([x, ops.noise(x.shape, key, stream=rng.SAMPLE)], 1))
        if "labels" in arrays:
            labels.append(as_tensor(arrays["labels"]))
    if not xs:
        raise FileNotFoundError(f"no shard of pairs in {folder}")
    return Dataset(torch.cat(xs), torch.cat(labels) if labels else None, paired=True)


NAMES = {"digits": digits, "photographs": photographs}
"""Data sets that come with scikit-learn."""


def load(
    spec: str | os.PathLike[str], *, size: int | None = None, channels: int | None = None
) -> Dataset:
    """The data set that `spec` names: one of `NAMES`, a folder of images or pairs, .npy or .npz.

    Args:
        spec: the name or path.
        size: for a folder, see `image_folder`.
        channels: for a folder, default 3, see `image_folder`.

    Raises:
        FileNotFoundError: no such path.
        ValueError: the path is of another kind, or `size` is given without a folder.
    """
    path = Path(spec)
    if spec not in NAMES and (path / SETTINGS).exists() and size is None and channels is None:
        return pairs(path)
    if spec not in NAMES and path.is_dir():
        return image_folder(path, size=size, channels=3 if channels is None else channels)
    for name, value in (("size", size), ("channels", channels)):
        if value is not None:
            raise ValueError(f"{name} applies to a folder of images, got {name}={value} for {spec}")
    if isinstance(spec, str) and spec in NAMES:
        return NAMES[spec]()
    if path.suffix.lower() in (".npy", ".npz"):
        return array_file(path)
    accepted = 'expected "digits", "photographs", a folder of images, or a .npy or .npz file'
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {spec}; {accepted}")
    raise ValueError(f"cannot read data from {spec}; {accepted}")
