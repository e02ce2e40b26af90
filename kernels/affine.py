"""Per-sample affine maps: boundary, its backward, the Euler step and the sampler update.

Each is one pass. A state x may be a tensor or a closed form (`State`); arithmetic is float32 and
every output has its own dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastcm.kernels import launch
from fastcm.kernels.launch import LaunchConfig, columns, locate
from fastcm.kernels.noising import (
    Kernel,
    State,
    affine,
    as_state,
    coefficient,
    configure,
    load_state,
    load_unit,
    store,
)
from fastcm.kernels.philox import normals


@triton.jit(do_not_specialize=["x_stream", "x_first_sample"])
def boundary_kernel(
    x_ptr,
    x_alpha_ptr,
    x_sigma_ptr,
    x_key_ptr,
    x_stream,
    x_first_sample,
    F_ptr,
    a_ptr,
    b_ptr,
    out_ptr,
    D,
    X_NOISED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    FAST: tl.constexpr,
):
    sample, start, row = locate(tl.program_id(0), D, BLOCK)
    cols, mask = columns(start, D, BLOCK, VECTOR)
    F = load_unit(F_ptr, row + cols, mask)
    x = load_state(
        x_ptr, x_alpha_ptr, x_sigma_ptr, x_key_ptr, x_stream, x_first_sample,
        sample, row, start, D, X_NOISED, BLOCK, VECTOR, FAST,
    )  # fmt: skip
    store(out_ptr, row + cols, affine(a_ptr, x, b_ptr, F, sample), mask)


@triton.jit
def scale_kernel(
    g_ptr,
    c_ptr,
    c2_ptr,
    out_ptr,
    out2_ptr,
    D,
    PAIR: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    sample, start, row = locate(tl.program_id(0), D, BLOCK)
    cols, mask = columns(start, D, BLOCK, VECTOR)
    g = load_unit(g_ptr, row + cols, mask)
    store(out_ptr, row + cols, coefficient(c_ptr, sample) * g, mask)
    if PAIR:
        store(out2_ptr, row + cols, coefficient(c2_ptr, sample) * g, mask)


@triton.jit
def guided(F, F_uncond_ptr, guidance_ptr, sample, offsets, mask):
    """F_u + w (F - F_u)."""
    F_uncond = load_unit(F_uncond_ptr, offsets, mask)
    return tl.fma(coefficient(guidance_ptr, sample), F - F_uncond, F_uncond)


@triton.jit
def store_scaled(out_ptr, scale_ptr, offsets, value, sample, mask, RESCALED: tl.constexpr):
    """The next input of a network: a state, or scale times it."""
    if RESCALED:
        value = coefficient(scale_ptr, sample) * value
    store(out_ptr, offsets, value, mask)


@triton.jit(do_not_specialize=["x_stream", "x_first_sample"])
def euler_kernel(
    x_ptr,
    x_alpha_ptr,
    x_sigma_ptr,
    x_key_ptr,
    x_stream,
    x_first_sample,
    v_ptr,
    v_uncond_ptr,
    dt_ptr,
    guidance_ptr,
    scale_ptr,
    out_scale_ptr,
    out_ptr,
    scaled_ptr,
    D,
    X_NOISED: tl.constexpr,
    GUIDED: tl.constexpr,
    SCALED: tl.constexpr,
    PAIR: tl.constexpr,
    RESCALED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    FAST: tl.constexpr,
):
    sample, start, row = locate(tl.program_id(0), D, BLOCK)
    cols, mask = columns(start, D, BLOCK, VECTOR)
    # all loads come before the noise, whose arithmetic then hides their latency
    v = load_unit(v_ptr, row + cols, mask)
    if GUIDED:
        v = guided(v, v_uncond_ptr, guidance_ptr, sample, row + cols, mask)
    x = load_state(
        x_ptr, x_alpha_ptr, x_sigma_ptr, x_key_ptr, x_stream, x_first_sample,
        sample, row, start, D, X_NOISED, BLOCK, VECTOR, FAST,
    )  # fmt: skip
    if SCALED:
        x = coefficient(scale_ptr, sample) * x
    x_s = tl.fma(-coefficient(dt_ptr, sample), v, x)
    store(out_ptr, row + cols, x_s, mask)
    if PAIR:
        store_scaled(scaled_ptr, out_scale_ptr, row + cols, x_s, sample, mask, RESCALED)


@triton.jit(do_not_specialize=["noise_stream", "first_sample"])
def sampler_update_kernel(
    x_ptr,
    F_ptr,
    F_uncond_ptr,
    guidance_ptr,
    a_ptr,
    b_ptr,
    alpha_ptr,
    sigma_ptr,
    out_scale_ptr,
    key_ptr,
    out_ptr,
    scaled_ptr,
    noise_stream,
    first_sample,
    D,
    GUIDED: tl.constexpr,
    PAIR: tl.constexpr,
    RESCALED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    FAST: tl.constexpr,
):
    sample, start, row = locate(tl.program_id(0), D, BLOCK)
    cols, mask = columns(start, D, BLOCK, VECTOR)
    x = load_unit(x_ptr, row + cols, mask)
    F = load_unit(F_ptr, row + cols, mask)
    if GUIDED:
        F = guided(F, F_uncond_ptr, guidance_ptr, sample, row + cols, mask)
    z = normals(key_ptr, noise_stream, first_sample, sample, start, BLOCK, VECTOR, FAST)
    x_s = affine(alpha_ptr, affine(a_ptr, x, b_ptr, F, sample), sigma_ptr, z, sample)
    store(out_ptr, row + cols, x_s, mask)
    if PAIR:
        store_scaled(scaled_ptr, out_scale_ptr, row + cols, x_s, sample, mask, RESCALED)


def launch_boundary(
    x: Tensor | State,
    F: Tensor,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    config: LaunchConfig | None = None,
    kernel: Kernel = boundary_kernel,
) -> None:
    """a x + b F into `out`; a, b ``[B]``, the rest ``[B, ...]`` of any float dtype."""
    x = as_state(x)
    B, D = launch.extent(F, x.x, out)
    x.check(B)
    launch.check_coefficients(B, (a, b))
    if B == 0 or D == 0:
        return
    config, fast = configure(config, launch.pointwise, D, F, x.x, out)
    kernel[launch.grid(B, D, config)](
        *x.arguments(),
        F,
        a,
        b,
        out,
        D,
        X_NOISED=x.noised,
        BLOCK=config.BLOCK,
        VECTOR=config.VECTOR,
        FAST=fast,
        num_warps=config.num_warps,
    )


def launch_scale(
    g: Tensor,
    c: Tensor,
    out: Tensor,
    c2: Tensor | None = None,
    out2: Tensor | None = None,
    *,
    config: LaunchConfig | None = None,
    kernel: Kernel = scale_kernel,
) -> None:
    """c g into `out` and c2 g into `out2`: with b and a, the gradients of `launch_boundary`."""
    assert (c2 is None) == (out2 is None), "c2 and out2 go together"
    B, D = launch.extent(g, out, out2)
    launch.check_coefficients(B, (c, c2))
    if B == 0 or D == 0:
        return
    config, _ = configure(config, launch.pointwise, D, g, out, out2)
    kernel[launch.grid(B, D, config)](
        g,
        c,
        g if c2 is None else c2,
        out,
        g if out2 is None else out2,
        D,
        PAIR=out2 is not None,
        BLOCK=config.BLOCK,
        VECTOR=config.VECTOR,
        num_warps=config.num_warps,
    )


def launch_euler(
    x: Tensor | State,
    v: Tensor,
    dt: Tensor,
    out: Tensor,
    *,
    v_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    scale: Tensor | None = None,
    scaled_out: Tensor | None = None,
    out_scale: Tensor | None = None,
    config: LaunchConfig | None = None,
    kernel: Kernel = euler_kernel,
) -> None:
    """x_s = scale x - dt (v_u + guidance (v - v_u)) into `out`, out_scale x_s into `scaled_out`.

    Args:
        x: x_t ``[B, ...]``, a tensor or a `State`.
        v, v_uncond: ``[B, ...]``, any float dtype: the halves of one batched network output.
        dt, guidance, scale, out_scale: ``[B]``; guidance goes with v_uncond, out_scale
            with scaled_out, for which it is 1 if absent.
        out, scaled_out: ``[B, ...]``, each of its own float dtype.
    """
    assert (v_uncond is None) == (guidance is None), "v_uncond and guidance go together"
    assert scaled_out is not None or out_scale is None, "out_scale needs scaled_out"
    x = as_state(x)
    B, D = launch.extent(v, x.x, v_uncond, out, scaled_out)
    x.check(B)
    launch.check_coefficients(B, (dt, guidance, scale, out_scale))
    if B == 0 or D == 0:
        return
    config, fast = configure(config, launch.pointwise, D, v, x.x, v_uncond, out, scaled_out)
    kernel[launch.grid(B, D, config)](
        *x.arguments(),
        v,
        x.x if v_uncond is None else v_uncond,
        dt,
        x.x if guidance is None else guidance,
        x.x if scale is None else scale,
        x.x if out_scale is None else out_scale,
        out,
        x.x if scaled_out is None else scaled_out,
        D,
        X_NOISED=x.noised,
        GUIDED=v_uncond is not None,
        SCALED=scale is not None,
        PAIR=scaled_out is not None,
        RESCALED=out_scale is not None,
        BLOCK=config.BLOCK,
        VECTOR=config.VECTOR,
        FAST=fast,
        num_warps=config.num_warps,
    )


def launch_sampler_update(
    x: Tensor,
    F: Tensor,
    a: Tensor,
    b: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: Tensor,
    out: Tensor,
    *,
    stream: int,
    first_sample: int = 0,
    F_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    scaled_out: Tensor | None = None,
    out_scale: Tensor | None = None,
    config: LaunchConfig | None = None,
    kernel: Kernel = sampler_update_kernel,
) -> None:
    """alpha (a x + b (F_u + guidance (F - F_u))) + sigma z into `out`; without F_u, F alone.

    x, F, F_uncond and the results ``[B, ...]`` of any float dtype, coefficients ``[B]``, key int64
    ``[3]``; scaled_out and out_scale as in `launch_euler`.
    """
    assert (F_uncond is None) == (guidance is None), "F_uncond and guidance go together"
    assert scaled_out is not None or out_scale is None, "out_scale needs scaled_out"
    B, D = launch.extent(x, F, F_uncond, out, scaled_out)
    launch.check_coefficients(B, (a, b, alpha, sigma, guidance, out_scale))
    launch.check_key(key)
    if B == 0 or D == 0:
        return
    config, fast = configure(config, launch.pointwise, D, x, F, F_uncond, out, scaled_out)
    kernel[launch.grid(B, D, config)](
        x,
        F,
        x if F_uncond is None else F_uncond,
        x if guidance is None else guidance,
        a,
        b,
        alpha,
        sigma,
        x if out_scale is None else out_scale,
        key,
        out,
        x if scaled_out is None else scaled_out,
        stream,
        first_sample,
        D,
        GUIDED=F_uncond is not None,
        PAIR=scaled_out is not None,
        RESCALED=out_scale is not None,
        BLOCK=config.BLOCK,
        VECTOR=config.VECTOR,
        FAST=fast,
        num_warps=config.num_warps,
    )
