"""Data sets in memory, and the files of arrays that hold them."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcm.networks.conditions import check_rows, each

IMAGE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples and what they are conditioned on: a label each, or tensors of one row each.

    Args:
        x: uint8 or floating samples ``[N, ...]``, N >= 1; other floats are stored as float32.
        labels: integers ``[N]`` in 0 .. num_classes - 1, stored as int64.
        num_classes: number of classes; default the largest label + 1.
        cond: instead of labels, a tensor ``[N, ...]``, or dicts and tuples of such.
        paired: whether x is ``[N, 2, ...]``, each sample with the noise it was made from; see
            `fastcm.data.pairs`.

    Raises:
        ValueError: the data is empty, not finite, or of another dtype or shape.
    """

    x: Tensor
    labels: Tensor | None = None
    num_classes: int | None = None
    paired: bool = False
    cond: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "x", as_samples(self.x))
        if self.paired and (self.x.ndim < 3 or self.x.shape[1] != 2):
            raise ValueError(f"pairs must be [N, 2, ...], got {list(self.x.shape)}")
        if self.x.ndim < 2 and self.x.numel():
            raise ValueError(f"x must be [N, ...] of rank >= 2, got {list(self.x.shape)}")
        if self.x.numel() == 0:
            raise ValueError(f"empty data: x has shape {list(self.x.shape)}")
        if self.x.is_floating_point() and not bool(torch.isfinite(self.x).all()):
            raise ValueError("x must be finite in float32, got NaN or infinity")
        if self.x.is_floating_point() and self.x.min() >= 0 and self.x.max() > 50:
            warnings.warn(
                f"x is in 0..{self.x.max().item():.4g}, where about -1..1 is expected: give pixels "
                "as uint8, or scale them",
                stacklevel=3,
            )
        if self.cond is not None:
            if self.labels is not None:
                raise ValueError("give labels or cond, not both: cond may hold labels, too")
            check_rows(self.cond, len(self))
            object.__setattr__(self, "cond", as_condition(self.cond))
        if self.labels is None:
            if self.num_classes is not None:
                raise ValueError(f"num_classes={self.num_classes} was given without labels")
            return
        labels = as_condition(self.labels)
        if labels.dtype != torch.int64 or labels.shape != self.x.shape[:1]:
            raise ValueError(
                f"labels must be integers of shape [{len(self)}], "
                f"got {labels.dtype} {list(labels.shape)}"
            )
        low, high = int(labels.min()), int(labels.max())
        classes = high + 1 if self.num_classes is None else self.num_classes
        if low < 0 or high >= classes:
            raise ValueError(f"labels must be in 0..{classes - 1}, got {low}..{high}")
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "num_classes", classes)

    def __len__(self) -> int:
        return self.x.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.samples.shape[1:])

    @property
    def samples(self) -> Tensor:
        """``[N, ...]``, of pairs without their noise."""
        return self.x[:, 0] if self.paired else self.x

    @property
    def condition(self) -> Any:
        """The labels, or `cond`; None for neither."""
        return self.cond if self.labels is None else self.labels

    def without_labels(self) -> Dataset:
        """The same samples, without any condition."""
        return self._with(self.x, labels=None, cond=None, num_classes=None)

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on `device`."""
        return self._each(lambda x: x.to(device))

    def split(self, fraction: float = 0.2, seed: int = 0) -> tuple[Dataset, Dataset]:
        """Shuffle and divide into (train, held out), the same way for the same seed.

        Args:
            fraction: share that is held out; rounded so that neither part is empty.
            seed: of the shuffle.

        Raises:
            ValueError: fraction is not in (0, 1) or there are fewer than two samples.
        """
        if not 0 < fraction < 1 or len(self) < 2:
            raise ValueError(
                f"split needs 0 < fraction < 1 and two samples, got {fraction} and {len(self)}"
            )
        held = min(max(round(len(self) * fraction), 1), len(self) - 1)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        order = order.to(self.x.device)
        mine, others = order[held:], order[:held]
        return self._each(lambda x: x[mine]), self._each(lambda x: x[others])

    def _each(self, function: Callable[[Tensor], Tensor]) -> Dataset:
        labels = None if self.labels is None else function(self.labels)
        cond = None if self.cond is None else each(function, self.cond)
        return self._with(function(self.x), labels=labels, cond=cond)

    def _with(self, x: Tensor, **fields: Any) -> Dataset:
        """Other tensors of the same content: checking it again would wait for the device."""
        same = copy.copy(self)
        for name, value in {"x": x, **fields}.items():
            object.__setattr__(same, name, value)
        return same


def to_unit(x: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1; floats unchanged."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x


def as_samples(x: Tensor) -> Tensor:
    """uint8 unchanged, any floating dtype as float32; ValueError for the rest."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype == torch.uint8 or x.dtype == torch.float32:
        return x
    if not x.is_floating_point():
        raise ValueError(f"x must be uint8 or floating, got {x.dtype}")
    return x.float()


def as_condition(cond: Any) -> Any:
    """A condition with its integers as int64."""

    def one(x: Tensor) -> Tensor:
        plain = x.is_floating_point() or x.is_complex() or x.dtype == torch.bool
        return x if plain else x.long()

    return each(one, cond)


def read_arrays(file: Path) -> dict[str, Any]:
    """The arrays of a .npz file by name, or that of a .npy file as ``x``.

    Raises:
        FileNotFoundError, ValueError: there is no such file; it is corrupt or holds objects.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    try:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            arrays = {"x": loaded}
        else:
            with loaded:
                arrays = dict(loaded)
    except Exception as error:  # numpy, zipfile and zlib raise many kinds on damaged files
        if "Object arrays" in str(error):
            raise ValueError(f"{file}: arrays of objects are not read") from error
        raise ValueError(f"{file} is not a readable .npy or .npz file") from error
    return arrays


def as_tensor(x: Any) -> Tensor:
    """An array of any byte order as a tensor on the host; a tensor stays where it is.

    torch.as_tensor alone would take it to the default device.
    """
    if isinstance(x, np.ndarray):
        x = np.ascontiguousarray(x, x.dtype.newbyteorder("="))
    return x if isinstance(x, Tensor) else torch.as_tensor(x, device="cpu")


def condition_of(arrays: Mapping[str, Any]) -> Any:
    """The condition that arrays hold: the only one, or a dict by what follows "cond." in a name."""
    named = {name.removeprefix("cond."): as_tensor(array) for name, array in arrays.items()}
    if len(named) == 1 and next(iter(arrays)) in named:
        return next(iter(named.values()))
    return named


def array_file(path: str | os.PathLike[str]) -> Dataset:
    """Read a .npy or .npz file of uint8 or floating samples.

    An .npz holds the samples as ``x`` (or as its only other array) and optionally ``labels`` or
    ``y``, or a condition: ``cond``, or ``cond.NAME`` of each tensor of a dict. ``[N, D]`` and
    ``[N, C, H, W]`` are kept; ``[N, H, W]`` becomes ``[N, 1, H, W]``; ``[N, H, W, C]`` becomes
    ``[N, C, H, W]`` if C is 1, 3 or 4 and H is not.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is corrupt, holds objects, or is no data set; names the file.
    """
    file = Path(path)
    arrays = read_arrays(file)
    labels = arrays.pop("labels" if "labels" in arrays else "y", None)
    conds = {name: arrays.pop(name) for name in list(arrays) if name.split(".")[0] == "cond"}
    if "x" not in arrays and len(arrays) != 1:
        raise ValueError(f"{file} must hold an array x or only one array, got {list(arrays)}")
    try:
        x = as_tensor(arrays["x"] if "x" in arrays else arrays.popitem()[1])
        if x.ndim == 3:
            x = x[:, None]
        elif x.ndim == 4 and x.shape[3] in IMAGE_MODES and x.shape[1] not in IMAGE_MODES:
            x = x.permute(0, 3, 1, 2).contiguous()
        cond = condition_of(conds) if conds else None
        return Dataset(x, None if labels is None else as_tensor(labels), cond=cond)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
