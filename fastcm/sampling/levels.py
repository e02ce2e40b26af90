"""A parameterization at the times of a sampler, as Python floats.

They are computed in float64 before the first evaluation: no step reads a tensor for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastcm.parameterization import Parameterization


class Level(NamedTuple):
    """A parameterization at one time: path alpha, sigma; f = a x + b F; v = c x + d F.

    c_in and c_noise are what the network's input is multiplied by, and what it is told of t.
    """

    t: float
    alpha: float
    sigma: float
    a: float
    b: float
    c: float
    d: float
    c_in: float | None
    c_noise: float

    @property
    def log_snr(self) -> float:
        """ln(alpha / sigma), half the log signal-to-noise ratio: -inf at noise, inf at data."""
        if self.alpha <= 0:
            return -math.inf
        return math.log(self.alpha / self.sigma) if self.sigma > 0 else math.inf


def levels(p: Parameterization, times: Sequence[float]) -> list[Level]:
    """The levels of `times`, then that of t_min; there the velocity may be infinite."""
    t = torch.tensor([*times, p.path.t_min], dtype=torch.float64, device="cpu")
    alpha, sigma, _, _ = p.path.at(t)
    c_in = p.c_in(t)
    columns = [c.tolist() for c in (t, alpha, sigma, *p.coefficients(t))]
    columns.append([None] * len(t) if c_in is None else c_in.tolist())
    columns.append(p.path.c_noise(t).tolist())
    return [Level(*values) for values in zip(*columns)]


def fresh_sigma(to: Level, end: Level) -> float:
    """Of the noise that a multi-step sampler adds to samples of the end's time to be at `to`.

    Source: Song et al. 2023, algorithm 1, sqrt(t^2 - t_min^2).
    """
    return math.sqrt(to.sigma**2 - end.sigma**2)


def at_data(end: Level) -> Level:
    """The end of the ODE: data, also on a path that leaves t_min > 0 of noise, where t is sigma.

    Source: Karras et al. 2022, algorithm 1, whose last step ends at sigma = 0.
    """
    return end if end.sigma == 0.0 else end._replace(t=end.t - end.sigma, alpha=1.0, sigma=0.0)
