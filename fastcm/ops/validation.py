"""Checks of arguments: each names the argument, what came and what was wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcm import rng
from fastcm.ops.reference import Noised
from fastcm.rng import NoiseKey


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r:.80}"


def check_samples(name: str, x: object, *, allow_uint8: bool = False) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor [B, ...], got {describe(x)}")
    if x.dim() < 2:
        raise ValueError(f"{name} must have shape [B, ...] of rank >= 2, got {describe(x)}")
    if not (x.is_floating_point() or (allow_uint8 and x.dtype == torch.uint8)):
        wanted = "float or uint8" if allow_uint8 else "float"
        raise TypeError(f"{name} must be of a {wanted} dtype, got {describe(x)}")
    return x


def check_like(
    name: str, value: object, x: Tensor, x_name: str, *, allow_uint8: bool = False
) -> None:
    tensor = check_samples(name, value, allow_uint8=allow_uint8)
    if tensor.shape != x.shape or tensor.device != x.device:
        raise ValueError(
            f"{name} must have the shape and device of {x_name}, {describe(x)}, "
            f"got {describe(value)}"
        )


def check_coefficient(name: str, value: object, x: Tensor) -> None:
    if (
        isinstance(value, Tensor)
        and value.dim() == 1
        and value.shape[0] == x.shape[0]
        and value.device == x.device
        and value.is_floating_point()
    ):
        return
    error = ValueError if isinstance(value, Tensor) else TypeError
    raise error(
        f"{name} must be a float tensor [{x.shape[0]}] (one per sample) on {x.device}, "
        f"got {describe(value)}"
    )


def check_guidance(name: str, uncond: object, guidance: object, x: Tensor) -> None:
    if (uncond is None) != (guidance is None):
        raise ValueError(f"{name} and guidance go together: give both or none")
    if uncond is not None:
        check_like(name, uncond, x, "x")
        check_coefficient("guidance", guidance, x)


def check_noise(key: object, stream: int, first_sample: int, device: torch.device) -> None:
    if not isinstance(key, NoiseKey):
        raise TypeError(f"key must be a NoiseKey, got {describe(key)}")
    if key.device != device:
        raise ValueError(f"key must be on {device}, got a key on {key.device}; use key.to(device)")
    if not 0 <= stream < rng.NUM_STREAMS:
        raise ValueError(f"stream must be in [0, {rng.NUM_STREAMS}), got {stream}")
    if not 0 <= first_sample < 2**32:
        raise ValueError(f"first_sample must be in [0, 2**32), got {first_sample}")


def check_state(name: str, x: object, *, like: Tensor | None = None) -> Tensor:
    """Validate a tensor or closed form; returns a tensor of its shape and device.

    With `like`, the network output F, its shape and device must be those.
    """
    if not isinstance(x, Noised):
        tensor = check_samples(name, x)
        if like is not None:
            check_like(name, x, like, "F")
        return tensor
    x0 = check_samples(f"{name}.x0", x.x0, allow_uint8=True)
    if like is not None:
        check_like(name, x0, like, "F", allow_uint8=True)
    check_coefficient(f"{name}.alpha", x.alpha, x0)
    check_coefficient(f"{name}.sigma", x.sigma, x0)
    check_noise(x.key, x.stream, x.first_sample, x0.device)
    return x0


def check_map(x_name: str, x: object, F: object, a: object, b: object) -> None:
    like = check_state(x_name, x)
    check_like("F", F, like, x_name)
    check_coefficient("a", a, like)
    check_coefficient("b", b, like)
