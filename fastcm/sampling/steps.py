"""The steps of the ODE, from level to level, and the noise that may be added before each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from fastcm import rng
from fastcm.parameterization import Parameterization
from fastcm.sampling.levels import Level, at_data, levels

MIDWAY = ("midpoint", "rk4")
"""Solvers that evaluate in the middle of a step, in t."""


@dataclass(frozen=True)
class Churn:
    """Fresh noise before a step: from sigma up to (1 + gamma) sigma, and down again by the solver.

    gamma is min(s_churn / number of steps, sqrt(2) - 1) where s_min <= sigma <= s_max, else 0.
    Noise levels are sigma / alpha of the path, so that the same numbers mean the same on every
    path; none is raised above that of t_max.

    Args:
        s_churn: how much, >= 0 (EDM: 0 to 100).
        s_min, s_max: where, 0 <= s_min <= s_max.
        s_noise: standard deviation of the noise, > 0 (EDM: 1.003 to 1.007).

    Raises:
        ValueError: a number out of its range.

    Source: Karras et al. 2022, algorithm 2.
    """

    s_churn: float
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.s_churn < math.inf:
            raise ValueError(f"s_churn must be >= 0 and finite, got {self.s_churn}")
        if not 0.0 <= self.s_min <= self.s_max:
            raise ValueError(
                f"s_min and s_max must be 0 <= s_min <= s_max, got {self.s_min}, {self.s_max}"
            )
        if not 0.0 < self.s_noise < math.inf:
            raise ValueError(f"s_noise must be > 0 and finite, got {self.s_noise}")


class Step(NamedTuple):
    """From `at` down to `to`, number i.

    middle: between them in t, where the solver evaluates there.
    noise: (k, s) of k x + s z, which lifts x to `at` from the end of the step before, or None.
    """

    i: int
    at: Level
    to: Level
    middle: Level | None = None
    noise: tuple[float, float] | None = None


def ode_steps(
    p: Parameterization, times: Sequence[float], solver: str, churn: Churn | None = None
) -> list[Step]:
    """The steps from times[0] down to data.

    Raises:
        ValueError, TypeError: churn with a solver that remembers the step before, of more steps
            than there are streams of noise, or that is no `Churn`.
    """
    check_churn(churn, times, solver)
    *starts, end = levels(p, times)
    steps = []
    for i, (at, to) in enumerate(pairwise([*starts, at_data(end)])):
        noise = None
        if churn is not None:
            at, noise = _raised(p, at, churn, len(times))
        middle = None
        if solver in MIDWAY and i + 1 < len(times):
            middle = levels(p, [0.5 * (at.t + to.t)])[0]
        steps.append(Step(i, at, to, middle, noise))
    return steps


def check_churn(churn: Churn | None, times: Sequence[float], solver: str) -> None:
    """Raise unless noise can be added before the steps; see `ode_steps`."""
    if churn is None:
        return
    if not isinstance(churn, Churn):
        raise TypeError(f"churn must be a Churn, got {churn!r}")
    if solver == "dpmpp_2m":
        raise ValueError(
            "churn has no meaning for solver 'dpmpp_2m', whose steps use the denoiser of the one "
            "before, of other noise: take a one-step solver"
        )
    most = rng.NUM_STREAMS - rng.SAMPLE - 1
    if len(times) > most:
        raise ValueError(f"churn has noise for at most {most} times, got {len(times)}")


def _raised(
    p: Parameterization, at: Level, churn: Churn, n: int
) -> tuple[Level, tuple[float, float] | None]:
    """The level from which a step with churn starts, and the noise that leads there."""
    if at.alpha <= 0.0:  # pure noise stays what it is
        return at, None
    ratio = at.sigma / at.alpha
    gamma = min(churn.s_churn / n, math.sqrt(2.0) - 1.0)
    if not churn.s_min <= ratio <= churn.s_max or gamma == 0.0:
        return at, None
    angle = torch.tensor([math.atan((1.0 + gamma) * ratio)], dtype=torch.float64, device="cpu")
    (up, _) = levels(p, p.path.time_at_angle(angle).tolist())
    if up.t <= at.t:  # at t_max
        return at, None
    k = up.alpha / at.alpha
    return up, (k, churn.s_noise * math.sqrt(up.sigma**2 - (k * at.sigma) ** 2))
