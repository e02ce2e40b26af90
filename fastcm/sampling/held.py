"""Coefficients of a sampler's maps, which are one number for all samples, as rows of them.

Of few samples on a CPU they are made once and held from call to call: there a call is short, and
what surrounds it counts. See also `fastcm.sampling.few`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastcm.ops import prepared
from fastcm.ops.dispatch import Door, door, makes_natively
from fastcm.ops.reference import compute_dtype
from fastcm.tracing import is_profiled

Rows = Callable[[Tensor, float], Tensor]

SMALL = 64
"""Samples up to which coefficients are held."""


def few(x: Tensor, count: int) -> bool:
    """Whether `count` samples are few, native code takes a tensor such as x, and nobody records."""
    return count <= SMALL and door(x) is Door.NATIVE and not is_profiled()


def few_of_cpu(count: int) -> bool:
    """As `few`, of plain tensors that will be made on the CPU."""
    return count <= SMALL and makes_natively() and not is_profiled()


def plain_rows(x: Tensor, value: float) -> Tensor:
    """The coefficient `value` of every sample of x, ``[B]`` in the dtype of the arithmetic."""
    return torch.full(x.shape[:1], value, dtype=compute_dtype(x), device=x.device)


def held_rows(x: Tensor, value: float) -> Tensor:
    """As `plain_rows`, of few samples on a CPU, made once. Not to be written to."""
    if value == 0.0:  # 0.0 and -0.0 are equal
        return plain_rows(x, value)
    return _held(x.shape[0], value, compute_dtype(x))


def held_boundary(x: Tensor, F: Tensor, a: float, b: float) -> Tensor | None:
    """a x + b F where `held_rows` serves x; None where that takes the operator itself."""
    plain = type(x) is Tensor and x.dtype is torch.float32 and x.is_contiguous()
    if not plain or a == 0.0 or b == 0.0 or torch.is_grad_enabled():
        return None
    moved = _boundary(x.shape, a, b)(x, F, 0, 0)
    return None if moved is None else moved[0]


@functools.lru_cache(1024)
def _held(n: int, value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # else it could not be saved for a backward pass later
        return torch.full((n,), value, dtype=dtype, device="cpu")


@functools.lru_cache(256)
def _boundary(shape: tuple[int, ...], a: float, b: float) -> prepared.Step:
    return prepared.boundary(shape, *(_held(shape[0], v, torch.float32) for v in (a, b)))
