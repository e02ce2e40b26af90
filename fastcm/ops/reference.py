"""Every operation in plain, dtype-generic torch: the specification.

It is the CPU path, the oracle of the tests and the baseline of the benchmarks. Arithmetic is
float32, or float64 where an input is float64; per-sample coefficients are ``[B]``. Inputs are
taken as valid: `fastcm.ops` validates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcm import rng
from fastcm.losses import Metric, SampleMetric
from fastcm.rng import NoiseKey


@dataclass(frozen=True)
class Noised:
    """alpha x0 + sigma z in closed form: regenerated in float32 where it is used, never stored.

    Args:
        x0: ``[B, ...]``, uint8 (meaning x / 127.5 - 1) or float.
        alpha, sigma: ``[B]``.
        key: the noise is ``noise(x0.shape, key, stream=stream, first_sample=first_sample)``.
    """

    x0: Tensor
    alpha: Tensor
    sigma: Tensor
    key: NoiseKey
    stream: int = rng.NOISE
    first_sample: int = 0


@dataclass(frozen=True)
class Denoised:
    """a x + b F in closed form, with x a tensor or itself `Noised`."""

    x: Tensor | Noised
    F: Tensor
    a: Tensor
    b: Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of the arithmetic on `tensors`: float64 if one of them is, else float32."""
    for t in tensors:
        if t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def lift(coefficient: Tensor, x: Tensor) -> Tensor:
    """A ``[B]`` coefficient in the dtype of `x`, shaped to broadcast against it."""
    return coefficient.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))


def to_unit(x0: Tensor, dtype: torch.dtype) -> Tensor:
    """Data in `dtype`; uint8 is mapped from 0..255 to -1..1."""
    return x0.to(dtype) / 127.5 - 1.0 if x0.dtype == torch.uint8 else x0.to(dtype)


def noise(
    shape: Sequence[int],
    key: NoiseKey,
    *,
    stream: int,
    first_sample: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normals ``[B, ...]`` of the bit contract."""
    samples, elements = shape[0], 1
    for size in shape[1:]:
        elements *= size
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    quad = rng.uniforms(samples, (elements + 3) // 4, key.tensor, stream, first_sample)
    return rng.normals(quad, compute)[:, :elements].reshape(tuple(shape)).to(dtype)


def noising(
    x0: Tensor,
    alpha: Sequence[Tensor] | Tensor,
    sigma: Sequence[Tensor] | Tensor,
    key: NoiseKey,
    *,
    stream: int,
    first_sample: int = 0,
    out_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """alpha x0 + sigma z for each row of ``alpha, sigma [K, B]``, all with the same z."""
    dtype = torch.float64 if out_dtype == torch.float64 else compute_dtype(x0)
    x0 = to_unit(x0, dtype)
    z = noise(
        x0.shape,
        key,
        stream=stream,
        first_sample=first_sample,
        dtype=dtype,
    )
    return tuple((lift(a, x0) * x0 + lift(s, x0) * z).to(out_dtype) for a, s in zip(alpha, sigma))


def regenerate(x: Tensor | Noised | Denoised, dtype: torch.dtype) -> Tensor:
    """`x` as a tensor of `dtype`, made from its closed form if it is one."""
    if isinstance(x, Tensor):
        return x.to(dtype)
    if isinstance(x, Denoised):
        return boundary(x.x, x.F, x.a, x.b).to(dtype)
    return noising(
        x.x0,
        x.alpha[None],
        x.sigma[None],
        x.key,
        stream=x.stream,
        first_sample=x.first_sample,
        out_dtype=dtype,
    )[0]


def guided(
    F: Tensor, F_uncond: Tensor | None, guidance: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """F_u + guidance (F - F_u) in `dtype`; F alone without F_u."""
    F = F.to(dtype)
    if F_uncond is None or guidance is None:
        return F
    F_u = F_uncond.to(dtype)
    return F_u + lift(guidance, F) * (F - F_u)


def boundary(x: Tensor | Noised, F: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a x + b F."""
    dtype = compute_dtype(F, x if isinstance(x, Tensor) else x.x0)
    x, F = regenerate(x, dtype), F.to(dtype)
    return lift(a, x) * x + lift(b, x) * F


def euler_step(
    x: Tensor | Noised,
    v: Tensor,
    dt: Tensor,
    *,
    v_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """scale x - dt (v_u + guidance (v - v_u))."""
    dtype = compute_dtype(v, x if isinstance(x, Tensor) else x.x0)
    x, v = regenerate(x, dtype), guided(v, v_uncond, guidance, dtype)
    if scale is not None:
        x = lift(scale, x) * x
    return x - lift(dt, x) * v


def scaled(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scale x in `dtype`."""
    return (x if scale is None else lift(scale, x) * x).to(dtype)


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
    """alpha (a x + b (F_u + guidance (F - F_u))) + sigma z."""
    f = boundary(x, guided(F, F_uncond, guidance, compute_dtype(x, F)), a, b)
    z = noise(
        f.shape,
        key,
        stream=stream,
        first_sample=first_sample,
        dtype=f.dtype,
    )
    return lift(alpha, f) * f + lift(sigma, f) * z


def consistency_loss(
    F: Tensor,
    x_t: Tensor | Noised,
    a: Tensor,
    b: Tensor,
    target: Tensor | Noised | Denoised,
    *,
    metric: Metric,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """weight metric(a x_t + b F, target): its mean and the ``[B]`` values; gradient to F only."""
    dtype = compute_dtype(F)
    with torch.no_grad():
        x, y = regenerate(x_t, dtype).detach(), regenerate(target, dtype).detach()
        a, b = lift(a, x), lift(b, x)
    losses = metric(a * x + b * F.to(dtype), y)
    if weight is not None:
        losses = losses * weight.detach().to(dtype)
    return losses.mean(), losses


def consistency_loss_and_gradient(
    F: Tensor,
    x_t: Tensor | Noised,
    a: Tensor,
    b: Tensor,
    target: Tensor | Noised | Denoised,
    *,
    metric: SampleMetric,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``[B]`` values of `consistency_loss`, and d mean / d F in the dtype of F."""
    dtype = compute_dtype(F)
    x, y = regenerate(x_t, dtype), regenerate(target, dtype)
    r = lift(a, x) * x + lift(b, x) * F.to(dtype) - y
    losses, slope = metric.value(r), lift(b, r) * metric.gradient(r)
    if weight is not None:
        losses, slope = losses * weight.to(dtype), lift(weight, r) * slope
    return losses, (slope / max(F.shape[0], 1)).to(F.dtype)


ROW = 8
"""Scalars of a parameter in one step: w1, w2, decay, size, a, b, l2 and one unused."""


def adam_rows(hyper: Tensor, step: Tensor, *, radam: bool = False) -> Tensor:
    """The scalars of `adam_ema_`, so that AdamW and RAdam differ in nothing else.

    Args:
        hyper: float64 ``[n, 6]``: lr, beta1, beta2, eps, decoupled weight decay, L2 weight decay.
        step: ``[n]``, >= 1: updates of each parameter, this one included.
        radam: rectify the variance instead of correcting its bias.

    Returns:
        float64 ``[n, 8]``.

    Source: Loshchilov and Hutter 2019 (AdamW); Liu et al. 2020 (RAdam).
    """
    lr, beta1, beta2, eps, decoupled, l2 = hyper.unbind(1)
    k = step.double()
    c1, c2 = 1 - beta1**k, 1 - beta2**k
    size, a, b = lr / c1, c2.rsqrt(), eps
    if radam:
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * k * beta2**k / c2
        rectified = rho > 5
        square = c2 * (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
        size = size * torch.where(rectified, square, torch.ones_like(square)).sqrt()
        a = rectified.double()
        b = torch.where(rectified, eps, torch.ones_like(eps))
    decay = lr * decoupled
    return torch.stack([1 - beta1, 1 - beta2, decay, size, a, b, l2, torch.zeros_like(lr)], 1)


def adam_ema_(
    x: Tensor,
    gradient: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    averages: Sequence[Tensor],
    row: Tensor,
    clip: Tensor | float,
    rates: Tensor,
) -> None:
    """One sweep over a parameter: clip, AdamW or RAdam, then every average, in place.

    Args:
        x: the parameter, or the master copy of one of low precision.
        gradient: like x; None leaves parameter and moments, and moves the averages.
        exp_avg, exp_avg_sq, averages: like x.
        row: ``[8]``, see `adam_rows`.
        clip: factor on the gradient.
        rates: ``[len(averages)]``, 1 - decay.
    """
    if gradient is not None:
        w1, w2, decay, size, a, b, l2, _ = row.to(x.dtype).unbind()
        d = gradient.to(x.dtype) * clip + l2 * x
        exp_avg += w1 * (d - exp_avg)
        exp_avg_sq += w2 * (d * d - exp_avg_sq)
        x -= decay * x + size * exp_avg / (exp_avg_sq.sqrt() * a + b)
    for average, rate in zip(averages, rates):
        average += rate.to(x.dtype) * (x - average)
