"""The registered operators ``torch.ops.fastcm.*``: the launches of the Triton kernels.

Arguments are flat tensors and numbers, valid (`fastcm.ops` is the door that checks them), and
coefficients ``[B]``. `fastcm.ops.gradients` makes them differentiable, and
`fastcm.ops.decompositions` says what each computes in plain torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from fastcm import losses
from fastcm.ops.dispatch import HAS_KERNELS
from fastcm.ops.operands import coefficient, layout, optional, restored, state

if HAS_KERNELS:
    from fastcm.kernels import affine, launch, noising
    from fastcm.kernels import consistency_loss as loss_kernels

METRICS: tuple[type[losses.SampleMetric], ...] = (
    losses.SquaredL2,
    losses.L2,
    losses.L1,
    losses.PseudoHuber,
)
"""Metrics with a kernel, at the index by which it knows them."""


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a function that launches kernels, on the device of its first tensor."""

    def register(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def launched(*args: Any, **kwargs: Any) -> Any:
            first = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            with launch.device_of(first):
                return function(*args, **kwargs)

        return triton_op(f"fastcm::{name}", launched, mutates_args={})

    return register


@operator("noise")
def noise_op(
    shape: Sequence[int], key: Tensor, stream: int, first_sample: int, dtype: torch.dtype
) -> Tensor:
    """z."""
    out = torch.empty(shape, dtype=dtype, device=key.device)
    kernel = wrap_triton(noising.noising_kernel)
    noising.launch_noise(out, key, stream=stream, first_sample=first_sample, kernel=kernel)
    return out


@operator("uniform")
def uniform_op(count: int, key: Tensor, stream: int, first_sample: int) -> Tensor:
    """One number of (0, 1) for each sample, float64 ``[count]``."""
    out = torch.empty(count, dtype=torch.float64, device=key.device)
    kernel = wrap_triton(noising.uniform_kernel)
    noising.launch_uniform(out, key, stream=stream, first_sample=first_sample, kernel=kernel)
    return out


@operator("integers")
def integers_op(count: int, key: Tensor, stream: int, first_sample: int) -> Tensor:
    """One number of [0, 2^63) for each sample, int64 ``[count]``."""
    out = torch.empty(count, dtype=torch.int64, device=key.device)
    kernel = wrap_triton(noising.uniform_kernel)
    noising.launch_uniform(out, key, stream=stream, first_sample=first_sample, kernel=kernel)
    return out


@operator("noising")
def noising_op(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: Tensor,
    stream: int,
    first_sample: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """alpha x0 + sigma z."""
    x0 = x0.contiguous()
    out = torch.empty_like(x0, dtype=out_dtype)
    noising.launch_noising(
        x0,
        [(coefficient(alpha), coefficient(sigma))],
        key,
        out,
        stream=stream,
        first_sample=first_sample,
        kernel=wrap_triton(noising.noising_kernel),
    )
    return out


@operator("noising_pair")
def noising_pair_op(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    alpha2: Tensor,
    sigma2: Tensor,
    key: Tensor,
    stream: int,
    first_sample: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Two versions with one z."""
    x0 = x0.contiguous()
    first, second = (torch.empty_like(x0, dtype=out_dtype) for _ in range(2))
    noising.launch_noising(
        x0,
        [
            (coefficient(alpha), coefficient(sigma)),
            (coefficient(alpha2), coefficient(sigma2)),
        ],
        key,
        first,
        second,
        stream=stream,
        first_sample=first_sample,
        kernel=wrap_triton(noising.noising_kernel),
    )
    return first, second


@operator("boundary")
def boundary_op(
    x: Tensor,
    x_alpha: Tensor | None,
    x_sigma: Tensor | None,
    x_key: Tensor | None,
    x_stream: int,
    x_first_sample: int,
    F: Tensor,
    a: Tensor,
    b: Tensor,
) -> Tensor:
    """a x + b F."""
    kernel = wrap_triton(affine.boundary_kernel)
    if x_alpha is not None:
        F = F.contiguous()
        out = torch.empty_like(F, dtype=torch.float32)
        x_state = state(x, x_alpha, x_sigma, x_key, x_stream, x_first_sample)
        affine.launch_boundary(x_state, F, coefficient(a), coefficient(b), out, kernel=kernel)
        return out
    (x_, F_), back = layout(x, F)
    assert x_ is not None and F_ is not None
    out = torch.empty_like(F_, dtype=torch.float32)
    affine.launch_boundary(x_, F_, coefficient(a), coefficient(b), out, kernel=kernel)
    return restored(out, back)


@operator("scale")
def scale_op(g: Tensor, c: Tensor, out_dtype: torch.dtype) -> Tensor:
    """c g: the backward of the affine maps."""
    (g_,), back = layout(g)
    assert g_ is not None
    out = torch.empty_like(g_, dtype=out_dtype)
    affine.launch_scale(g_, coefficient(c), out, kernel=wrap_triton(affine.scale_kernel))
    return restored(out, back)


@operator("euler_step")
def euler_step_op(
    x: Tensor,
    x_alpha: Tensor | None,
    x_sigma: Tensor | None,
    x_key: Tensor | None,
    x_stream: int,
    x_first_sample: int,
    v: Tensor,
    dt: Tensor,
    v_uncond: Tensor | None,
    guidance: Tensor | None,
    scale: Tensor | None,
    input_scale: Tensor | None,
    input_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """x_s = scale x - dt (v_u + guidance (v - v_u)), and input_scale x_s in input_dtype.

    Without input_dtype the second result is empty.
    """
    x_state = state(x, x_alpha, x_sigma, x_key, x_stream, x_first_sample)
    v = v.contiguous()
    out = torch.empty_like(v, dtype=torch.float32)
    second = out.new_empty(0) if input_dtype is None else torch.empty_like(v, dtype=input_dtype)
    affine.launch_euler(
        x_state,
        v,
        coefficient(dt),
        out,
        v_uncond=None if v_uncond is None else v_uncond.contiguous(),
        guidance=optional(guidance),
        scale=optional(scale),
        scaled_out=None if input_dtype is None else second,
        out_scale=optional(input_scale),
        kernel=wrap_triton(affine.euler_kernel),
    )
    return out, second


@operator("sampler_update")
def sampler_update_op(
    x: Tensor,
    F: Tensor,
    a: Tensor,
    b: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: Tensor,
    stream: int,
    first_sample: int,
    F_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """alpha (a x + b (F_u + guidance (F - F_u))) + sigma z, and the network's input as euler_step.

    F_u None: F alone.
    """
    x, F = x.contiguous(), F.contiguous()
    out = torch.empty_like(x, dtype=torch.float32)
    second = out.new_empty(0) if input_dtype is None else torch.empty_like(x, dtype=input_dtype)
    affine.launch_sampler_update(
        x,
        F,
        coefficient(a),
        coefficient(b),
        coefficient(alpha),
        coefficient(sigma),
        key,
        out,
        stream=stream,
        first_sample=first_sample,
        F_uncond=None if F_uncond is None else F_uncond.contiguous(),
        guidance=optional(guidance),
        scaled_out=None if input_dtype is None else second,
        out_scale=optional(input_scale),
        kernel=wrap_triton(affine.sampler_update_kernel),
    )
    return out, second


@operator("consistency_loss")
def consistency_loss_op(
    F: Tensor,
    x: Tensor,
    x_alpha: Tensor | None,
    x_sigma: Tensor | None,
    x_key: Tensor | None,
    x_stream: int,
    x_first_sample: int,
    a: Tensor,
    b: Tensor,
    y: Tensor | None,
    y_alpha: Tensor | None,
    y_sigma: Tensor | None,
    y_key: Tensor | None,
    y_stream: int,
    y_first_sample: int,
    target_F: Tensor | None,
    target_a: Tensor | None,
    target_b: Tensor | None,
    weight: Tensor | None,
    metric: int,
    c: float,
) -> tuple[Tensor, Tensor]:
    """``[B]`` losses and d mean / d F; y None: another version of x's x0."""
    if y is None:
        y, y_key, y_stream, y_first_sample = x, x_key, x_stream, x_first_sample
        shared = True
    else:
        shared = False
    F = F.contiguous()
    x_state = state(x, x_alpha, x_sigma, x_key, x_stream, x_first_sample)
    y_state = state(x_state.x if shared else y, y_alpha, y_sigma, y_key, y_stream, y_first_sample)
    B, D = F.shape[0], math.prod(F.shape[1:])
    values = torch.empty(B, dtype=torch.float32, device=F.device)
    gradient = torch.empty_like(F)
    scratch = None
    if size := loss_kernels.loss_scratch_size(B, D):
        scratch = torch.empty(size, dtype=torch.float32, device=F.device)
    loss_kernels.launch_consistency_loss(
        F,
        x_state,
        coefficient(a),
        coefficient(b),
        y_state,
        None if target_F is None else target_F.contiguous(),
        optional(target_a),
        optional(target_b),
        optional(weight),
        values,
        gradient,
        metric=metric,
        c=c,
        gradient_scale=1.0 / max(B, 1),
        scratch=scratch,
        kernel=wrap_triton(loss_kernels.loss_kernel),
        partial_kernel=wrap_triton(loss_kernels.loss_partial_kernel),
        finish_kernel=wrap_triton(loss_kernels.loss_finish_kernel),
    )
    return values, gradient
