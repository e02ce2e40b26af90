"""The operators with validation: the only door to the arithmetic around the network.

Shapes: x, F, v ``[B, ...]`` of any rank >= 2 and dtype float; per-sample coefficients ``[B]``,
computed in float64 and applied in float32 (float64 where the tensors are float64). ``x`` may be
given in closed form, `Noised`, so that a low-precision copy of it never enters the arithmetic.
Wrong input raises ValueError or TypeError, naming the argument, before any device work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcm import reference, rng
from fastcm.losses import Metric, PseudoHuber
from fastcm.reference import Denoised as Denoised
from fastcm.reference import Noised as Noised
from fastcm.rng import NoiseKey


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r:.80}"


def _check_samples(name: str, x: object, *, allow_uint8: bool = False) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor [B, ...], got {_describe(x)}")
    if x.dim() < 2:
        raise ValueError(f"{name} must have shape [B, ...] of rank >= 2, got {_describe(x)}")
    if not (x.is_floating_point() or (allow_uint8 and x.dtype == torch.uint8)):
        wanted = "float or uint8" if allow_uint8 else "float"
        raise TypeError(f"{name} must be of a {wanted} dtype, got {_describe(x)}")
    return x


def _check_like(name: str, value: object, x: Tensor, x_name: str) -> None:
    tensor = _check_samples(name, value)
    if tensor.shape != x.shape or tensor.device != x.device:
        raise ValueError(
            f"{name} must have the shape and device of {x_name}, {_describe(x)}, "
            f"got {_describe(value)}"
        )


def _check_coefficient(name: str, value: object, x: Tensor) -> None:
    wanted = f"{name} must be a float tensor [{x.shape[0]}] (one per sample) on {x.device}"
    if not isinstance(value, Tensor):
        raise TypeError(f"{wanted}, got {_describe(value)}")
    if value.shape != x.shape[:1] or value.device != x.device or not value.is_floating_point():
        raise ValueError(f"{wanted}, got {_describe(value)}")


def _check_noise(key: object, stream: int, first_sample: int, device: torch.device) -> None:
    if not isinstance(key, NoiseKey):
        raise TypeError(f"key must be a NoiseKey, got {_describe(key)}")
    if key.device != device:
        raise ValueError(f"key must be on {device}, got a key on {key.device}; use key.to(device)")
    if not 0 <= stream < rng.NUM_STREAMS:
        raise ValueError(f"stream must be in [0, {rng.NUM_STREAMS}), got {stream}")
    if not 0 <= first_sample < 2**32:
        raise ValueError(f"first_sample must be in [0, 2**32), got {first_sample}")


def _check_state(name: str, x: object) -> Tensor:
    """Validate a tensor or closed form; returns a tensor of its shape and device."""
    if not isinstance(x, Noised):
        return _check_samples(name, x)
    x0 = _check_samples(f"{name}.x0", x.x0, allow_uint8=True)
    _check_coefficient(f"{name}.alpha", x.alpha, x0)
    _check_coefficient(f"{name}.sigma", x.sigma, x0)
    _check_noise(x.key, x.stream, x.first_sample, x0.device)
    return x0


def _check_map(x_name: str, x: object, F: object, a: object, b: object) -> None:
    like = _check_state(x_name, x)
    _check_like("F", F, like, x_name)
    _check_coefficient("a", a, like)
    _check_coefficient("b", b, like)


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
    _check_noise(key, stream, first_sample, key.device)
    return reference.noise(shape, key, stream=stream, first_sample=first_sample, dtype=dtype)


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
    x0 = _check_samples("x0", x0, allow_uint8=True)
    for name, value in (("alpha", alpha), ("sigma", sigma)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor [B] or [2, B], got {_describe(value)}")
        if (value.dim() == 2 and value.shape[0] != 2) or value.dim() not in (1, 2):
            raise ValueError(
                f"{name} must have shape [{x0.shape[0]}] or [2, {x0.shape[0]}], "
                f"got {_describe(value)}"
            )
        _check_coefficient(name, value if value.dim() == 1 else value[0], x0)
    if alpha.shape != sigma.shape:
        raise ValueError(
            f"alpha and sigma must have the same shape, got {list(alpha.shape)} "
            f"and {list(sigma.shape)}"
        )
    _check_noise(key, stream, first_sample, x0.device)
    if out_dtype is None:
        out_dtype = x0.dtype if x0.is_floating_point() else torch.float32
    if not out_dtype.is_floating_point:
        raise TypeError(f"out_dtype must be a float dtype, got {out_dtype}")
    pair = alpha.dim() == 2
    out = reference.noising(
        x0,
        alpha if pair else alpha[None],
        sigma if pair else sigma[None],
        key,
        stream=stream,
        first_sample=first_sample,
        out_dtype=out_dtype,
    )
    return (out[0], out[1]) if pair else out[0]


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
    _check_map("x", x, F, a, b)
    return reference.boundary(x, F, a, b)


def euler_step(
    x: Tensor | Noised,
    v: Tensor,
    dt: Tensor,
    *,
    v_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """An Euler step towards the data, scale x - dt (v_uncond + guidance (v - v_uncond)).

    Args:
        x: x_t ``[B, ...]`` or `Noised`.
        v: velocity, or a raw network output F with velocity c x + d F: then dt times d is `dt`
            and 1 - dt c is `scale`.
        dt: ``[B]``, t - s > 0.
        v_uncond, guidance: unconditional velocity and guidance weight ``[B]``; both or none.
        scale: ``[B]``; default 1.

    Returns:
        x_s ``[B, ...]``, float32 (float64 if an input is).

    Raises:
        ValueError, TypeError: an argument of the wrong rank, shape, dtype or device; one of
            v_uncond and guidance without the other.

    Source: seed eq. 8; classifier-free guidance, Ho & Salimans 2022.
    """
    like = _check_state("x", x)
    _check_like("v", v, like, "x")
    _check_coefficient("dt", dt, like)
    if (v_uncond is None) != (guidance is None):
        raise ValueError("v_uncond and guidance go together: give both or none")
    if v_uncond is not None:
        _check_like("v_uncond", v_uncond, like, "x")
        _check_coefficient("guidance", guidance, like)
    if scale is not None:
        _check_coefficient("scale", scale, like)
    return reference.euler_step(x, v, dt, v_uncond=v_uncond, guidance=guidance, scale=scale)


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
    x = _check_samples("x", x)
    _check_map("x", x, F, a, b)
    _check_coefficient("alpha", alpha, x)
    _check_coefficient("sigma", sigma, x)
    _check_noise(key, stream, first_sample, x.device)
    return reference.sampler_update(
        x, F, a, b, alpha, sigma, key, stream=stream, first_sample=first_sample
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
    _check_map("x_t", x_t, F, a, b)
    if isinstance(target, Denoised):
        _check_state("target.x", target.x)
        _check_like("target.F", target.F, F, "F")
        _check_coefficient("target.a", target.a, F)
        _check_coefficient("target.b", target.b, F)
    elif _check_state("target", target).shape != F.shape:
        raise ValueError(f"target must have the shape of F, {list(F.shape)}")
    if weight is not None:
        _check_coefficient("weight", weight, F)
    if not callable(metric):
        raise TypeError(f"metric must be callable (f, target) -> [B], got {_describe(metric)}")
    mean, losses = reference.consistency_loss(F, x_t, a, b, target, metric=metric, weight=weight)
    if losses.shape != F.shape[:1]:
        raise ValueError(
            f"metric must return one value per sample, [{F.shape[0]}], got {list(losses.shape)}"
        )
    return mean, losses
