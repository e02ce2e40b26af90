"""Easy consistency tuning: a pretrained flow, tuned while the second time nears the first."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcm import rng
from fastcm.ema import Average
from fastcm.losses import L2, Metric, Weight, inverse_gap
from fastcm.networks.protocol import Network
from fastcm.objectives.base import Batch, Loss
from fastcm.objectives.consistency_training import check_consistency, pair_loss
from fastcm.parameterization import Parameterization
from fastcm.schedules import LogNormal, TimeSampler


@dataclass(frozen=True)
class EasyConsistency:
    """f_theta(x_t, t) against the same network's f(x_r, r), r -> t by stages; no grid.

    With the noise level l = sigma / alpha of t, that of r is
    max(0, l (1 - (1 + k sigmoid(-b l)) / q^(stage + 1))): a denoiser's loss at first, since r is
    near the data, and a consistency loss in the end. Start from a network that was trained by
    `FlowMatching` under the same parameterization.

    Args:
        parameterization: path and prediction type; the paper's is `VarianceExploding`.
        q: > 1, how much of the gap each stage leaves; 2, or 256 in the one-hour recipe, which has
            one stage.
        double_every: steps of a stage.
        stages: the last one goes on for ever.
        k, b: of the sigmoid, k in [0, 2 q - 2] or r would be above t nowhere.
        levels: density of the noise level; exp(N(-1.1, 2.0^2)) by default.
        metric: distance of the denoisers; L2 is the paper's pseudo-Huber with c = 0.
        weight: weight(t, r, path).
        target_average: None takes the student itself, with the same dropout masks.

    Source: Geng et al. 2024, "Consistency models made easy", section 3 and appendix.
    """

    parameterization: Parameterization = Parameterization()
    q: float = 2.0
    double_every: int = 10_000
    stages: int = 8
    k: float = 8.0
    b: float = 1.0
    levels: TimeSampler = LogNormal(-1.1, 2.0)
    metric: Metric = L2()
    weight: Weight = inverse_gap
    target_average: Average | None = None

    def __post_init__(self) -> None:
        check_consistency(self.parameterization, 1)
        if not self.q > 1:
            raise ValueError(f"EasyConsistency q must be > 1, got {self.q}")
        if self.double_every < 1 or self.stages < 1:
            raise ValueError(
                "EasyConsistency double_every and stages must be >= 1, got "
                f"{self.double_every} and {self.stages}"
            )
        if not (self.k >= 0 and self.b > 0):
            raise ValueError(f"EasyConsistency needs k >= 0 and b > 0, got {self.k} and {self.b}")
        _ = self._range  # now: traced code cannot ask for it

    @functools.cached_property
    def _range(self) -> tuple[float, float]:
        """The noise level at t_min and t_max, infinite where alpha is 0."""
        path = self.parameterization.path
        ends = torch.tensor([path.t_min, path.t_max], dtype=torch.float64, device="cpu")
        at = path.at(ends)
        low, high = torch.where(at.alpha > 1e-12, at.sigma / at.alpha, math.inf).tolist()
        return low, high

    @property
    def shares_weights(self) -> bool:
        """Whether the target is the student itself."""
        return self.target_average is None

    def second_level(self, level: Tensor, step: Tensor) -> Tensor:
        """The noise level of r for that of t ``[B]`` at a step, 0-d int64."""
        stage = torch.div(step, self.double_every, rounding_mode="floor").clamp_max(self.stages - 1)
        gap = (1.0 + self.k * torch.sigmoid(-self.b * level)) / self.q ** (stage.double() + 1.0)
        return (level * (1.0 - gap)).clamp_min(0.0)

    def loss(self, net: Network, batch: Batch, target_net: Network | None = None) -> Loss:
        """The loss of one batch; see `Objective`."""
        return pair_loss(self, net, batch, target_net)

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(t, r) of every row, float64 ``[B]``."""
        path = self.parameterization.path
        level = self.levels(batch.uniform(rng.TIME), *self._range)
        below = self.second_level(level, batch.key.step)
        return path.time_at_angle(level.atan()), path.time_at_angle(below.atan())
