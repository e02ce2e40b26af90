"""Consistency training: the target is the average network at the next time down, same noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from fastcm import rng
from fastcm.ema import EMA, Average
from fastcm.losses import Metric, PseudoHuber, Weight, inverse_gap
from fastcm.networks.protocol import Network, check_output
from fastcm.objectives.base import Batch, Loss, learned, target_output
from fastcm.ops import Denoised
from fastcm.parameterization import Moment, Parameterization
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
        return pair_loss(self, net, batch, target_net)

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(t, s) of every row, float64 ``[B]``."""
        n, path = intervals(self.discretization, batch.key.step), self.parameterization.path
        return draw_interval(batch.uniform(rng.TIME), n, self.grid, path, self.times)


class OfPairs(Protocol):
    """A method that compares the states at two times t > s, which it draws."""

    @property
    def parameterization(self) -> Parameterization: ...
    @property
    def metric(self) -> Metric: ...
    @property
    def weight(self) -> Weight: ...
    def draw(self, batch: Batch) -> tuple[Tensor, Tensor]: ...


def _drawn(batch: Batch, method: OfPairs) -> tuple[Moment, Moment, Tensor]:
    p = method.parameterization
    t, s = method.draw(batch)
    return p.moment(t), p.moment(s), method.weight(t, s, p.path)


def pair_loss(
    method: OfPairs, net: Network, batch: Batch, target_net: Network | None = None
) -> Loss:
    """f(x_t, t) against the target's f(x_s, s), both states of one noise z."""
    p = method.parameterization
    at_t, at_s, weight = batch.fused(_drawn, method)
    x_t, x_s = batch.states(p, at_t, at_s)
    input_t, input_s = batch.network_inputs(p, (at_t, x_t), (at_s, x_s))
    F_s = target_output(net, target_net, input_s, at_s.c_noise, batch.cond)
    F_t = check_output("net", net(input_t, at_t.c_noise, batch.cond), input_t)
    a, b, _, _ = at_t.coefficients
    target_a, target_b, _, _ = at_s.coefficients
    return Loss.of(
        F_t,
        x_t,
        a,
        b,
        Denoised(x_s, F_s, target_a, target_b),
        metric=method.metric,
        weight=weight,
        log_variance=learned(method.weight, net, p, at_t.t),
    )


def check_consistency(p: Parameterization, n: int | Curriculum) -> None:
    """Raise for a student without boundary condition, or what is no number of intervals >= 1."""
    if p.prediction == "edm":
        raise ValueError(
            "prediction 'edm' is not the identity at t_min, as a consistency model must be; "
            "use 'cm', which takes the same weights"
        )
    if not isinstance(n, int) and not callable(getattr(n, "points", None)):
        raise TypeError(
            "discretization must be an int or a curriculum such as "
            f"fastcm.schedules.ICTCurriculum(total_steps), got {n!r:.80}"
        )
    if isinstance(n, int) and n < 1:
        raise ValueError(f"discretization must be >= 1 interval, got {n}")
