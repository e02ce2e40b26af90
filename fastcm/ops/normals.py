"""The public operators that draw: `noise`, `noising`, `uniform` and `integers`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastcm import rng
from fastcm.ops import native, reference, validation
from fastcm.ops.dispatch import Door, door
from fastcm.rng import NoiseKey


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
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"shape must be [B, ...] of rank >= 2, got {tuple(shape)}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a float dtype, got {dtype}")
    if device is not None:
        key = key.to(device)
    validation.check_noise(key, stream, first_sample, key.device)
    way = Door.REFERENCE if dtype == torch.float64 else door(key.tensor, noisy=True)
    if way is Door.KERNEL:
        out: Tensor = torch.ops.fastcm.noise(shape, key.tensor, stream, first_sample, dtype)
        return out
    make = native.noise if way is Door.NATIVE else reference.noise
    return make(shape, key, stream=stream, first_sample=first_sample, dtype=dtype)


def uniform(count: int, key: NoiseKey, *, stream: int, first_sample: int = 0) -> Tensor:
    """One number per sample in the open interval (0, 1), of which times are made.

    Args:
        count: how many samples, >= 0.
        key, stream, first_sample: see `noise`.

    Returns:
        float64 ``[count]``; the same bits on every device.

    Raises:
        ValueError, TypeError: count < 0; stream or first_sample out of range.
    """
    if count < 0:
        raise ValueError(f"count must be >= 0, got {count}")
    validation.check_noise(key, stream, first_sample, key.device)
    way = door(key.tensor, noisy=True)
    if way is Door.KERNEL:
        out: Tensor = torch.ops.fastcm.uniform(count, key.tensor, stream, first_sample)
        return out
    make = native.uniform if way is Door.NATIVE else rng.uniform
    return make(count, key, stream=stream, first_sample=first_sample)


def integers(count: int, key: NoiseKey, *, stream: int, first_sample: int = 0) -> Tensor:
    """One number per sample in [0, 2^63), int64 ``[count]``; else as `uniform`."""
    if count < 0:
        raise ValueError(f"count must be >= 0, got {count}")
    validation.check_noise(key, stream, first_sample, key.device)
    if door(key.tensor, noisy=True) is Door.KERNEL:
        out: Tensor = torch.ops.fastcm.integers(count, key.tensor, stream, first_sample)
        return out
    return rng.integers(count, key, stream=stream, first_sample=first_sample)


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
    validation.check_samples("x0", x0, allow_uint8=True)
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
    if alpha.shape != sigma.shape:
        raise ValueError(
            f"alpha and sigma must have the same shape, got {list(alpha.shape)} "
            f"and {list(sigma.shape)}"
        )
    single = alpha.dim() == 1
    coefficients = [(alpha, sigma)] if single else list(zip(alpha.unbind(), sigma.unbind()))
    made = noising_versions(
        x0, coefficients, key, stream=stream, first_sample=first_sample, out_dtype=out_dtype
    )
    return made[0] if single else (made[0], made[1])


def noising_versions(
    x0: Tensor,
    coefficients: Sequence[tuple[Tensor, Tensor]],
    key: NoiseKey,
    *,
    stream: int = rng.NOISE,
    first_sample: int = 0,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """`noising` by one or two (alpha, sigma), ``[B]`` each."""
    validation.check_samples("x0", x0, allow_uint8=True)
    for alpha, sigma in coefficients:
        validation.check_coefficient("alpha", alpha, x0)
        validation.check_coefficient("sigma", sigma, x0)
    validation.check_noise(key, stream, first_sample, x0.device)
    if out_dtype is None:
        out_dtype = x0.dtype if x0.is_floating_point() else torch.float32
    if not out_dtype.is_floating_point:
        raise TypeError(f"out_dtype must be a float dtype, got {out_dtype}")
    way = Door.REFERENCE if out_dtype == torch.float64 else door(x0, noisy=True)
    if way is Door.KERNEL:
        op = torch.ops.fastcm.noising if len(coefficients) == 1 else torch.ops.fastcm.noising_pair
        flat = (c for pair in coefficients for c in pair)
        out = op(x0, *flat, key.tensor, stream, first_sample, out_dtype)
        return (out,) if isinstance(out, Tensor) else tuple(out)
    make: Callable[..., Sequence[Tensor]]
    make = native.noising if way is Door.NATIVE else reference.noising
    alphas, sigmas = (torch.stack(c) for c in zip(*coefficients))
    made = make(
        x0,
        alphas,
        sigmas,
        key,
        stream=stream,
        first_sample=first_sample,
        out_dtype=out_dtype,
    )
    return tuple(made)
