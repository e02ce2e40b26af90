"""Consistency flow matching: straight within each of a few segments, and one velocity all along."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastcm import rng
from fastcm.ema import EMA, Average
from fastcm.losses import Metric, SquaredL2
from fastcm.networks.protocol import Network, check_output
from fastcm.objectives.base import Batch, Loss, target_output
from fastcm.ops import Denoised
from fastcm.parameterization import Parameterization, check_velocity
from fastcm.schedules import TimeSampler, UniformTime


@dataclass(frozen=True)
class ConsistencyFlowMatching:
    """f(x_t, t) = x_t - (t - e) v(x_t, t), the end of its segment, against f(x_s, s) just below.

    [0, 1] is cut into equal segments, e is the lower end of the one that t lies in, and
    s = max(t - delta, e): at s = e the target is x_e itself. `velocity_weight` times the squared
    distance of the velocities is added. Sample with ``method="ode"``, Euler, in as many steps as
    there are segments, or a multiple.

    Args:
        parameterization: "v" on `Linear`.
        segments: >= 1.
        delta: t - s, in (0, 1 / segments].
        velocity_weight: >= 0.
        times: density of t.
        metric: distance of the ends.
        target_average: None takes the student itself.

    Source: Yang et al. 2024, "Consistency flow matching: defining straight flows with velocity
    consistency", eq. 6 and section 3.2.
    """

    parameterization: Parameterization = Parameterization()
    segments: int = 2
    delta: float = 1e-3
    velocity_weight: float = 1e-5
    times: TimeSampler = UniformTime()
    metric: Metric = SquaredL2()
    target_average: Average | None = EMA(0.999, warmup=True)

    def __post_init__(self) -> None:
        check_velocity(self.parameterization)
        if self.segments < 1:
            raise ValueError(f"ConsistencyFlowMatching segments must be >= 1, got {self.segments}")
        if not 0 < self.delta <= 1 / self.segments:
            raise ValueError(
                f"ConsistencyFlowMatching delta must be in (0, {1 / self.segments}], a segment, "
                f"got {self.delta}"
            )
        if not self.velocity_weight >= 0:
            raise ValueError(f"velocity_weight must be >= 0, got {self.velocity_weight}")

    @property
    def shares_weights(self) -> bool:
        """Whether the target is the student itself."""
        return self.target_average is None

    def loss(self, net: Network, batch: Batch, target_net: Network | None = None) -> Loss:
        """The loss of one batch; see `Objective`."""
        p, n = self.parameterization, self.segments
        t = self.times(batch.uniform(rng.TIME), 0.0, 1.0)
        end = ((t * n).ceil() - 1.0).clamp(0.0, n - 1.0) / n
        s = torch.maximum(t - self.delta, end)
        x_t, x_s = batch.states(p, t, s)
        input_t, input_s = batch.network_inputs(p, (t, x_t), (s, x_s))
        v_s = target_output(net, target_net, input_s, p.c_noise(s), batch.cond)
        v_t = check_output("net", net(input_t, p.c_noise(t), batch.cond), input_t)
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        ends = Loss.of(
            v_t,
            x_t,
            one,
            end - t,
            Denoised(x_s, v_s, one, end - s),
            metric=self.metric,
            weight=one,
        )
        if not self.velocity_weight:
            return ends
        weight = torch.full_like(t, self.velocity_weight)
        return ends.plus(Loss.of(v_t, x_t, zero, one, v_s, metric=SquaredL2(), weight=weight))
