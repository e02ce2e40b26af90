"""What each registered operator computes, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcm import losses, rng
from fastcm.ops import reference
from fastcm.ops import registered as registered  # the operators exist
from fastcm.ops.operands import closed
from fastcm.ops.reference import Denoised
from fastcm.ops.registered import METRICS
from fastcm.rng import NoiseKey


def _noise(
    shape: Sequence[int], key: Tensor, stream: int, first_sample: int, dtype: torch.dtype
) -> Tensor:
    return reference.noise(
        shape, NoiseKey.wrap(key), stream=stream, first_sample=first_sample, dtype=dtype
    )


def _uniform(count: int, key: Tensor, stream: int, first_sample: int) -> Tensor:
    return rng.uniform(count, NoiseKey.wrap(key), stream=stream, first_sample=first_sample)


def _integers(count: int, key: Tensor, stream: int, first_sample: int) -> Tensor:
    return rng.integers(count, NoiseKey.wrap(key), stream=stream, first_sample=first_sample)


def _noising(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: Tensor,
    stream: int,
    first_sample: int,
    out_dtype: torch.dtype,
) -> Tensor:
    return _versions(x0, [alpha], [sigma], key, stream, first_sample, out_dtype)[0]


def _noising_pair(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    alpha2: Tensor,
    sigma2: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return _versions(x0, [alpha, alpha2], [sigma, sigma2], *rest)


def _versions(
    x0: Tensor,
    alpha: Sequence[Tensor],
    sigma: Sequence[Tensor],
    key: Tensor,
    stream: int,
    first_sample: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    return reference.noising(
        x0,
        alpha,
        sigma,
        NoiseKey.wrap(key),
        stream=stream,
        first_sample=first_sample,
        out_dtype=out_dtype,
    )


def _boundary(*arguments: Any) -> Tensor:
    *state, F, a, b = arguments
    return reference.boundary(closed(*state), F, a, b)


def _scale(g: Tensor, c: Tensor, out_dtype: torch.dtype) -> Tensor:
    return reference.scaled(g, c, out_dtype)


def _euler_step(*arguments: Any) -> tuple[Tensor, Tensor]:
    *state, v, dt, v_uncond, guidance, scale, input_scale, input_dtype = arguments
    out = reference.euler_step(
        closed(*state), v, dt, v_uncond=v_uncond, guidance=guidance, scale=scale
    )
    return _with_input(out, input_scale, input_dtype)


def _sampler_update(
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
    out = reference.sampler_update(
        x,
        F,
        a,
        b,
        alpha,
        sigma,
        NoiseKey.wrap(key),
        stream=stream,
        first_sample=first_sample,
        F_uncond=F_uncond,
        guidance=guidance,
    )
    return _with_input(out, input_scale, input_dtype)


def _with_input(
    out: Tensor, input_scale: Tensor | None, input_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    if input_dtype is None:
        return out, out.new_empty(0)
    return out, reference.scaled(out, input_scale, input_dtype).clone()


def _consistency_loss(*arguments: Any) -> tuple[Tensor, Tensor]:
    F, rest, a, b = arguments[0], arguments[1:7], arguments[7], arguments[8]
    y, *source = arguments[9:15]
    target_F, target_a, target_b, weight, metric, c = arguments[15:]
    if y is None:  # another version of x's x0 with x's noise
        y, source = rest[0], [*source[:2], *rest[3:]]
    target: Any = closed(y, *source)
    if target_F is not None:
        target = Denoised(target, target_F, target_a, target_b)
    kind = METRICS[metric]
    return reference.consistency_loss_and_gradient(
        F,
        closed(*rest),
        a,
        b,
        target,
        metric=losses.PseudoHuber(c) if kind is losses.PseudoHuber else kind(),
        weight=weight,
    )


_fastcm = torch.ops.fastcm

REFERENCES: dict[Any, Callable[..., Any]] = {
    _fastcm.noise.default: _noise,
    _fastcm.uniform.default: _uniform,
    _fastcm.integers.default: _integers,
    _fastcm.noising.default: _noising,
    _fastcm.noising_pair.default: _noising_pair,
    _fastcm.boundary.default: _boundary,
    _fastcm.scale.default: _scale,
    _fastcm.euler_step.default: _euler_step,
    _fastcm.sampler_update.default: _sampler_update,
    _fastcm.consistency_loss.default: _consistency_loss,
}
"""Of the same arguments, the same results: a table for ``ExportedProgram.run_decompositions``."""
