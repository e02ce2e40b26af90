"""Stepwise targets: one noise level after another, each learnt from the finished one below it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcm.ema import LastPhase
from fastcm.losses import Metric, PseudoHuber, Weight, inverse_gap
from fastcm.networks.protocol import Network
from fastcm.objectives.base import Batch, Loss
from fastcm.objectives.consistency_training import check_consistency, pair_loss
from fastcm.parameterization import Parameterization
from fastcm.schedules import Grid, UniformGrid


@dataclass(frozen=True)
class Stepwise:
    """theta_k(x_{t_k}, t_k) against the frozen theta_{k-1}(x_{t_{k-1}}, t_{k-1}), or the data.

    The target of phase 1 is the data. Phase k = 1..n takes `steps_per_phase` steps and begins with
    the weights of phase k - 1; the last one goes on for ever. The phase follows from the step on
    the device, and the frozen network is the average `LastPhase`. Give the trainer
    ``keep_every=steps_per_phase`` to keep every theta_k. The last network makes samples in one step
    from t_max, and knows no other time.

    Args:
        steps_per_phase: >= 1.
        phases: n >= 1.
        parameterization: path and prediction type.
        grid: where the times t_0 = t_min < t_1 < ... < t_n = t_max lie.
        metric: distance of the denoisers.
        weight: weight(t, s, path).

    Source: seed eq. 3-4.
    """

    steps_per_phase: int
    phases: int = 8
    parameterization: Parameterization = Parameterization()
    grid: Grid = UniformGrid()
    metric: Metric = PseudoHuber()
    weight: Weight = inverse_gap

    def __post_init__(self) -> None:
        if self.phases < 1:
            raise ValueError(f"Stepwise phases must be >= 1, got {self.phases}")
        if self.steps_per_phase < 1:
            raise ValueError(f"Stepwise steps_per_phase must be >= 1, got {self.steps_per_phase}")
        check_consistency(self.parameterization, self.phases)

    @property
    def target_average(self) -> LastPhase:
        """The network of the phase before."""
        return LastPhase(self.steps_per_phase)

    def loss(self, net: Network, batch: Batch, target_net: Network | None = None) -> Loss:
        """The loss of one batch; see `Objective`."""
        return pair_loss(self, net, batch, target_net)

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(t_k, t_{k-1}) of the phase, float64 ``[B]``."""
        n, path = self.phases, self.parameterization.path
        finished = torch.div(batch.key.step, self.steps_per_phase, rounding_mode="floor")
        k = (finished.clamp_max(n - 1) + 1).expand(len(batch.x0))
        return self.grid.time(k, n, path), self.grid.time(k - 1, n, path)
