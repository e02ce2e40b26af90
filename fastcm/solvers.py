"""ODE solvers for dx/dt = v(x, t) from noise to data, over given descending times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastcm import ops

Velocity = Callable[[Tensor, float], Tensor]
"""``velocity(x, t) -> dx/dt``, both ``[B, ...]``."""

Solver = Callable[[Velocity, Tensor, Sequence[float]], Tensor]


def _step(x: Tensor, v: Tensor, dt: float) -> Tensor:
    return ops.euler_step(x, v, torch.full(x.shape[:1], dt, dtype=torch.float64, device=x.device))


def euler(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """x_s = x_t - (t - s) v(x_t, t) over consecutive times: ``len(times) - 1`` evaluations.

    Source: seed eq. 8; on `Linear` and `VarianceExploding` the same as DDIM.
    """
    for t, s in pairwise(times):
        x = _step(x, velocity(x, t), t - s)
    return x


def heun(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Trapezoidal steps, the last one Euler: ``2 (len(times) - 1) - 1`` evaluations.

    Source: Karras et al. 2022, algorithm 1.
    """
    last = len(times) - 2
    for i, (t, s) in enumerate(pairwise(times)):
        v = velocity(x, t)
        there = _step(x, v, t - s)
        x = there if i == last else _step(x, 0.5 * (v + velocity(there, s)), t - s)
    return x
