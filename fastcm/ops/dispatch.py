"""Where the implementation of an operator is chosen, and its operands prepared.

Kernels take contiguous samples and float32 coefficients. Other layouts are permuted without a copy
where all operands share one dense layout with the batch outermost (channels_last) and no noise is
made, whose elements are counted in logical order; else they are copied once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcm import rng
from fastcm.kernels import native
from fastcm.ops.reference import Noised
from fastcm.rng import NoiseKey

try:
    from fastcm.kernels.noising import State

    HAS_KERNELS = True
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "triton":
        raise
    HAS_KERNELS = False


_library = torch.library.Library("fastcm", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "uniforms(int samples, int quads, Tensor key, int stream, int first_sample) -> Tensor"
)
_library.impl("uniforms", native.uniforms, "CPU")  # type: ignore[no-untyped-call]


def same_noise(x: Noised, y: Noised) -> bool:
    """Whether both are versions of one x0 under one z, made once then; compared by identity."""
    return (
        x.x0 is y.x0
        and x.key.tensor is y.key.tensor
        and (x.stream, x.first_sample) == (y.stream, y.first_sample)
    )


def flat(x: Tensor | Noised) -> tuple[Any, ...]:
    """A tensor or closed form as the operators take it."""
    if isinstance(x, Noised):
        return x.x0, x.alpha, x.sigma, x.key.tensor, x.stream, x.first_sample
    return x, None, None, None, 0, 0


def on_kernel(*tensors: Tensor | None) -> bool:
    """Whether these tensors go to the kernels: on a GPU, and none in float64."""
    present = [t for t in tensors if t is not None]
    return HAS_KERNELS and all(t.is_cuda and t.dtype != torch.float64 for t in present)


def uniforms(
    samples: int, quads: int, state: Tensor, stream: int, first_sample: int = 0
) -> tuple[Tensor, Tensor]:
    """`fastcm.rng.uniforms`, in eager code on a CPU by the C++ kernel, which gives the same bits.

    Code that is traced or compiled keeps the plain operations, which the compiler fuses.
    """
    traced = torch.compiler.is_compiling() or type(state) is not Tensor
    if traced or state.device.type != "cpu" or not native.has_uniforms():
        return rng.uniforms(samples, quads, state, stream, first_sample)
    out: Tensor = torch.ops.fastcm.uniforms(samples, quads, state, stream, first_sample)
    return out[0], out[1]


def is_plain(*tensors: Tensor) -> bool:
    """Whether to call the reference without the operator around it: no gradient, kernel or tracer.

    An operator costs as much as the arithmetic on a small batch.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return all(type(t) is Tensor and t.device.type == "cpu" for t in tensors)


def f32(value: Tensor) -> Tensor:
    return value.to(torch.float32).contiguous()


def coefficient(value: Tensor | None) -> Tensor | None:
    return None if value is None else f32(value)


def layout(*tensors: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
    """Contiguous views or copies of `tensors`, and the permutation that leads back.

    One dense layout with the batch outermost, shared by all, is permuted; else it is copied.
    """
    first = next(t for t in tensors if t is not None)
    strides = first.stride()
    order = sorted(range(first.dim()), key=lambda i: (-strides[i], i))
    views = [None if t is None else t.permute(order) for t in tensors]
    if order[0] != 0 or not all(v is None or v.is_contiguous() for v in views):
        order = list(range(first.dim()))
        views = [None if t is None else t.contiguous() for t in tensors]
    back = sorted(range(first.dim()), key=order.__getitem__)
    return views, back


def state(
    x: Tensor,
    alpha: Tensor | None,
    sigma: Tensor | None,
    key: Tensor | None,
    stream: int,
    first_sample: int,
) -> State:
    return State(x.contiguous(), coefficient(alpha), coefficient(sigma), key, stream, first_sample)


def closed(
    x: Tensor,
    alpha: Tensor | None,
    sigma: Tensor | None,
    key: Tensor | None,
    stream: int,
    first_sample: int,
) -> Tensor | Noised:
    if alpha is None or sigma is None or key is None:
        return x
    return Noised(x, alpha, sigma, NoiseKey.wrap(key), stream, first_sample)
