"""Evaluating a network in a sampler, with classifier-free guidance F_u + w (F_c - F_u).

Denoiser and velocity are affine in F, so guiding F guides both. Conditional and unconditional
rows go through the network in one call, and the two outputs stay apart (`Guided`) until the affine
map of the sampler reads them: guidance costs no pass of its own.

A network that takes the weight as an input (Luo et al. 2023, LCM) reads it from `cond`, whose
last column it is (`fastcm.networks.protocol.append_weight`), and `guidance` stays None, since such
a network needs no unconditional rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Union

import torch
from torch import Tensor

from fastcm import ops
from fastcm.networks.protocol import Network, check_output, unconditional
from fastcm.ops.reference import compute_dtype, lift
from fastcm.parameterization import Parameterization

Guidance = Union[float, Sequence[float], Callable[[float], float]]
"""A weight, one per evaluation time, or a schedule w(t)."""

Evaluate = Callable[[Tensor, int], "Guided"]
"""``evaluate(x, i)``: the network's output for x at the i-th time of a sampler."""


class Guided(NamedTuple):
    """A network output F_u + w (F - F_u) whose halves are not yet combined; F_u None: F alone."""

    F: Tensor
    F_uncond: Tensor | None = None
    weight: float = 1.0

    def map(self, x: Tensor, a: float, b: float) -> Tensor:
        """a x + b (F_u + w (F - F_u)) in one pass, float32 (float64 if x or F is)."""
        if self.F_uncond is None:
            return ops.boundary(x, self.F, rows(x, a), rows(x, b))
        return ops.euler_step(
            x,
            self.F,
            rows(x, -b),
            v_uncond=self.F_uncond,
            guidance=rows(x, self.weight),
            scale=rows(x, a),
        )

    def combined(self) -> Tensor:
        """F_u + w (F - F_u)."""
        if self.F_uncond is None:
            return self.F
        w = self.weight
        return ops.boundary(self.F, self.F_uncond, rows(self.F, w), rows(self.F, 1.0 - w))


def rows(x: Tensor, value: float) -> Tensor:
    """The coefficient `value` of every sample of x, ``[B]`` in the dtype of the arithmetic."""
    return torch.full(x.shape[:1], value, dtype=compute_dtype(x), device=x.device)


def guidance_weights(guidance: Guidance, times: Sequence[float]) -> list[float]:
    """One weight per time.

    Raises:
        ValueError: a sequence of another length than `times`, a weight that is not finite.
    """
    if callable(guidance):
        weights = [float(guidance(t)) for t in times]
    elif isinstance(guidance, Sequence):
        weights = [float(w) for w in guidance]
    else:
        weights = [float(guidance)] * len(times)
    if len(weights) != len(times):
        raise ValueError(
            f"guidance must be a number, a function of t or one weight for each of the "
            f"{len(times)} times, got {len(weights)} weights"
        )
    if not all(math.isfinite(w) for w in weights):
        raise ValueError(f"guidance weights must be finite, got {weights}")
    return weights


def evaluator(
    net: Network,
    p: Parameterization,
    z: Tensor,
    times: Sequence[float],
    *,
    cond: Tensor | None = None,
    guidance: Guidance | None = None,
    null_condition: Tensor | int | None = None,
    ends: Sequence[float] | None = None,
) -> Evaluate:
    """The network at the given times, one call per evaluation.

    Args:
        net: ``net(x, t, cond) -> F``.
        p: its parameterization.
        z: ``[B, ...]``, for the number of samples and the device.
        times: of the evaluations.
        cond: tensor of B rows, or None.
        guidance: a weight, one per time, or a function w(t). Where it is 1 the conditional rows
            are evaluated alone.
        null_condition: what stands for "no condition": a label, or a tensor that broadcasts to
            `cond`.
        ends: the second time of each evaluation, for a network of two times.

    Returns:
        ``evaluate(x, i) -> Guided`` for x ``[B, ...]`` at ``times[i]``. The network's t is float32,
        float64 where x is.

    Raises:
        TypeError: `cond` is not a tensor.
        ValueError: `cond` has not B rows; guidance without cond or null_condition, or of another
            length than `times`.
    """
    check_rows(cond, len(z))
    both: Tensor | None = None
    weights = [1.0] * len(times)
    if guidance is not None:
        both = _both(cond, null_condition)
        weights = guidance_weights(guidance, times)

    def evaluate(x: Tensor, i: int) -> Guided:
        t = torch.full(x.shape[:1], times[i], dtype=torch.float64, device=x.device)
        s = None if ends is None else torch.full_like(t, ends[i])
        return _call(net, p, x, t, cond, both, weights[i], s)

    return evaluate


def predict(
    net: Network,
    p: Parameterization,
    x: Tensor,
    t: Tensor,
    cond: Tensor | None = None,
    *,
    guidance: float | None = None,
    null_condition: Tensor | int | None = None,
) -> Tensor:
    """The network's output F at (x, t), with guidance F_u + w (F_c - F_u) if asked.

    Args:
        net, p, cond, null_condition: see `evaluator`.
        x: ``[B, ...]``.
        t: ``[B]``, float64.
        guidance: the weight w.
    """
    check_rows(cond, len(x))
    if guidance is None:
        return _call(net, p, x, t, cond).F
    return _call(net, p, x, t, cond, _both(cond, null_condition), guidance).combined()


def _call(
    net: Network,
    p: Parameterization,
    x: Tensor,
    t: Tensor,
    cond: Tensor | None,
    both: Tensor | None = None,
    weight: float = 1.0,
    s: Tensor | None = None,
) -> Guided:
    c_in = p.c_in(t)
    inputs = x if c_in is None else lift(c_in, x) * x
    c_noise = p.path.c_noise if x.dtype == torch.float64 else p.c_noise
    told, second = c_noise(t), {} if s is None else {"s": c_noise(s)}
    if both is None or weight == 1.0:
        return Guided(check_output("net", net(inputs, told, cond, **second), inputs))
    inputs, second = torch.cat([inputs, inputs]), {k: v.repeat(2) for k, v in second.items()}
    F = check_output("net", net(inputs, told.repeat(2), both, **second), inputs)
    F_cond, F_uncond = F.chunk(2)
    return Guided(F_cond, F_uncond, weight)


def check_rows(cond: Tensor | None, n: int) -> None:
    """Raise TypeError or ValueError unless `cond` is None or a tensor of n rows."""
    if cond is not None and not isinstance(cond, Tensor):
        raise TypeError(f"cond must be a tensor of one row per sample, got {type(cond).__name__}")
    if cond is not None and cond.shape[:1] != (n,):
        raise ValueError(f"cond must have one row per sample, {n}, got shape {list(cond.shape)}")


def _both(cond: Tensor | None, null: Tensor | int | None) -> Tensor:
    if cond is None:
        raise ValueError("guidance needs cond, got None")
    return torch.cat([cond, unconditional(cond, null)])
