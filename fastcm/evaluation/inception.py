"""Inception-v3 as FID uses it, from weights in a local file."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcm.networks.files import read_weights, take_weights

SIDE = 299
"""Pixels of the network's input."""
FID_CLASSES, TORCHVISION_CLASSES = 1008, 1000

Layer = tuple[str, int, int | tuple[int, int]]
"""Name, channels out and kernel of a convolution."""
Branch = tuple["Layer | tuple[Layer, Layer] | None", ...]
"""Convolutions one after another; two side by side are a fork, and None is the block's pooling."""

_HINT = (
    "give pt_inception-2015-12-05-6726825d.pth (the network of FID), or inception_v3 of torchvision"
)


def _a(pool: int) -> tuple[Branch, ...]:
    return (
        (("branch1x1", 64, 1),),
        (("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)),
        (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)),
        (None, ("branch_pool", pool, 1)),
    )


def _c(width: int) -> tuple[Branch, ...]:
    wide, high = (1, 7), (7, 1)
    return (
        (("branch1x1", 192, 1),),
        (("branch7x7_1", width, 1), ("branch7x7_2", width, wide), ("branch7x7_3", 192, high)),
        (
            ("branch7x7dbl_1", width, 1),
            ("branch7x7dbl_2", width, high),
            ("branch7x7dbl_3", width, wide),
            ("branch7x7dbl_4", width, high),
            ("branch7x7dbl_5", 192, wide),
        ),
        (None, ("branch_pool", 192, 1)),
    )


_B: tuple[Branch, ...] = (
    (("branch3x3", 384, 3),),
    (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)),
    (None,),
)
_D: tuple[Branch, ...] = (
    (("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)),
    (
        ("branch7x7x3_1", 192, 1),
        ("branch7x7x3_2", 192, (1, 7)),
        ("branch7x7x3_3", 192, (7, 1)),
        ("branch7x7x3_4", 192, 3),
    ),
    (None,),
)
_E: tuple[Branch, ...] = (
    (("branch1x1", 320, 1),),
    (
        ("branch3x3_1", 384, 1),
        (("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))),
    ),
    (
        ("branch3x3dbl_1", 448, 1),
        ("branch3x3dbl_2", 384, 3),
        (("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))),
    ),
    (None, ("branch_pool", 192, 1)),
)
BLOCKS: dict[str, tuple[Branch, ...]] = {
    "Mixed_5b": _a(32), "Mixed_5c": _a(64), "Mixed_5d": _a(64),
    "Mixed_6a": _B,
    "Mixed_6b": _c(128), "Mixed_6c": _c(160), "Mixed_6d": _c(160), "Mixed_6e": _c(192),
    "Mixed_7a": _D,
    "Mixed_7b": _E, "Mixed_7c": _E,
}  # fmt: skip
"""Branches of the blocks; what they yield is joined in this order. Szegedy et al. 2015, fig. 5-7,
10; the names are torchvision's."""
_HALVING = ("Mixed_6a", "Mixed_7a")


class Inception(nn.Module):
    """The 2,048 features of Inception-v3 before its classifier.

    FID's own network was trained in TensorFlow (``inception-2015-12-05``) and differs from
    torchvision's in its weights, its 1,008 classes, averages that leave out the padding, and a
    maximum in place of the average in the last block. Which one a file holds is seen from ``fc``:
    with torchvision's weights the distance has another name, and compares with no published FID.

    Args:
        path: ``.safetensors``, or what ``torch.save`` wrote, of which nothing but tensors is read,
            by the names of torchvision's ``inception_v3``. ``AuxLogits`` is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not readable, or holds another network.

    Source: Heusel et al. 2017; what differs, and the 299 x 299 pixels as TensorFlow 1 resizes them,
    as in torch-fidelity's ``FeatureExtractorInceptionV3``.
    """

    width = 2048

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        found = {
            name: value
            for name, value in read_weights(Path(path), "Inception").items()
            if not name.startswith("AuxLogits.") and not name.endswith(".num_batches_tracked")
        }
        classes = len(found["fc.bias"]) if "fc.bias" in found else FID_CLASSES
        if classes not in (FID_CLASSES, TORCHVISION_CLASSES):
            raise ValueError(f"'fc.bias' in {path} has {classes} classes: {_HINT}")
        self.of_fid = classes == FID_CLASSES
        self._build(classes)
        take_weights(self, found, str(path), _HINT)

    def _build(self, classes: int) -> None:
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3, padded=True)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3)
        average = partial(
            functional.avg_pool2d,
            kernel_size=3,
            stride=1,
            padding=1,
            count_include_pad=not self.of_fid,
        )
        channels = 192
        for name, branches in BLOCKS.items():
            pool: Callable[[Tensor], Tensor] = average
            if name in _HALVING:
                pool = partial(functional.max_pool2d, kernel_size=3, stride=2)
            elif name == "Mixed_7c" and self.of_fid:
                pool = partial(functional.max_pool2d, kernel_size=3, stride=1, padding=1)
            block = _Mixed(channels, branches, pool, halving=name in _HALVING)
            setattr(self, name, block)
            channels = block.width
        assert channels == self.width
        self.fc = nn.Linear(channels, classes, device="meta")

    @property
    def distance(self) -> str:
        """What the Frechet distance in these features is called."""
        return "FID" if self.of_fid else "FD (torchvision Inception)"

    def forward(self, x: Tensor) -> Tensor:
        """Features, float32 ``[B, 2048]``, of ``[B, 3, H, W]`` in 0..255, uint8 or float."""
        x = x.float()
        if self.of_fid:
            x = (resize_tensorflow(x, SIDE) - 128) / 128
        else:
            size = (SIDE, SIDE)
            x = functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
            x = x / 127.5 - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = functional.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = functional.max_pool2d(x, 3, stride=2)
        for name in BLOCKS:
            x = getattr(self, name)(x)
        return x.mean((2, 3))


def resize_tensorflow(x: Tensor, side: int) -> Tensor:
    """Bilinear as TensorFlow 1: pixel i of the output lies at i n / side of n, its corner.

    No half pixel is added and nothing is smoothed before an image is made smaller; other ways of
    resizing change FID.

    Args:
        x: float32 ``[B, C, H, W]``.
        side: of the result, ``[B, C, side, side]``.
    """
    for dim in (3, 2):
        n = x.shape[dim]
        scale = torch.tensor(n / side, dtype=torch.float32, device=x.device)
        at = torch.arange(side, dtype=torch.float32, device=x.device) * scale
        low = at.long()
        weight = (at - low).view(-1, *(1,) * (3 - dim))
        a, b = (x.index_select(dim, i) for i in (low, (low + 1).clamp_max(n - 1)))
        x = a + (b - a) * weight
    return x


class _Convolution(nn.Module):
    """Convolution without bias, normalisation by the running statistics, ReLU."""

    def __init__(
        self,
        channels: int,
        width: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padded: bool = False,
    ) -> None:
        super().__init__()
        high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (high // 2, wide // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(
            channels, width, (high, wide), stride, padding, bias=False, device="meta"
        )
        self.bn = nn.BatchNorm2d(width, eps=1e-3, device="meta")
        self.bn.num_batches_tracked = None  # of training, and not in every file

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """Branches of convolutions, joined; one that halves does so in the last layer of each."""

    def __init__(
        self,
        channels: int,
        branches: tuple[Branch, ...],
        pool: Callable[[Tensor], Tensor],
        *,
        halving: bool,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.branches: list[list[list[str]]] = []
        self.width = 0
        for branch in branches:
            names, n = [], channels
            for i, step in enumerate(branch):
                layers = _layers(step)
                last = halving and i == len(branch) - 1
                for name, width, kernel in layers:
                    options = {"stride": 2} if last else {"padded": True}
                    setattr(self, name, _Convolution(n, width, kernel, **options))
                names.append([name for name, _, _ in layers])
                n = sum(width for _, width, _ in layers) or n
            self.branches.append(names)
            self.width += n

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for branch in self.branches:
            h = x
            for names in branch:
                h = torch.cat([getattr(self, n)(h) for n in names], 1) if names else self.pool(h)
            found.append(h)
        return torch.cat(found, 1)


def _layers(step: Layer | tuple[Layer, Layer] | None) -> tuple[Layer, ...]:
    """The convolutions of a step, which read the same; none if it pools."""
    if step is None:
        return ()
    return (step,) if isinstance(step[0], str) else step
