"""Shortcut models: one network for steps of every size, a large one learnt from two halves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcm import ops, rng
from fastcm.ema import EMA, Average
from fastcm.losses import Metric, SquaredL2
from fastcm.networks.conditions import rows_of
from fastcm.networks.protocol import Network, check_output
from fastcm.objectives.base import Batch, Loss
from fastcm.parameterization import Parameterization, check_velocity
from fastcm.schedules import TimeSampler, UniformTime


@dataclass(frozen=True)
class Shortcut:
    """u(x_t, t, s) against z - x0 where s = t, and against the mean of two half steps below.

    One row in `every` is a bootstrap row: its step d = t - s is one of 1, 1/2, ..., 1/M, t a
    multiple of d, and the target the mean of the target network's two steps of d / 2 (the smallest
    is made of velocities). All other rows are flow matching. The network takes two times, and every
    row goes through it in the same call; the target network sees the bootstrap rows alone.

    Args:
        steps: M, a power of 2: 1 / M is the smallest step.
        every: one row in so many is a bootstrap row; the paper's 1/4 to 1/8 is a share, too.
        clip: bound on the middle state and on the target of a bootstrap row, 4 in the authors'
            code for latents of unit variance; None for none.
        times: density of t in the rows of flow matching.
        metric: distance of velocities.
        target_average: of the weights that make the half steps.

    Source: Frans et al. 2024, "One step diffusion via shortcut models", eq. 4-5, algorithm 1.
    """

    parameterization: Parameterization = Parameterization()
    steps: int = 128
    every: int = 8
    clip: float | None = None
    times: TimeSampler = UniformTime()
    metric: Metric = SquaredL2()
    target_average: Average | None = EMA(0.999, warmup=True)

    two_times = True

    def __post_init__(self) -> None:
        check_velocity(self.parameterization)
        if self.steps < 1 or self.steps & (self.steps - 1):
            raise ValueError(f"Shortcut steps must be a power of 2, got {self.steps}")
        if self.every < 1:
            raise ValueError(f"Shortcut every must be >= 1, got {self.every}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"Shortcut clip must be > 0 or None, got {self.clip}")

    @property
    def period(self) -> int:
        """Row i of a batch is treated as row i + period."""
        return self.every

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(t, d) of every row, float64 ``[B]``: d = t - s is 0 in the rows of flow matching."""
        u, levels = batch.uniform(rng.TIME), math.log2(self.steps) + 1
        d = 0.5 ** (batch.uniform(rng.LEVEL) * levels).floor()
        bootstrap = torch.arange(len(u), device=u.device) % self.every == 0
        t = torch.where(bootstrap, ((u / d).floor() + 1) * d, self.times(u, 0.0, 1.0))
        return t, torch.where(bootstrap, d, 0.0)

    def loss(self, net: Network, batch: Batch, target_net: Network | None = None) -> Loss:
        """The loss of one batch; see `Objective`."""
        t, d = self.draw(batch)
        one = torch.ones_like(t)
        x, target = batch.stored((1.0 - t, t), (-one, one))
        rows = slice(None, None, self.every)
        cond = rows_of(batch.cond, rows)
        halves = self._two_halves(target_net or net, batch, x[rows], t[rows], d[rows], cond)
        target = target.clone()
        target[rows] = halves
        inputs = x.to(batch.input_dtype)
        F = check_output("net", net(inputs, t.float(), batch.cond, s=(t - d).float()), inputs)
        return Loss.of(F, x, torch.zeros_like(t), one, target, metric=self.metric, weight=one)

    @torch.no_grad()
    def _two_halves(
        self, net: Network, batch: Batch, x: Tensor, t: Tensor, d: Tensor, cond: Any
    ) -> Tensor:
        """The mean velocity of two steps of d / 2 from x, in the dtype of x."""
        half = 0.5 * d
        # below the smallest step the network knows its velocity
        told = torch.where(half * self.steps < 1.0, 0.0, half)
        inputs, middle = x.to(batch.input_dtype), t - half
        first = net(inputs, t.float(), cond, s=(t - told).float())
        x_middle = self._clipped(ops.euler_step(x, first, half))
        inputs = x_middle.to(batch.input_dtype)
        second = net(inputs, middle.float(), cond, s=(middle - told).float())
        return self._clipped(0.5 * (first.to(x.dtype) + second.to(x.dtype)))

    def _clipped(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(-self.clip, self.clip)
