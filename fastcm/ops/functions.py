"""The affine maps with validation: the only door to the arithmetic around the network.

Shapes: x, F, v ``[B, ...]`` of any rank >= 2 and dtype float; per-sample coefficients ``[B]``,
computed in float64 and applied in float32 (float64 where the tensors are float64). ``x`` may be
given in closed form, `Noised`, so that a low-precision copy of it never enters the arithmetic.
Wrong input raises ValueError or TypeError, naming the argument, before any device work.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from fastcm.ops import gradients as gradients  # registers them
from fastcm.ops import native, reference, validation
from fastcm.ops.dispatch import Door, door
from fastcm.ops.operands import flat
from fastcm.ops.reference import Noised
from fastcm.rng import NoiseKey

_fastcm = torch.ops.fastcm


def boundary(x: Tensor | Noised, F: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The denoiser a x + b F, differentiable in x and F.

    Args:
        x: ``[B, ...]`` or `Noised`.
        F: network output, the shape of x.
        a, b: ``[B]``, from `Parameterization.coefficients`.

    Returns:
        f ``[B, ...]``, float32 (float64 if x or F is).

    Raises:
        ValueError, TypeError: an argument of the wrong rank, shape, dtype or device.
    """
    validation.check_map("x", x, F, a, b)
    way = door(data_of(x), F)
    if way is Door.NATIVE:
        return native.boundary(x, F, a, b)
    if way is Door.REFERENCE:
        return reference.boundary(x, F, a, b)
    out: Tensor = _fastcm.boundary(*flat(x), F, a, b)
    return out


@overload
def euler_step(
    x: Tensor | Noised,
    v: Tensor,
    dt: Tensor,
    *,
    v_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    scale: Tensor | None = None,
    input_scale: None = None,
    input_dtype: None = None,
) -> Tensor: ...
@overload
def euler_step(
    x: Tensor | Noised,
    v: Tensor,
    dt: Tensor,
    *,
    v_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    scale: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]: ...
def euler_step(
    x: Tensor | Noised,
    v: Tensor,
    dt: Tensor,
    *,
    v_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    scale: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """An Euler step towards the data, scale x - dt (v_uncond + guidance (v - v_uncond)).

    Args:
        x: x_t ``[B, ...]`` or `Noised`.
        v: velocity, or a raw network output F with velocity c x + d F: then dt times d is `dt`
            and 1 - dt c is `scale`.
        dt: ``[B]``, t - s > 0.
        v_uncond, guidance: unconditional velocity and guidance weight ``[B]``; both or none.
        scale: ``[B]``; default 1.
        input_scale, input_dtype: ask for the network's input at s too, input_scale x_s (``[B]``,
            default 1) in input_dtype, written in the same pass.

    Returns:
        x_s ``[B, ...]``, float32 (float64 if an input is), or the pair (x_s, network input).

    Raises:
        ValueError, TypeError: an argument of the wrong rank, shape, dtype or device; one of
            v_uncond and guidance without the other.

    Source: seed eq. 8; classifier-free guidance, Ho & Salimans 2022.
    """
    like = validation.check_state("x", x)
    validation.check_like("v", v, like, "x")
    validation.check_coefficient("dt", dt, like)
    validation.check_guidance("v_uncond", v_uncond, guidance, like)
    if scale is not None:
        validation.check_coefficient("scale", scale, like)
    _check_input(input_scale, input_dtype, like)
    way = door(data_of(x), v, v_uncond)
    if way is Door.NATIVE:
        x_s, second = native.euler_step(
            x,
            v,
            dt,
            v_uncond=v_uncond,
            guidance=guidance,
            scale=scale,
            input_scale=input_scale,
            input_dtype=input_dtype,
        )
        return x_s if second is None else (x_s, second)
    if way is Door.REFERENCE:
        x_s = reference.euler_step(x, v, dt, v_uncond=v_uncond, guidance=guidance, scale=scale)
        return _with_input(x_s, input_scale, input_dtype)
    x_s, second = _fastcm.euler_step(
        *flat(x), v, dt, v_uncond, guidance, scale, input_scale, input_dtype
    )
    return x_s if input_dtype is None else (x_s, second)


@overload
def sampler_update(
    x: Tensor,
    F: Tensor,
    a: Tensor,
    b: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: NoiseKey,
    *,
    stream: int,
    first_sample: int = 0,
    F_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    input_scale: None = None,
    input_dtype: None = None,
) -> Tensor: ...
@overload
def sampler_update(
    x: Tensor,
    F: Tensor,
    a: Tensor,
    b: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: NoiseKey,
    *,
    stream: int,
    first_sample: int = 0,
    F_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]: ...
def sampler_update(
    x: Tensor,
    F: Tensor,
    a: Tensor,
    b: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: NoiseKey,
    *,
    stream: int,
    first_sample: int = 0,
    F_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One multi-step sampler update alpha (a x + b F) + sigma z with fresh noise.

    Args:
        x, F: ``[B, ...]``.
        a, b: ``[B]``, denoiser coefficients at the present time.
        alpha, sigma: ``[B]``, the path at the next time.
        key, stream, first_sample: see `noise`.
        F_uncond, guidance: ``[B, ...]`` and ``[B]``; F_uncond + guidance (F - F_uncond) stands in
            for F.
        input_scale, input_dtype: ask for the network's input at the next time too; see
            `euler_step`.

    Returns:
        x at the next time, float32 (float64 if x or F is), or the pair (x, network input).

    Raises:
        ValueError, TypeError: an argument of the wrong rank, shape, dtype or device.

    Source: seed eq. 11; Song et al. 2023, algorithm 1.
    """
    x = validation.check_samples("x", x)
    validation.check_map("x", x, F, a, b)
    validation.check_coefficient("alpha", alpha, x)
    validation.check_coefficient("sigma", sigma, x)
    validation.check_noise(key, stream, first_sample, x.device)
    validation.check_guidance("F_uncond", F_uncond, guidance, x)
    _check_input(input_scale, input_dtype, x)
    way = door(x, F, F_uncond, noisy=True)
    if way is Door.REFERENCE:
        out = reference.sampler_update(
            x,
            F,
            a,
            b,
            alpha,
            sigma,
            key,
            stream=stream,
            first_sample=first_sample,
            F_uncond=F_uncond,
            guidance=guidance,
        )
        return _with_input(out, input_scale, input_dtype)
    update = native.sampler_update if way is Door.NATIVE else _fastcm.sampler_update
    out, second = update(
        x,
        F,
        a,
        b,
        alpha,
        sigma,
        key.tensor,
        stream,
        first_sample,
        F_uncond,
        guidance,
        input_scale,
        input_dtype,
    )
    return out if input_dtype is None else (out, second)


def _check_input(scale: Tensor | None, dtype: torch.dtype | None, like: Tensor) -> None:
    if scale is None:
        return
    validation.check_coefficient("input_scale", scale, like)
    if dtype is None:
        raise ValueError("input_scale needs input_dtype, the dtype of the scaled result")


def _with_input(
    x: Tensor, scale: Tensor | None, dtype: torch.dtype | None
) -> Tensor | tuple[Tensor, Tensor]:
    return x if dtype is None else (x, reference.scaled(x, scale, dtype))


def data_of(x: Tensor | Noised) -> Tensor:
    """A tensor, or the data of a closed form."""
    return x.x0 if isinstance(x, Noised) else x
