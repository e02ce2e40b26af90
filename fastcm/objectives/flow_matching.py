"""Flow matching: rectified flow on the linear path, and denoising on every other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcm import rng
from fastcm.losses import Metric, SquaredL2, Weight, uniform
from fastcm.networks.conditions import Null
from fastcm.networks.protocol import Network, check_output
from fastcm.objectives.base import Batch, Loss, learned
from fastcm.parameterization import Moment, Parameterization
from fastcm.schedules import LogitNormal, TimeSampler

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class FlowMatching:
    """Regression of the network output on its target p x0 + q z; on `Linear` v = z - x0.

    Args:
        parameterization: path and prediction type.
        times: sampler of t; default logit-normal(0, 1).
        metric: distance in the space of the prediction; default squared L2.
        weight: weight(t, t_min, path).
        condition_dropout: share of rows trained without condition, for guidance.
        null_condition: what stands for "no condition" there; see `fastcm.networks.conditions.Null`.

    Source: seed eq. 1; Liu et al. 2022, Lipman et al. 2022.
    """

    parameterization: Parameterization = Parameterization()
    times: TimeSampler = LogitNormal()
    metric: Metric = SquaredL2()
    weight: Weight = uniform
    condition_dropout: float = 0.0
    null_condition: Null = None
    target_average = None

    def __post_init__(self) -> None:
        if self.parameterization.prediction == "cm":
            raise ValueError(
                "prediction 'cm' leaves the network undetermined at t_min; train a flow on "
                "VarianceExploding with prediction='edm' or 'v'"
            )
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"condition_dropout must be in [0, 1), got {self.condition_dropout}")
        if self.condition_dropout > 0 and self.null_condition is None:
            raise ValueError("condition_dropout needs null_condition, got None")

    def loss(self, net: Network, batch: Batch, target_net: Network | None = None) -> Loss:
        """The loss of one batch; see `Objective`."""
        p = self.parameterization
        if self.null_condition is not None and self.condition_dropout > 0:
            batch = batch.without_condition(self.null_condition, self.condition_dropout)
        at, (a, b), target_at, weight = batch.fused(self._drawn)
        x_t, target = batch.versions((at.alpha, at.sigma), target_at)
        (x,) = batch.network_inputs(p, (at, x_t))
        F = check_output("net", net(x, at.c_noise, batch.cond), x)
        return Loss.of(
            F,
            x_t,
            a,
            b,
            target,
            metric=self.metric,
            weight=weight,
            log_variance=learned(self.weight, net, p, at.t),
        )

    def _drawn(self, batch: Batch) -> tuple[Moment, Pair, Pair, Tensor]:
        """The time, what makes a x_t + b F and the target, and the weight."""
        p = self.parameterization
        t = self.times(batch.uniform(rng.TIME), p.path.t_min, p.path.t_max)
        # the error of F itself: a = 0, b = 1
        error = torch.zeros_like(t), torch.ones_like(t)
        weight = self.weight(t, torch.full_like(t, p.path.t_min), p.path)
        return p.moment(t), error, p.target(t), weight
