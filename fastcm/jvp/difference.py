"""The tangent by finite differences, in float32 or wider."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Scheme = Literal["central", "forward"]


def finite_difference(
    fn: Callable[..., Tensor],
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor, ...],
    h: float,
    scheme: Scheme = "central",
) -> tuple[Tensor, Tensor]:
    """fn(*primals) with its gradient, and a difference quotient along `tangents`, without.

    For functions that no derivative is known of. In float32 with h = 1e-3 to 1e-2 of the scale
    of the arguments expect a relative error of 1e-4 to 1e-2; bfloat16 gives 27 % at best.

    Args:
        fn: of tensors, one tensor back.
        primals, tangents: its arguments and their directions, of equal shapes.
        h: step, > 0, in units of the tangents.
        scheme: "central", (f(x + h dx) - f(x - h dx)) / 2h, two more evaluations, or "forward",
            (f(x + h dx) - f(x)) / h, one more.

    Raises:
        ValueError: h <= 0, or an unknown scheme.
    """
    if not h > 0:
        raise ValueError(f"h must be > 0, got {h}")
    if scheme not in ("central", "forward"):
        raise ValueError(f"scheme must be 'central' or 'forward', got {scheme!r}")
    out = fn(*primals)
    half = {x.dtype for x in (*primals, out)} & {torch.bfloat16, torch.float16}
    if half:
        warnings.warn(
            f"finite differences in {', '.join(map(str, half))} are noise: use float32",
            stacklevel=2,
        )
    with torch.no_grad():
        above = fn(*(x + h * dx for x, dx in zip(primals, tangents)))
        if scheme == "forward":
            return out, (above - out) / h
        below = fn(*(x - h * dx for x, dx in zip(primals, tangents)))
        return out, (above - below) / (2.0 * h)
