"""Data sets of images: folders of files, and those that come with scikit-learn."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fastcm.data.datasets import IMAGE_MODES, Dataset

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_NAMED_SKIPS = 5


def demo_module(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{module} is missing: pip install "fastcm[demo]"') from error


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits: uint8 ``[1797, 1, 8, 8]``, 10 classes."""
    bunch = demo_module("sklearn.datasets").load_digits()
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
    demo_module("PIL")
    whole = [
        torch.from_numpy(p.copy())
        for p in demo_module("sklearn.datasets").load_sample_images().images
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
    if channels not in IMAGE_MODES:
        raise ValueError(f"channels must be one of {sorted(IMAGE_MODES)}, got {channels}")
    if size is not None and size < 1:
        raise ValueError(f"size must be >= 1, got {size}")
    demo_module("PIL")
    root = Path(path)
    files = image_files(root)
    kept: list[Path] = []
    skipped: list[tuple[Path, str]] = []
    x = torch.empty(0, dtype=torch.uint8, device="cpu")
    for file in files:
        try:
            image = read_image(file, size, channels)
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
    labels = labels_of(kept, root)
    if labels is None:
        return Dataset(x[: len(kept)])
    return Dataset(x[: len(kept)], torch.tensor(labels, device="cpu"), max(labels) + 1)


def image_files(root: Path) -> list[Path]:
    """The images below a folder, in sorted order.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    return sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)


def labels_of(files: Sequence[Path], root: Path) -> list[int] | None:
    """The classes of files by the sub-folders that they are in; None if some are in none."""
    parts = [file.relative_to(root).parts for file in files]
    if any(len(p) < 2 for p in parts):
        return None
    classes = {name: i for i, name in enumerate(sorted({p[0] for p in parts}))}
    return [classes[p[0]] for p in parts]


def holds_images(folder: Path) -> bool:
    """Whether there is an image anywhere in a folder."""
    return any(file.suffix.lower() in IMAGE_SUFFIXES for file in folder.rglob("*"))


def read_image(file: Path | IO[bytes], size: int | None, channels: int) -> Tensor:
    Image, ImageOps = demo_module("PIL.Image"), demo_module("PIL.ImageOps")
    with Image.open(file) as opened:
        if opened.mode[0] in "IF":
            raise ValueError(f"more than 8 bits per channel (mode {opened.mode})")
        image = ImageOps.exif_transpose(opened).convert(IMAGE_MODES[channels])
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, channels).permute(2, 0, 1)


def _summary(skipped: list[tuple[Path, str]], total: int) -> str:
    named = "; ".join(f"{file} ({reason})" for file, reason in skipped[:_NAMED_SKIPS])
    more = "; ..." if len(skipped) > _NAMED_SKIPS else ""
    return f"{len(skipped)} unreadable of {total} image files{': ' if named else ''}{named}{more}"
