"""The operators with validation: the only door to the arithmetic around the network.

Shapes: x, F, v ``[B, ...]`` of any rank >= 2 and dtype float; per-sample coefficients ``[B]``,
computed in float64 and applied in float32 (float64 where the tensors are float64). ``x`` may be
given in closed form, `Noised`, so that a low-precision copy of it never enters the arithmetic.
Wrong input raises ValueError or TypeError, naming the argument, before any device work.
"""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor

from fastcm.losses import Metric, PseudoHuber, SampleMetric
from fastcm.ops import gradients as gradients  # registers them
from fastcm.ops import native, reference, validation
from fastcm.ops.dispatch import Door, door
from fastcm.ops.normals import noising
from fastcm.ops.operands import flat, same_noise
from fastcm.ops.reference import Denoised, Noised
from fastcm.ops.registered import METRICS
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
    way = door(_data(x), F)
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
    if input_scale is not None:
        validation.check_coefficient("input_scale", input_scale, like)
        if input_dtype is None:
            raise ValueError("input_scale needs input_dtype, the dtype of the scaled result")
    way = door(_data(x), v, v_uncond)
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
        if input_dtype is None:
            return x_s
        return x_s, reference.scaled(x_s, input_scale, input_dtype)
    x_s, second = _fastcm.euler_step(
        *flat(x), v, dt, v_uncond, guidance, scale, input_scale, input_dtype
    )
    return x_s if input_dtype is None else (x_s, second)


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
) -> Tensor:
    """One multi-step sampler update alpha (a x + b F) + sigma z with fresh noise.

    Args:
        x, F: ``[B, ...]``.
        a, b: ``[B]``, denoiser coefficients at the present time.
        alpha, sigma: ``[B]``, the path at the next time.
        key, stream, first_sample: see `noise`.
        F_uncond, guidance: ``[B, ...]`` and ``[B]``; F_uncond + guidance (F - F_uncond) stands in
            for F.

    Returns:
        x at the next time, float32 (float64 if x or F is).

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
    way = door(x, F, F_uncond, noisy=True)
    if way is Door.KERNEL:
        out: Tensor = _fastcm.sampler_update(
            x, F, a, b, alpha, sigma, key.tensor, stream, first_sample, F_uncond, guidance
        )
        return out
    update = native.sampler_update if way is Door.NATIVE else reference.sampler_update
    return update(
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


def consistency_loss(
    F: Tensor,
    x_t: Tensor | Noised,
    a: Tensor,
    b: Tensor,
    target: Tensor | Noised | Denoised,
    *,
    metric: Metric = PseudoHuber(),
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted distance of the denoiser a x_t + b F from a target; gradient to F only.

    Args:
        F: student output ``[B, ...]``.
        x_t: ``[B, ...]`` or `Noised`.
        a, b: ``[B]``.
        target: ``[B, ...]``, or in closed form: `Noised` data, or the `Denoised` target network.
        metric: a metric of `fastcm.losses`, or any callable (f, target) -> ``[B]``.
        weight: ``[B]``; default 1.

    Returns:
        (mean, per_sample): scalar and ``[B]``.

    Raises:
        ValueError, TypeError: an argument of the wrong rank, shape, dtype or device; a metric
            that does not return ``[B]``.
    """
    return consistency_loss_and_gradient(F, x_t, a, b, target, metric=metric, weight=weight)[:2]


def consistency_loss_and_gradient(
    F: Tensor,
    x_t: Tensor | Noised,
    a: Tensor,
    b: Tensor,
    target: Tensor | Noised | Denoised,
    *,
    metric: Metric = PseudoHuber(),
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `consistency_loss`, with what a backward pass can begin with.

    Returns:
        (mean, per_sample, gradient): d mean / d F in the dtype of F where the implementation makes
        it along with the loss, else None. ``torch.autograd.backward(F, gradient)`` is then
        ``mean.backward()`` without a pass over the gradient.
    """
    validation.check_map("x_t", x_t, F, a, b)
    if isinstance(target, Denoised):
        validation.check_state("target.x", target.x, like=F)
        validation.check_like("target.F", target.F, F, "F")
        validation.check_coefficient("target.a", target.a, F)
        validation.check_coefficient("target.b", target.b, F)
    else:
        validation.check_state("target", target, like=F)
    if weight is not None:
        validation.check_coefficient("weight", weight, F)
    if not callable(metric):
        raise TypeError(
            f"metric must be callable (f, target) -> [B], got {validation.describe(metric)}"
        )
    source = target.x if isinstance(target, Denoised) else target
    target_F = target.F if isinstance(target, Denoised) else None
    fused = metric if isinstance(metric, SampleMetric) and type(metric) in METRICS else None
    way, gradient = door(F, _data(x_t), _data(source), target_F, differentiable=False), None
    if way is Door.REFERENCE or (way is Door.NATIVE and fused is None):
        _, losses = reference.consistency_loss(F, x_t, a, b, target, metric=metric, weight=weight)
    elif way is Door.NATIVE and fused is not None:
        losses, gradient = native.consistency_loss_and_gradient(
            F, x_t, a, b, target, metric=fused, weight=weight
        )
        if torch.is_grad_enabled() and F.requires_grad:
            losses = native.differentiable(F, losses, gradient)
    elif fused is not None:
        shared = isinstance(x_t, Noised) and isinstance(source, Noised) and same_noise(x_t, source)
        y, *noise_of_y = flat(source)
        target_map: tuple[Tensor | None, ...] = (None, None, None)
        if isinstance(target, Denoised):
            target_map = target.F.detach(), target.a, target.b
        losses, gradient = _fastcm.consistency_loss(
            F,
            *flat(x_t),
            a,
            b,
            None if shared else y,
            *noise_of_y,
            *target_map,
            weight,
            METRICS.index(type(fused)),
            fused.scale(math.prod(F.shape[1:])) if isinstance(fused, PseudoHuber) else 1.0,
        )
    else:
        losses = metric(boundary(_detach(x_t), F, a.detach(), b.detach()), _value(target))
        if weight is not None:
            losses = losses * weight.detach().to(losses.dtype)
    if losses.shape != F.shape[:1]:
        raise ValueError(
            f"metric must return one value per sample, [{F.shape[0]}], got {list(losses.shape)}"
        )
    return losses.mean(), losses, gradient


def _data(x: Tensor | Noised) -> Tensor:
    return x.x0 if isinstance(x, Noised) else x


def _detach(x: Tensor | Noised) -> Tensor | Noised:
    return x if isinstance(x, Noised) else x.detach()


@torch.no_grad()
def _value(target: Tensor | Noised | Denoised) -> Tensor:
    """The target as a tensor."""
    if isinstance(target, Denoised):
        return boundary(target.x, target.F, target.a, target.b)
    if isinstance(target, Noised):
        out = noising(
            target.x0,
            target.alpha,
            target.sigma,
            target.key,
            stream=target.stream,
            first_sample=target.first_sample,
            out_dtype=torch.float32,
        )
        assert isinstance(out, Tensor)
        return out
    return target.detach()
