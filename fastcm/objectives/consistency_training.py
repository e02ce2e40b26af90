"""Consistency training: the target is the average network at the next time down, same noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastcm import rng
from fastcm.ema import EMA, Average
from fastcm.losses import Metric, PseudoHuber, Weight, inverse_gap
from fastcm.networks.protocol import Network, check_output
from fastcm.objectives.base import Batch, Loss, learned, target_output
from fastcm.ops import Denoised
from fastcm.parameterization import Parameterization
from fastcm.paths import Path, VarianceExploding
from fastcm.schedules import (
    Curriculum,
    Grid,
    ICTCurriculum,
    KarrasGrid,
    LogNormal,
    TimeSampler,
    UniformGrid,
    draw_interval,
    intervals,
)


@dataclass(frozen=True)
class ConsistencyTraining:
    """f_theta(x_t, t) against f_ema(x_s, s) at neighbouring grid times t > s, with one z.

    Args:
        parameterization: path and prediction type.
        discretization: number of intervals n, or a curriculum N(k).
        grid: where the times lie.
        times: None draws the interval uniformly; else by the mass of this density.
        metric: distance of the denoisers.
        weight: weight(t, s, path).
        target_average: the average that serves as target network; None takes the student itself,
            without gradient and with the same dropout masks, as iCT and ECT do.

    Source: seed eq. 6; Song et al. 2023, algorithm 3.
    """

    parameterization: Parameterization = Parameterization()
    discretization: int | Curriculum = 40
    grid: Grid = UniformGrid()
    times: TimeSampler | None = None
    metric: Metric = PseudoHuber()
    weight: Weight = inverse_gap
    target_average: Average | None = EMA(0.9)

    def __post_init__(self) -> None:
        check_consistency(self.parameterization, self.discretization)

    @classmethod
    def improved(
        cls,
        total_steps: int,
        *,
        path: Path = VarianceExploding(),
        s0: int = 10,
        s1: int = 1280,
        **options: Any,
    ) -> ConsistencyTraining:
        """Improved consistency training (iCT): the student is its own target.

        Karras's grid, doubled at equal distances from s0 to s1 intervals; discretised lognormal
        times; pseudo-Huber with c = 0.00054 sqrt(D); weight 1 / (t - s). Train it with
        `fastcm.RAdam`.

        Args:
            total_steps: over which the grid grows.
            path: the paper's is `VarianceExploding`.
            s0, s1: first and last number of intervals.
            **options: what else of the constructor is to differ.

        Source: Song & Dhariwal 2023, "Improved techniques for training consistency models".
        """
        settings: dict[str, Any] = {
            "parameterization": Parameterization(path),
            "discretization": ICTCurriculum(total_steps, s0, s1),
            "grid": KarrasGrid() if path.t_min > 0 else UniformGrid(),
            "times": LogNormal(-1.1, 2.0),
            "target_average": None,
        }
        return cls(**{**settings, **options})

    @property
    def shares_weights(self) -> bool:
        """Whether the target is the student itself."""
        return self.target_average is None

    def loss(self, net: Network, batch: Batch, target_net: Network | None = None) -> Loss:
        """The loss of one batch; see `Objective`."""
        p = self.parameterization
        n = intervals(self.discretization, batch.key.step)
        t, s = draw_interval(batch.uniform(rng.TIME), n, self.grid, p.path, self.times)
        return pair_loss(net, batch, target_net, p, t, s, metric=self.metric, weight=self.weight)


def pair_loss(
    net: Network,
    batch: Batch,
    target_net: Network | None,
    p: Parameterization,
    t: Tensor,
    s: Tensor,
    *,
    metric: Metric,
    weight: Weight,
) -> Loss:
    """f(x_t, t) against the target's f(x_s, s), both states of one noise z; t > s, ``[B]``."""
    x_t, x_s = batch.states(p, t, s)
    input_t, input_s = batch.network_inputs(p, (t, x_t), (s, x_s))
    at_t, at_s = p.coefficients(t), p.coefficients(s)
    F_s = target_output(net, target_net, input_s, p.c_noise(s), batch.cond)
    F_t = check_output("net", net(input_t, p.c_noise(t), batch.cond), input_t)
    target = Denoised(x_s, F_s, at_s.a, at_s.b)
    return Loss.of(
        F_t,
        x_t,
        at_t.a,
        at_t.b,
        target,
        metric=metric,
        weight=weight(t, s, p.path),
        log_variance=learned(weight, net, p, t),
    )


def check_consistency(p: Parameterization, n: int | Curriculum) -> None:
    """Raise ValueError for a student without boundary condition or fewer than 1 interval."""
    if p.prediction == "edm":
        raise ValueError(
            "prediction 'edm' is not the identity at t_min, as a consistency model must be; "
            "use 'cm', which takes the same weights"
        )
    if isinstance(n, int) and n < 1:
        raise ValueError(f"discretization must be >= 1 interval, got {n}")
