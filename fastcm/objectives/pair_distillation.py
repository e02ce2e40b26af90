"""Distillation on pairs: one step from the noise to the sample that a teacher made of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastcm.losses import Metric, PseudoHuber
from fastcm.networks.protocol import Network, check_output
from fastcm.objectives.base import Batch, Loss
from fastcm.objectives.consistency_training import check_consistency
from fastcm.parameterization import Parameterization


@dataclass(frozen=True)
class PairDistillation:
    """f_theta(sigma z, t_max) against x0, where the teacher's ODE led from z to x0.

    The data are pairs, such as `fastcm.data.pairs` reads; other objectives train on them, too, with
    the pair's noise in place of a drawn one: `FlowMatching` is then the second rectification.

    Args:
        parameterization: path and prediction type.
        metric: distance of the denoisers; any.

    Source: seed, section on distillation; Liu et al. 2022, "Flow straight and fast", section 2.2.
    """

    parameterization: Parameterization = Parameterization()
    metric: Metric = PseudoHuber()
    target_average = None

    def __post_init__(self) -> None:
        check_consistency(self.parameterization, 1)

    def loss(self, net: Network, batch: Batch, target_net: Network | None = None) -> Loss:
        """The loss of one batch; see `Objective`."""
        if batch.z is None:
            raise ValueError(
                "PairDistillation needs samples with their noise: make pairs with `fastcm pairs`"
            )
        p = self.parameterization
        t = torch.full(batch.x0.shape[:1], p.path.t_max, dtype=torch.float64, device=batch.z.device)
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        (x,) = batch.versions((zero, p.path.at(t).sigma))
        (inputs,) = batch.network_inputs(p, (t, x))
        F = check_output("net", net(inputs, p.c_noise(t), batch.cond), inputs)
        at = p.coefficients(t)
        return Loss.of(F, x, at.a, at.b, batch.x0, metric=self.metric, weight=one)
