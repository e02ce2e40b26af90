"""Data sets in memory, and what reads them: digits, image folders, array files."""

from __future__ import annotations

import copy
import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_IMAGE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_NAMED_SKIPS = 5


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples and, where there are classes, one label each.

    Args:
        x: uint8 or floating samples ``[N, ...]``, N >= 1; other floats are stored as float32.
        labels: integers ``[N]`` in 0 .. num_classes - 1, stored as int64.
        num_classes: number of classes; default the largest label + 1.
        paired: whether x is ``[N, 2, ...]``, each sample with the noise it was made from; see
            `fastcm.data.pairs`.

    Raises:
        ValueError: the data is empty, not finite, or of another dtype or shape.
    """

    x: Tensor
    labels: Tensor | None = None
    num_classes: int | None = None
    paired: bool = False

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

    def without_labels(self) -> Dataset:
        """The same samples."""
        same = self._with(self.x, None)
        object.__setattr__(same, "num_classes", None)
        return same

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on `device`."""
        labels = None if self.labels is None else self.labels.to(device)
        return self._with(self.x.to(device), labels)

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
        return self._rows(order[held:]), self._rows(order[:held])

    def _rows(self, index: Tensor) -> Dataset:
        labels = None if self.labels is None else self.labels[index]
        return self._with(self.x[index], labels)

    def _with(self, x: Tensor, labels: Tensor | None) -> Dataset:
        """Other tensors of the same content: checking it again would wait for the device."""
        same = copy.copy(self)
        object.__setattr__(same, "x", x)
        object.__setattr__(same, "labels", labels)
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


def as_condition(cond: Tensor) -> Tensor:
    """Integer labels as int64; any other condition unchanged."""
    plain = cond.is_floating_point() or cond.is_complex() or cond.dtype == torch.bool
    return cond if plain else cond.long()


def _demo(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{module} is missing: pip install "fastcm[demo]"') from error


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits: uint8 ``[1797, 1, 8, 8]``, 10 classes."""
    bunch = _demo("sklearn.datasets").load_digits()
    x = (torch.from_numpy(bunch.images) * (255 / 16)).round().to(torch.uint8)
    return Dataset(x[:, None], torch.from_numpy(bunch.target), 10)


def photographs(count: int = 4096, *, size: int = 32, seed: int = 0) -> Dataset:
    """Random crops of scikit-learn's two sample photographs, of a temple and of a flower.

    Args:
        count: of the crops, half of each; crops may overlap.
        size: of a side, in 1..427 pixels.
        seed: of the places.

    Returns:
        uint8 ``[count, 3, size, size]`` in random order; the labels say which of the two.

    Raises:
        ValueError: count or size is out of range.
    """
    _demo("PIL")
    whole = [
        torch.from_numpy(p.copy()) for p in _demo("sklearn.datasets").load_sample_images().images
    ]
    height, width = whole[0].shape[:2]
    if count < 2 or not 1 <= size <= min(height, width):
        raise ValueError(
            f"photographs need count >= 2 and size in 1..{min(height, width)}, got {count}, {size}"
        )
    places = torch.Generator().manual_seed(seed)
    which = torch.randperm(count, generator=places) % 2
    tops, lefts = (
        torch.randint(side - size + 1, (count,), generator=places).tolist()
        for side in (height, width)
    )
    crops = [
        whole[k][top : top + size, left : left + size]
        for k, top, left in zip(which.tolist(), tops, lefts)
    ]
    return Dataset(torch.stack(crops).permute(0, 3, 1, 2).contiguous(), which, 2)


def image_folder(
    path: str | os.PathLike[str],
    *,
    size: int | None = None,
    channels: int = 3,
    on_skip: Callable[[Path, str], None] | None = None,
) -> Dataset:
    """Read every png, jpg, jpeg, webp and bmp file below a folder, in sorted order.

    If every image lies in a first-level sub-folder, these are the classes, by sorted name.

    Args:
        path: the folder.
        size: resize the short side to it and crop the centre; None where all have one size.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        on_skip: called with file and reason for each image that cannot be read; default one
            warning for all of them.

    Returns:
        uint8 ``[N, channels, H, W]``, with labels where there are classes.

    Raises:
        ValueError: no readable image, or images of several sizes without `size`.
    """
    if channels not in _IMAGE_MODES:
        raise ValueError(f"channels must be one of {sorted(_IMAGE_MODES)}, got {channels}")
    if size is not None and size < 1:
        raise ValueError(f"size must be >= 1, got {size}")
    _demo("PIL")
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in _IMAGE_SUFFIXES)
    kept: list[Path] = []
    skipped: list[tuple[Path, str]] = []
    x = torch.empty(0, dtype=torch.uint8, device="cpu")
    for file in files:
        try:
            image = _read_image(file, size, channels)
        except Exception as error:  # decoders raise many kinds on damaged files
            skipped.append((file, f"{type(error).__name__}: {error}"))
            if on_skip is not None:
                on_skip(*skipped[-1])
            continue
        if not kept:
            x = torch.empty(len(files), *image.shape, dtype=torch.uint8, device="cpu")
        elif image.shape != x.shape[1:]:
            (h0, w0), (h1, w1) = x.shape[2:], image.shape[1:]
            raise ValueError(
                f"images differ in size: {kept[0]} is {w0} x {h0} and {file} is {w1} x {h1}; "
                f"pass size to resize and crop them"
            )
        x[len(kept)] = image
        kept.append(file)
    if not kept:
        raise ValueError(f"no readable image in {root}: {_summary(skipped, len(files))}")
    if skipped and on_skip is None:
        warnings.warn(f"skipped {_summary(skipped, len(files))}", stacklevel=2)
    parts = [file.relative_to(root).parts for file in kept]
    if any(len(p) < 2 for p in parts):
        return Dataset(x[: len(kept)])
    classes = {name: i for i, name in enumerate(sorted({p[0] for p in parts}))}
    labels = torch.tensor([classes[p[0]] for p in parts], device="cpu")
    return Dataset(x[: len(kept)], labels, len(classes))


def holds_images(folder: Path) -> bool:
    """Whether there is an image anywhere in a folder."""
    return any(file.suffix.lower() in _IMAGE_SUFFIXES for file in folder.rglob("*"))


def _read_image(file: Path | IO[bytes], size: int | None, channels: int) -> Tensor:
    Image, ImageOps = _demo("PIL.Image"), _demo("PIL.ImageOps")
    with Image.open(file) as opened:
        if opened.mode[0] in "IF":
            raise ValueError(f"more than 8 bits per channel (mode {opened.mode})")
        image = ImageOps.exif_transpose(opened).convert(_IMAGE_MODES[channels])
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, channels).permute(2, 0, 1)


def _summary(skipped: list[tuple[Path, str]], total: int) -> str:
    named = "; ".join(f"{file} ({reason})" for file, reason in skipped[:_NAMED_SKIPS])
    more = "; ..." if len(skipped) > _NAMED_SKIPS else ""
    return f"{len(skipped)} unreadable of {total} image files{': ' if named else ''}{named}{more}"


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


def as_tensor(array: Any) -> Tensor:
    """A numpy array of any byte order."""
    return torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")))


def array_file(path: str | os.PathLike[str]) -> Dataset:
    """Read a .npy or .npz file of uint8 or floating samples.

    An .npz holds the samples as ``x`` (or as its only other array) and optionally ``labels`` or
    ``y``. ``[N, D]`` and ``[N, C, H, W]`` are kept; ``[N, H, W]`` becomes ``[N, 1, H, W]``;
    ``[N, H, W, C]`` becomes ``[N, C, H, W]`` if C is 1, 3 or 4 and H is not.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is corrupt, holds objects, or is no data set; names the file.
    """
    file = Path(path)
    arrays = read_arrays(file)
    labels = arrays.pop("labels" if "labels" in arrays else "y", None)
    if "x" not in arrays and len(arrays) != 1:
        raise ValueError(f"{file} must hold an array x or only one array, got {list(arrays)}")
    try:
        x = as_tensor(arrays["x"] if "x" in arrays else arrays.popitem()[1])
        if x.ndim == 3:
            x = x[:, None]
        elif x.ndim == 4 and x.shape[3] in _IMAGE_MODES and x.shape[1] not in _IMAGE_MODES:
            x = x.permute(0, 3, 1, 2).contiguous()
        return Dataset(x, None if labels is None else as_tensor(labels))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
