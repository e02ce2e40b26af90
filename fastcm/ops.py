"""The operators with validation: the only door to the arithmetic around the network.

Shapes: x, F, v ``[B, ...]`` of any rank >= 2 and dtype float; per-sample coefficients ``[B]``,
computed in float64 and applied in float32 (float64 where the tensors are float64). ``x`` may be
given in closed form, `Noised`, so that a low-precision copy of it never enters the arithmetic.
Wrong input raises ValueError or TypeError, naming the argument, before any device work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from fastcm import dispatch, operators, reference, rng, validation
from fastcm import gradients as gradients  # registers them
from fastcm.dispatch import flat, same_noise
from fastcm.losses import Metric, PseudoHuber, SampleMetric
from fastcm.reference import Denoised as Denoised
from fastcm.reference import Noised as Noised
from fastcm.rng import NoiseKey

_fastcm = torch.ops.fastcm


def noise(
    shape: Sequence[int],
    key: NoiseKey,
    *,
    stream: int,
    first_sample: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normals that depend only on (seed, step, stream, sample index, element).

    Args:
        shape: ``[B, ...]``, rank >= 2.
        key: seed, step and first sample.
        stream: 0 <= stream < 256, a constant of `fastcm.rng`.
        first_sample: added to the key's; the index of row 0 in the global batch.
        dtype: a float dtype; float64 evaluates the same noise to float64 accuracy.
        device: default the key's.

    Returns:
        A tensor of `shape` and `dtype`.

    Raises:
        ValueError, TypeError: rank < 2, wrong dtype, stream or first_sample out of range.

    Source: Philox4x32-10, Salmon et al. 2011; Box-Muller.
    """
    if len(shape) < 2 or any(size < 0 for size in shape):
        raise ValueError(f"shape must be [B, ...] of rank >= 2, got {tuple(shape)}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a float dtype, got {dtype}")
    if device is not None:
        key = key.to(device)
    validation.check_noise(key, stream, first_sample, key.device)
    if dispatch.on_kernel(key.tensor) and dtype != torch.float64:
        nothing = torch.zeros(tuple(shape), dtype=torch.uint8, device=key.device)
        zero = torch.zeros(shape[0], device=key.device)
        return _noising(nothing, zero, zero + 1.0, key, stream, first_sample, dtype)
    return reference.noise(
        shape,
        key,
        stream=stream,
        first_sample=first_sample,
        dtype=dtype,
        uniforms=dispatch.uniforms,
    )


def _noising(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: NoiseKey,
    stream: int,
    first_sample: int,
    dtype: torch.dtype,
) -> Tensor:
    out: Tensor = _fastcm.noising(x0, alpha, sigma, key.tensor, stream, first_sample, dtype)
    return out


def noising(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: NoiseKey,
    *,
    stream: int = rng.NOISE,
    first_sample: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Noisy data alpha x0 + sigma z, once or twice with the same z.

    Args:
        x0: data ``[B, ...]``; uint8 stands for x / 127.5 - 1.
        alpha, sigma: ``[B]`` for one result, ``[2, B]`` for two.
        key, stream, first_sample: see `noise`.
        out_dtype: float dtype of the result; default that of `x0`, float32 for uint8.

    Returns:
        x_t ``[B, ...]``, or the pair (x_t, x_s).

    Raises:
        ValueError, TypeError: an argument of the wrong rank, shape, dtype or device.
    """
    x0 = validation.check_samples("x0", x0, allow_uint8=True)
    for name, value in (("alpha", alpha), ("sigma", sigma)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a tensor [B] or [2, B], got {validation.describe(value)}"
            )
        if (value.dim() == 2 and value.shape[0] != 2) or value.dim() not in (1, 2):
            raise ValueError(
                f"{name} must have shape [{x0.shape[0]}] or [2, {x0.shape[0]}], "
                f"got {validation.describe(value)}"
            )
        validation.check_coefficient(name, value if value.dim() == 1 else value[0], x0)
    if alpha.shape != sigma.shape:
        raise ValueError(
            f"alpha and sigma must have the same shape, got {list(alpha.shape)} "
            f"and {list(sigma.shape)}"
        )
    validation.check_noise(key, stream, first_sample, x0.device)
    if out_dtype is None:
        out_dtype = x0.dtype if x0.is_floating_point() else torch.float32
    if not out_dtype.is_floating_point:
        raise TypeError(f"out_dtype must be a float dtype, got {out_dtype}")
    if alpha.dim() == 1:
        return _noising(x0, alpha, sigma, key, stream, first_sample, out_dtype)
    first, second = _fastcm.noising_pair(
        x0, alpha, sigma, key.tensor, stream, first_sample, out_dtype
    )
    return first, second


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
    if dispatch.is_plain(F):
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
    if (v_uncond is None) != (guidance is None):
        raise ValueError("v_uncond and guidance go together: give both or none")
    if v_uncond is not None:
        validation.check_like("v_uncond", v_uncond, like, "x")
        validation.check_coefficient("guidance", guidance, like)
    if scale is not None:
        validation.check_coefficient("scale", scale, like)
    if input_scale is not None:
        validation.check_coefficient("input_scale", input_scale, like)
        if input_dtype is None:
            raise ValueError("input_scale needs input_dtype, the dtype of the scaled result")
    if input_dtype is None and dispatch.is_plain(v):
        return reference.euler_step(x, v, dt, v_uncond=v_uncond, guidance=guidance, scale=scale)
    x_s, scaled = _fastcm.euler_step(
        *flat(x), v, dt, v_uncond, guidance, scale, input_scale, input_dtype
    )
    return x_s if input_dtype is None else (x_s, scaled)


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
) -> Tensor:
    """One multi-step sampler update alpha (a x + b F) + sigma z with fresh noise.

    Args:
        x, F: ``[B, ...]``.
        a, b: ``[B]``, denoiser coefficients at the present time.
        alpha, sigma: ``[B]``, the path at the next time.
        key, stream, first_sample: see `noise`.

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
    if dispatch.is_plain(x, F):
        return reference.sampler_update(
            x,
            F,
            a,
            b,
            alpha,
            sigma,
            key,
            stream=stream,
            first_sample=first_sample,
            uniforms=dispatch.uniforms,
        )
    out: Tensor = _fastcm.sampler_update(x, F, a, b, alpha, sigma, key.tensor, stream, first_sample)
    return out


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
    if not dispatch.on_kernel(F):
        # without a kernel, autograd's own backward is cheaper than a gradient stored on the way
        _, losses = reference.consistency_loss(F, x_t, a, b, target, metric=metric, weight=weight)
    elif isinstance(metric, operators.METRICS):
        losses = _loss(F, x_t, a, b, target, metric, weight)
    else:
        losses = metric(boundary(_detach(x_t), F, a.detach(), b.detach()), _value(target))
        if weight is not None:
            losses = losses * weight.detach().to(losses.dtype)
    if losses.shape != F.shape[:1]:
        raise ValueError(
            f"metric must return one value per sample, [{F.shape[0]}], got {list(losses.shape)}"
        )
    return losses.mean(), losses


def _loss(
    F: Tensor,
    x_t: Tensor | Noised,
    a: Tensor,
    b: Tensor,
    target: Tensor | Noised | Denoised,
    metric: SampleMetric,
    weight: Tensor | None,
) -> Tensor:
    source: Tensor | Noised
    target_map: tuple[Tensor | None, ...] = (None, None, None)
    if isinstance(target, Denoised):
        source = target.x
        target_map = target.F.detach(), target.a, target.b
    else:
        source = target
    shared = isinstance(x_t, Noised) and isinstance(source, Noised) and same_noise(x_t, source)
    y, *noise_of_y = flat(source)
    c = metric.scale(math.prod(F.shape[1:])) if isinstance(metric, PseudoHuber) else 1.0
    losses, _ = _fastcm.consistency_loss(
        F,
        *flat(x_t),
        a,
        b,
        None if shared else y,
        *noise_of_y,
        *target_map,
        weight,
        operators.METRICS.index(type(metric)),
        c,
    )
    out: Tensor = losses
    return out


def _detach(x: Tensor | Noised) -> Tensor | Noised:
    return x if isinstance(x, Noised) else x.detach()


@torch.no_grad()
def _value(target: Tensor | Noised | Denoised) -> Tensor:
    if isinstance(target, Denoised):
        return boundary(target.x, target.F, target.a, target.b)
    if isinstance(target, Noised):
        dtype = reference.compute_dtype(target.x0)
        x0, alpha, sigma = target.x0, target.alpha, target.sigma
        return _noising(x0, alpha, sigma, target.key, target.stream, target.first_sample, dtype)
    return target.detach()
