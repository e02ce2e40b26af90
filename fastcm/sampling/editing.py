"""Editing with a consistency sampler: constraints that hold x0 to what is known of it.

Each constraint is the orthogonal projection onto {x0 : A x0 = known} for one linear A (a mask, the
grey of the colours, the mean of each block). Given to `fastcm.sampling.multistep` it is applied
after every evaluation, so the network fills in what the constraint leaves open:

    y = inpainted start, grey image in three channels, enlarged blocks, ...
    x = multistep(net, path, z, key, times=times, start=y, constraint=inpainting(known, mask))

Interpolation needs no constraint: it mixes the initial noise (`interpolate`). Variation and
stroke-guided editing are `start` alone, with times that begin below t_max.

Source: Song et al. 2023, "Consistency models", algorithm 4 and appendix D.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcm.ops.validation import describe
from fastcm.sampling.functions import Constraint

LUMINANCE = (0.299, 0.587, 0.114)
"""Share of red, green and blue in grey (ITU-R BT.601)."""


def inpainting(known: Tensor, mask: Tensor) -> Constraint:
    """Keep `known` where `mask` is set; fill in the rest.

    Args:
        known: ``[B, ...]``, or anything that broadcasts to it; its values off the mask do not
            matter.
        mask: bool, broadcasts to it: True where the value is known.

    Raises:
        TypeError: mask is not bool.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True where known, got {describe(mask)}")
    return lambda x0: torch.where(mask, known.to(x0), x0)


def colourisation(grey: Tensor, weights: Sequence[float] = LUMINANCE) -> Constraint:
    """Keep the weighted sum of the channels; choose the colours.

    Args:
        grey: ``[B, 1, H, W]``, `luminance` of the image, in -1..1.
        weights: of the channels, as `luminance` takes them; used as they are.

    Raises:
        ValueError: grey has more than one channel; see `luminance`.
    """
    if grey.dim() < 2 or grey.shape[1] != 1:
        raise ValueError(f"grey must be [B, 1, ...], got {describe(grey)}")
    w = _shares(weights)
    direction = w / w.square().sum()

    def constraint(x0: Tensor) -> Tensor:
        missing = grey.to(x0) - luminance(x0, weights)
        return x0 + missing * direction.to(x0).reshape(1, -1, *[1] * (x0.dim() - 2))

    return constraint


def luminance(x: Tensor, weights: Sequence[float] = LUMINANCE) -> Tensor:
    """Grey of an image: ``[B, C, ...]`` with C = len(weights) to ``[B, 1, ...]``.

    Args:
        x: the image.
        weights: of the channels; they sum to 1 but for their rounding to three digits, so that
            grey and colours have one scale, and are used as they are.

    Raises:
        ValueError: another number of channels, weights that do not sum to 1.
    """
    w = _shares(weights)
    if x.dim() < 2 or x.shape[1] != len(w):
        raise ValueError(f"x must have {len(w)} channels, [B, {len(w)}, ...], got {describe(x)}")
    return (x * w.to(x).reshape(1, -1, *[1] * (x.dim() - 2))).sum(1, keepdim=True)


def _shares(weights: Sequence[float]) -> Tensor:
    """The weights, float64; the projection is exact for any sum, also of rounded ones."""
    w = torch.tensor(list(weights), dtype=torch.float64)
    # each of n numbers of three digits is off by 0.0005 at most; so is NaN refused
    if not abs(float(w.sum()) - 1.0) <= 0.0005 * len(w) + 1e-6:
        raise ValueError(f"weights must sum to 1, got {list(weights)}, of sum {float(w.sum()):g}")
    return w


def super_resolution(low: Tensor, factor: int) -> Constraint:
    """Keep the mean of every factor x factor block; choose the detail.

    Args:
        low: ``[B, C, H, W]``, `shrink` of the image.
        factor: of the side, >= 2.

    Raises:
        ValueError: factor < 2, low of another rank; later, x0 that is not ``factor`` times low.
    """
    if factor < 2 or low.dim() != 4:
        raise ValueError(f"need factor >= 2 and low [B, C, H, W], got {factor}, {describe(low)}")

    def constraint(x0: Tensor) -> Tensor:
        means = shrink(x0, factor)
        if means.shape[1:] != low.shape[1:]:
            raise ValueError(
                f"low must be [B, {', '.join(map(str, means.shape[1:]))}] for x0 "
                f"{list(x0.shape)}, got {describe(low)}"
            )
        return x0 + enlarge(low.to(x0) - means, factor)

    return constraint


def shrink(x: Tensor, factor: int) -> Tensor:
    """Means of factor x factor blocks, ``[B, C, H, W]`` to ``[B, C, H / factor, W / factor]``.

    Raises:
        ValueError: factor does not divide height and width.
    """
    if x.dim() != 4 or x.shape[2] % factor or x.shape[3] % factor:
        raise ValueError(f"x must be [B, C, H, W], sides divided by {factor}, got {describe(x)}")
    return F.avg_pool2d(x, factor)


def enlarge(x: Tensor, factor: int) -> Tensor:
    """Every pixel as a factor x factor block: the least that has `x` as its `shrink`."""
    return x.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def interpolate(z: Tensor, other: Tensor, weight: float | Tensor) -> Tensor:
    """Initial noise between two samples', along the great circle, so that it keeps its norm.

    Args:
        z, other: standard normals ``[B, ...]``.
        weight: 0 gives z, 1 gives `other`; a number or ``[B]``.

    Returns:
        ``[B, ...]``, for any sampler in place of z.

    Raises:
        ValueError: z and other differ in shape.

    Source: Song et al. 2023, appendix D; Shoemake 1985 (slerp).
    """
    if z.shape != other.shape:
        raise ValueError(f"z and other must have one shape, got {describe(z)}, {describe(other)}")
    a, b = z.double().flatten(1), other.double().flatten(1)
    w = torch.as_tensor(weight, dtype=torch.float64, device=z.device).expand(len(z))[:, None]
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    angle = cosine.clamp(-1.0, 1.0).acos()[:, None]
    straight = angle.sin() < 1e-6  # parallel: the circle is a line
    scale = angle.sin().masked_fill(straight, 1.0)
    first = torch.where(straight, 1.0 - w, ((1.0 - w) * angle).sin() / scale)
    second = torch.where(straight, w, (w * angle).sin() / scale)
    return (first * a + second * b).reshape(z.shape).to(z.dtype)
