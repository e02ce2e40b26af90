"""What the papers prove: losses of exact networks in closed form, and training without a teacher
as the limit of distillation from an exact one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_objectives import GAUSSIAN as SD
from test_velocities import TwoTimes
from torch import Tensor, nn

from fastcm import (
    ConsistencyDistillation,
    ConsistencyFlowMatching,
    ConsistencyTraining,
    EasyConsistency,
    FlowMatching,
    PairDistillation,
    Shortcut,
    Stepwise,
)
from fastcm.losses import L2, PseudoHuber, SquaredL2
from fastcm.networks import GaussianConsistency, GaussianMixture
from fastcm.objectives import Batch
from fastcm.parameterization import Parameterization
from fastcm.paths import Linear, TrigFlow
from fastcm.rng import NoiseKey
from fastcm.schedules import UniformTime

D = 2


class Smooth(nn.Module):
    """A student of one-dimensional data, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        found: Tensor = self.layers(torch.cat([x, t.double()[:, None]], 1))
        return found


TIMES = (0.25, 0.5, 0.75, 1.0)
"""Shares of t_max, at grid points of every grid below."""


def nodes(mixture: GaussianMixture, count: int = 48) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0, z, share of t_max and weight of a quadrature over all three, ``[B, 1]`` and ``[B]``."""
    points, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(count))
    weights = weights / weights.sum()
    components = range(len(mixture.weights))
    grid = torch.cartesian_prod(*map(torch.arange, (len(components), count, count, len(TIMES))))
    k, i, j, t = grid.unbind(1)
    x0 = mixture.means[k, 0] + mixture.stds[k, 0] * points[i]
    weight = mixture.weights[k] * weights[i] * weights[j] / len(TIMES)
    return x0[:, None], points[j][:, None], torch.tensor(TIMES).double()[t], weight


@pytest.mark.parametrize("path", [Linear(), TrigFlow()], ids=str)
@pytest.mark.parametrize(
    ("metric", "least", "most"),
    [(SquaredL2(), 0.9, 1.1), (PseudoHuber(0.5), 0.9, 2.1), (L2(), -0.2, 0.2)],
    ids=str,
)
def test_training_is_distillation_from_the_exact_teacher_in_the_limit(
    path: Any, metric: Any, least: float, most: float
) -> None:
    """The gradients differ by one order of t - s less than they are, in expectation.

    Song et al. 2023, theorem 2, where student and target are one network; the metric must be twice
    differentiable at 0, which the norm is not: there the difference stays. The curvature of
    pseudo-Huber adds a term of the second order. Expectations are quadratures, exact to rounding.
    """
    p = Parameterization(path)
    means = torch.tensor([[-0.7], [0.4]])
    teacher = GaussianMixture(means, torch.tensor([[0.5], [0.3]]), [0.4, 0.6], p)
    x0, z, share, weight = nodes(teacher)
    batch = Batch(x0, NoiseKey(0), input_dtype=torch.float64, z=z)
    torch.manual_seed(0)
    net = Smooth()

    def gradient(objective: type, n: int, *first: Any) -> Tensor:
        settings: dict[str, Any] = {
            "parameterization": p,
            "discretization": n,
            "times": lambda u, low, high: share * high - 1e-9,
            "metric": metric,
            "weight": lambda t, s, path: weight * len(weight) / (t - s),
        }
        loss = objective(*first, **settings).loss(net, batch).mean
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])

    gaps = (16, 32, 64, 128)
    apart = []
    for n in gaps:
        ct = gradient(ConsistencyTraining, n)
        cd = gradient(ConsistencyDistillation, n, teacher)
        apart.append(((ct - cd).norm() / cd.norm()).item())
    orders = [math.log2(a / b) for a, b in itertools.pairwise(apart)]
    assert all(least < order < most for order in orders), (apart, orders)
    assert (apart[-1] < 0.02) == (least > 0)
    wrong = GaussianMixture(means + 0.5, 0.4, None, p)
    wrong_cd = gradient(ConsistencyDistillation, gaps[-1], wrong)
    assert (ct - wrong_cd).norm() > 0.2 * wrong_cd.norm()


def variance(t: Tensor, s: Tensor, gain_t: Tensor, gain_s: Tensor) -> Tensor:
    """Of gain_t x_t - gain_s x_s, over D elements, on the linear path with data N(0, SD^2)."""

    def covariance(t: Tensor, s: Tensor) -> Tensor:
        return (1 - t) * (1 - s) * SD**2 + t * s

    mixed = gain_t * gain_s * covariance(t, s)
    return D * (gain_t**2 * covariance(t, t) - 2 * mixed + gain_s**2 * covariance(s, s))


def spread(t: Tensor) -> Tensor:
    """The standard deviation of x_t."""
    return (((1 - t) * SD) ** 2 + t**2).sqrt()


def denoised(t: Tensor) -> Tensor:
    """E[x0 | x_t] = gain x_t."""
    return (1 - t) * SD**2 / spread(t) ** 2


def solved(t: Tensor) -> Tensor:
    """The end of the trajectory through x_t = gain x_t."""
    return SD / spread(t)


def velocity(t: Tensor) -> Tensor:
    """E[z - x0 | x_t] = gain x_t."""
    return (t - (1 - t) * SD**2) / spread(t) ** 2


def grid(n: int) -> tuple[Tensor, Tensor]:
    k = torch.arange(1, n + 1).double()
    return k / n, (k - 1) / n


MIDPOINTS = (torch.arange(200_000).double() + 0.5) / 200_000
FLOW = D * SD * math.pi / 2
"""The integral over t of D SD^2 / Var x_t, what is left of |z - x0|^2 once x_t is known."""

Gain = Callable[[Tensor], Tensor]


def ct(gain: Gain) -> float:
    t, s = grid(10)
    return (variance(t, s, gain(t), gain(s)) * 10).mean().item()


def cd(gain: Gain) -> float:
    t, s = grid(10)
    walked = gain(s) * (1 - (t - s) * velocity(t))
    return (D * ((gain(t) - walked) * spread(t)) ** 2 * 10).mean().item()


def stepwise(gain: Gain) -> float:
    t, s = torch.tensor([0.75, 0.5]).double()
    return (variance(t, s, gain(t), gain(s)) * 4).item()


def ect(gain: Gain) -> float:
    level = (-1.1 + 2.0 * torch.special.ndtri(MIDPOINTS)).exp()
    below = (level * (1 - (1 + 8 * torch.sigmoid(-level)) / 2**4)).clamp_min(0)
    t, r = level / (1 + level), below / (1 + below)
    return (variance(t, r, gain(t), gain(r)) / (t - r)).mean().item()


def cfm(weight: float) -> float:
    t = MIDPOINTS
    end = torch.where(t > 0.5, 0.5, 0.0)
    s = torch.maximum(t - 0.05, end)
    ends = variance(t, s, 1 - (t - end) * velocity(t), 1 - (s - end) * velocity(s))
    return (ends + weight * variance(t, s, velocity(t), velocity(s))).mean().item()


def shortcut(steps: int, every: int) -> float:
    """Only the smallest steps err, where Euler stands for the halves."""
    (t, _), d = grid(steps), 1 / steps
    v = velocity(t)
    halves = 0.5 * (v + velocity(t - d / 2) * (1 - d / 2 * v))
    mean = (1 - spread(t - d) / spread(t)) / d
    smallest = (D * ((mean - halves) * spread(t)) ** 2).mean().item()
    levels = math.log2(steps) + 1
    return (smallest / levels + (every - 1) * FLOW) / every


MIXTURE = GaussianMixture(torch.zeros(1, D), SD)
CONSISTENT = GaussianConsistency(torch.zeros(D), SD)
SHARED: dict[str, Any] = {"metric": SquaredL2()}
CASES: dict[str, tuple[Any, Any, float]] = {
    "flow": (FlowMatching(times=UniformTime()), MIXTURE, FLOW),
    "ct": (ConsistencyTraining(discretization=10, **SHARED), MIXTURE, ct(denoised)),
    "ct, consistent": (ConsistencyTraining(discretization=10, **SHARED), CONSISTENT, ct(solved)),
    "cd": (ConsistencyDistillation(MIXTURE, discretization=10, **SHARED), MIXTURE, cd(denoised)),
    "cd, consistent": (
        ConsistencyDistillation(MIXTURE, discretization=10, **SHARED),
        CONSISTENT,
        cd(solved),
    ),
    "stepwise": (Stepwise(10, phases=4, **SHARED), MIXTURE, stepwise(denoised)),
    "stepwise, consistent": (Stepwise(10, phases=4, **SHARED), CONSISTENT, stepwise(solved)),
    "ect": (EasyConsistency(double_every=7, **SHARED), MIXTURE, ect(denoised)),
    "ect, consistent": (EasyConsistency(double_every=7, **SHARED), CONSISTENT, ect(solved)),
    "shortcut": (Shortcut(steps=4, every=2), TwoTimes(), shortcut(4, 2)),
    "shortcut, halves alone": (Shortcut(steps=4, every=1), TwoTimes(), shortcut(4, 1)),
    "cfm": (ConsistencyFlowMatching(delta=0.05, velocity_weight=0.3), MIXTURE, cfm(0.3)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_an_exact_network_is_its_closed_form(name: str) -> None:
    """Gaussian data: the exact networks are linear in x, and what they leave is a variance."""
    objective, net, expected = CASES[name]
    n = 400_000
    batch = Batch(SD * torch.randn(n, D), NoiseKey(11, 27))
    with torch.no_grad():
        values = objective.loss(net, batch, net).per_sample.double()
    error = values.std().item() / math.sqrt(n)
    assert error < 0.02 * expected
    assert abs(values.mean().item() - expected) < 5 * error


@pytest.mark.parametrize(("net", "expected"), [(MIXTURE, D * SD**2), (CONSISTENT, 0.0)])
def test_pairs_of_the_exact_flow_leave_nothing_to_its_consistency_function(
    net: Any, expected: float
) -> None:
    """One step of the denoiser from pure noise is the mean of the data."""
    z = torch.randn(400_000, D)
    batch = Batch(SD * z, NoiseKey(0), z=z)
    with torch.no_grad():
        values = PairDistillation(metric=SquaredL2()).loss(net, batch).per_sample.double()
    assert values.mean().item() == pytest.approx(expected, rel=0.02, abs=1e-9)
