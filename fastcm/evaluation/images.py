"""Images from memory, files or folders, a batch at a time, and their features."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastcm.data.datasets import as_tensor, read_arrays
from fastcm.data.images import IMAGE_SUFFIXES, read_image
from fastcm.evaluation.pictures import to_uint8
from fastcm.networks.modes import eval_mode

_CHANNELS = (1, 3)
STORED = ("arr_0", "x")
"""Names of images in an .npz file: as ADM and numpy call them, and as fastcm does."""
Images = Tensor | str | os.PathLike[str] | Iterable[Tensor]
"""See `image_features`."""


class FeatureNetwork(Protocol):
    """What `Inception` and `DINOv2` are, and a module of your own can be.

    A call turns images ``[B, 3, H, W]``, uint8 on the network's device, into features
    ``[B, width]``.
    """

    width: int

    @property
    def distance(self) -> str:
        """The name of the Frechet distance in these features."""
        ...

    def __call__(self, x: Tensor, /) -> Tensor: ...


def image_features(net: FeatureNetwork, images: Images, *, batch_size: int = 64) -> Tensor:
    """The features of images, which are read and computed batch by batch.

    Args:
        net: `Inception`, `DINOv2`, or another `FeatureNetwork`; a module runs on its device, in
            evaluation mode.
        images: a tensor or an iterable of batches, ``[N, 1 | 3, H, W]``, uint8 or in -1..1, which
            is rounded to uint8 as files of them would be; grey becomes RGB. Or a folder of images
            of one size, in the order of their names; or a .npy or .npz file, there ``arr_0`` or
            ``x``, channels first or last.
        batch_size: images at once.

    Returns:
        float32 ``[N, width]`` on the CPU.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: what is given are no images, they differ in size, or one cannot be read.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    device = torch.device("cpu")
    if isinstance(net, torch.nn.Module):
        device = next((p.device for p in net.parameters()), device)
    found = [
        _computed(net, batch.to(device)).float().cpu() for batch in _batches(images, batch_size)
    ]
    if not found:
        raise ValueError("no images: features need at least one")
    return torch.cat(found)


@torch.no_grad()
def _computed(net: FeatureNetwork, x: Tensor) -> Tensor:
    # torch lets convolutions round to TF32's ten bits
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        if isinstance(net, torch.nn.Module):
            with eval_mode(net):
                return net(x)
        return net(x)


def _batches(images: Images, size: int) -> Iterator[Tensor]:
    """Batches of RGB, uint8 ``[B, 3, H, W]``."""
    parts: Iterable[Tensor]
    if isinstance(images, str | os.PathLike):
        path = Path(images)
        parts = _files(path, size) if path.is_dir() else [_stored(path)]
    else:
        parts = [images] if isinstance(images, Tensor) else images
    for part in parts:
        for x in torch.split(part, size):
            if x.dim() != 4 or x.shape[1] not in _CHANNELS:
                raise ValueError(
                    f"features are of images [N, 1 | 3, H, W], got samples {list(x.shape[1:])}"
                )
            yield to_uint8(x).expand(-1, 3, -1, -1)


def stored_images(arrays: Mapping[str, Any]) -> Tensor | None:
    """The images among the arrays of a file, channels first; None if there are none."""
    name = next((name for name in STORED if name in arrays), None)
    if name is None:
        return None
    x = as_tensor(arrays[name])
    last = x.dim() == 4 and x.shape[3] in _CHANNELS and x.shape[1] not in _CHANNELS
    return x.permute(0, 3, 1, 2) if last else x


def _stored(file: Path) -> Tensor:
    arrays = read_arrays(file)
    x = stored_images(arrays)
    if x is None:
        raise ValueError(f"{file} must hold images arr_0 or x, got {', '.join(sorted(arrays))}")
    return x


def _files(folder: Path, size: int) -> Iterator[Tensor]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"no image in {folder}: features need at least one")
    shape = None
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), size):
            some = files[start : start + size]
            images = list(pool.map(_image, some))
            shape = shape or images[0].shape
            for file, image in zip(some, images):
                if image.shape != shape:
                    raise ValueError(
                        f"images differ in size: {files[0]} is {shape[2]} x {shape[1]} and {file} "
                        f"is {image.shape[2]} x {image.shape[1]}; bring them to one size"
                    )
            yield torch.stack(images)


def _image(file: Path) -> Tensor:
    try:
        return read_image(file, None, 3)
    except Exception as error:  # decoders raise many kinds on damaged files
        raise ValueError(f"{file} is not a readable image: {error}") from error
