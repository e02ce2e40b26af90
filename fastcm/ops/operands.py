"""Operands of the registered operators: closed forms as flat arguments, and what kernels take.

Kernels take contiguous samples, and coefficients in float32 or float64. Other layouts are permuted
without a copy where all operands share one dense layout with the batch outermost (channels_last)
and no noise is made, whose elements are counted in logical order; else they are copied once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcm.ops.dispatch import HAS_KERNELS
from fastcm.ops.reference import Noised
from fastcm.rng import NoiseKey

if HAS_KERNELS:
    from fastcm.kernels.noising import State

_READ = (torch.float32, torch.float64)


def flat(x: Tensor | Noised) -> tuple[Any, ...]:
    """A tensor or closed form as the operators take it."""
    if isinstance(x, Noised):
        return x.x0, x.alpha, x.sigma, x.key.tensor, x.stream, x.first_sample
    return x, None, None, None, 0, 0


def closed(
    x: Tensor,
    alpha: Tensor | None,
    sigma: Tensor | None,
    key: Tensor | None,
    stream: int,
    first_sample: int,
) -> Tensor | Noised:
    """The inverse of `flat`."""
    if alpha is None or sigma is None or key is None:
        return x
    return Noised(x, alpha, sigma, NoiseKey.wrap(key), stream, first_sample)


def same_noise(x: Noised, y: Noised) -> bool:
    """Whether both are versions of one x0 under one z, made once then; compared by identity."""
    return (
        x.x0 is y.x0
        and x.key.tensor is y.key.tensor
        and (x.stream, x.first_sample) == (y.stream, y.first_sample)
    )


def coefficient(value: Tensor) -> Tensor:
    """In a dtype that kernels and native code read, which round it to float32 themselves."""
    return (value if value.dtype in _READ else value.float()).contiguous()


def optional(value: Tensor | None) -> Tensor | None:
    return None if value is None else coefficient(value)


def state(
    x: Tensor,
    alpha: Tensor | None,
    sigma: Tensor | None,
    key: Tensor | None,
    stream: int,
    first_sample: int,
) -> State:
    """The flat arguments of a closed form as the kernels take it."""
    return State(x.contiguous(), optional(alpha), optional(sigma), key, stream, first_sample)


def layout(*tensors: Tensor | None) -> tuple[list[Tensor | None], list[int] | None]:
    """Contiguous views or copies of `tensors`, and the permutation that leads back, if any.

    One dense layout with the batch outermost, shared by all, is permuted; else it is copied.
    """
    for t in tensors:
        if t is not None and not t.is_contiguous():
            break
    else:
        return list(tensors), None
    first = next(t for t in tensors if t is not None)
    strides = first.stride()
    order = sorted(range(first.dim()), key=lambda i: (-strides[i], i))
    views = [None if t is None else t.permute(order) for t in tensors]
    if order[0] != 0 or not all(v is None or v.is_contiguous() for v in views):
        return [None if t is None else t.contiguous() for t in tensors], None
    return views, sorted(range(first.dim()), key=order.__getitem__)


def restored(out: Tensor, back: list[int] | None) -> Tensor:
    """A result in the layout of its operands; see `layout`."""
    return out if back is None else out.permute(back)
