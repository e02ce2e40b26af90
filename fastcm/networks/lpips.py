"""LPIPS, the learned perceptual distance of images, from weights in local files."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcm.networks.files import read_weights

CONVOLUTIONS = (
    ((0, 3, 64), (2, 64, 64)),
    ((5, 64, 128), (7, 128, 128)),
    ((10, 128, 256), (12, 256, 256), (14, 256, 256)),
    ((17, 256, 512), (19, 512, 512), (21, 512, 512)),
    ((24, 512, 512), (26, 512, 512), (28, 512, 512)),
)
"""Index, channels in and out of VGG16's convolutions, by the blocks that a distance ends."""
SMALLEST = 16
"""Pixels of a side, halved four times."""

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_FEATURE = re.compile(r"(?:features|net\.slice\d)\.(\d+\.(?:weight|bias))")
_HEAD = re.compile(r"(lin\d)\.model\.1\.weight")


class LPIPS(nn.Module):
    """sum over blocks of mean over pixels of w (phi(f) - phi(target))^2, phi VGG16's features.

    A metric for any objective: the features of a block have unit length at every pixel, and its
    head w >= 0 weights their channels. Evaluated in float32; differentiable in both images.

    Args:
        files: one file or several, which together hold VGG16's convolutions, under torchvision's
            names ``features.N.weight`` and ``.bias`` or those of the ``lpips`` package, and the
            heads, ``lin0.model.1.weight`` to ``lin4.model.1.weight`` of ``[1, C, 1, 1]``.
            ``.safetensors``, or what ``torch.save`` wrote, of which nothing but tensors is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is not readable; a weight is missing or of another shape.

    Source: Zhang et al. 2018, "The unreasonable effectiveness of deep features as a perceptual
    metric", eq. 1; its package's version 0.1 with ``net="vgg"``.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> None:
        super().__init__()
        paths = [files] if isinstance(files, str | os.PathLike) else list(files)
        found: dict[str, Tensor] = {}
        for path in paths:
            found.update(_named(read_weights(Path(path), "LPIPS")))
        where = ", ".join(map(str, paths))
        self.blocks = nn.ModuleList()
        self.heads = nn.ParameterList()
        for block, layers in enumerate(CONVOLUTIONS):
            convolutions = nn.ModuleList()
            for index, channels, width in layers:
                convolution = nn.Conv2d(channels, width, 3, padding=1, device="meta")
                for name in ("weight", "bias"):
                    shape = tuple(getattr(convolution, name).shape)
                    value = _weight(found, f"features.{index}.{name}", shape, where)
                    setattr(convolution, name, nn.Parameter(value, requires_grad=False))
                convolutions.append(convolution)
            self.blocks.append(convolutions)
            shape = (1, layers[-1][2], 1, 1)
            head = _weight(found, f"lin{block}.model.1.weight", shape, where)
            self.heads.append(nn.Parameter(head, requires_grad=False))
        for name, constants in (("shift", _SHIFT), ("scale", _SCALE)):
            constant = torch.tensor(constants, dtype=torch.float32, device="cpu")
            self.register_buffer(name, constant.view(1, 3, 1, 1), persistent=False)

    def forward(self, f: Tensor, target: Tensor) -> Tensor:
        """The distance of images ``[B, C, H, W]`` in [-1, 1], float32 ``[B]``.

        Args:
            f, target: C is 1, which is repeated, or 3; H and W are >= 16.

        Raises:
            ValueError: the images have another shape.
        """
        if f.shape != target.shape:
            raise ValueError(f"LPIPS needs two images of one shape, got {f.shape}, {target.shape}")
        if f.dim() != 4 or f.shape[1] not in (1, 3) or min(f.shape[2:]) < SMALLEST:
            raise ValueError(
                f"LPIPS needs images [B, C, H, W] of 1 or 3 channels and at least {SMALLEST} x "
                f"{SMALLEST} pixels, got {list(f.shape)}"
            )
        total = torch.zeros(len(f), dtype=torch.float32, device=f.device)
        for one, other, head in zip(self.features(f), self.features(target), self.heads):
            total = total + ((one - other).square() * head).sum(1).mean((1, 2))
        return total

    def features(self, x: Tensor) -> list[Tensor]:
        """The features of each block, of unit length at every pixel or 0."""
        x = (x.float().expand(-1, 3, -1, -1) - self.shift) / self.scale
        found = []
        for i, block in enumerate(self.blocks):
            x = functional.max_pool2d(x, 2) if i else x
            assert isinstance(block, nn.ModuleList)
            for convolution in block:
                x = convolution(x).relu()
            found.append(x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10))
        return found


def _named(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of VGG16 and the heads, under one name whatever the file calls them."""
    named = {}
    for name, value in found.items():
        if match := _FEATURE.fullmatch(name):
            named[f"features.{match[1]}"] = value
        elif _HEAD.fullmatch(name):
            named[name] = value
    return named


def _weight(found: dict[str, Tensor], name: str, shape: tuple[int, ...], where: str) -> Tensor:
    if name not in found:
        raise ValueError(
            f"LPIPS finds no {name!r} in {where}: give torchvision's vgg16 and the lpips package's "
            "vgg.pth, or one file with the weights of both"
        )
    value = found[name]
    if value.shape != shape:
        raise ValueError(f"{name!r} in {where} must be {list(shape)}, got {list(value.shape)}")
    return value.float()
