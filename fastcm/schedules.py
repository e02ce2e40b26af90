"""Time grids, curricula of the number of grid points, and time samplers.

Everything is a pure function of device tensors: a curriculum of the step counter, a sampler of
uniform numbers, so that a captured step changes them without the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor

from fastcm.paths import Path


@dataclass(frozen=True)
class UniformGrid:
    """t_k = t_min + (k / n) (t_max - t_min), k = 0..n (seed; t_k = k / n on `Linear`)."""

    def time(self, k: Tensor, n: Tensor | int, path: Path) -> Tensor:
        """Time of grid index `k` of `n` intervals, float64, the shape of k."""
        return path.t_min + k.double() / n * (path.t_max - path.t_min)

    def index(self, t: Tensor, n: Tensor | int, path: Path) -> Tensor:
        """The inverse of `time`, fractional."""
        return (t.double() - path.t_min) / (path.t_max - path.t_min) * n


@dataclass(frozen=True)
class KarrasGrid:
    """t_k = (t_min^(1/rho) + (k / n) (t_max^(1/rho) - t_min^(1/rho)))^rho, k = 0..n.

    n intervals are N = n + 1 points in the papers' count. Source: Karras et al. 2022, eq. 5.
    """

    rho: float = 7.0

    def __post_init__(self) -> None:
        if not self.rho > 0:
            raise ValueError(f"KarrasGrid rho must be > 0, got {self.rho}")

    def time(self, k: Tensor, n: Tensor | int, path: Path) -> Tensor:
        """Time of grid index `k` of `n` intervals, float64, the shape of k."""
        low, high = path.t_min ** (1 / self.rho), path.t_max ** (1 / self.rho)
        t = (low + k.double() / n * (high - low)) ** self.rho
        # powers round: the ends are exact, since f(x, t_min) = x must be
        t = torch.where(k <= 0, path.t_min, t)
        return torch.where(k.double() >= n, path.t_max, t)

    def index(self, t: Tensor, n: Tensor | int, path: Path) -> Tensor:
        """The inverse of `time`, fractional."""
        low, high = path.t_min ** (1 / self.rho), path.t_max ** (1 / self.rho)
        index: Tensor = (t.double().pow(1 / self.rho) - low) / (high - low) * n
        return index


@dataclass(frozen=True)
class ShiftedGrid:
    """t_k = s u / (1 + (s - 1) u), u = k / n, of the range of the path: denser where s leads.

    s > 1 puts more of the times at the noise, as flows of many pixels want. The same shift of
    `LogitNormal` times is that of their mean by ln s.

    Args:
        shift: s > 0; 1 is `UniformGrid`. SD3: 3; of a resolution: exp(`resolution_mu`).

    Source: Esser et al. 2024, "Scaling rectified flow transformers", eq. 23.
    """

    shift: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise ValueError(f"ShiftedGrid shift must be > 0 and finite, got {self.shift}")

    def time(self, k: Tensor, n: Tensor | int, path: Path) -> Tensor:
        """Time of grid index `k` of `n` intervals, float64, the shape of k."""
        u = k.double() / n
        shifted = self.shift * u / (1.0 + (self.shift - 1.0) * u)
        t = path.t_min + shifted * (path.t_max - path.t_min)
        return torch.where(k.double() >= n, path.t_max, t)

    def index(self, t: Tensor, n: Tensor | int, path: Path) -> Tensor:
        """The inverse of `time`, fractional."""
        shifted = (t.double() - path.t_min) / (path.t_max - path.t_min)
        return shifted / (self.shift - (self.shift - 1.0) * shifted) * n


def resolution_mu(
    tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base: float = 0.5,
    max: float = 1.15,
) -> float:
    """mu, the log of the shift, as a line through (base_tokens, base) and (max_tokens, max).

    Args:
        tokens: of the transformer, for one sample: of Flux and SD3 a patch of 2 x 2 latents each.

    Source: Flux's published sampling code (Black Forest Labs 2024, `get_lin_function`); Esser et
    al. 2024, section 5.3.2, have sqrt(tokens / base_tokens) as the shift.
    """
    slope = (max - base) / (max_tokens - base_tokens)
    return base + slope * (tokens - base_tokens)


Grid = Union[UniformGrid, KarrasGrid, ShiftedGrid]


@dataclass(frozen=True)
class CMCurriculum:
    """N(k) of consistency training: the grid grows as the square root of the step.

    Args:
        total_steps: K >= 1.
        s0, s1: first and last number of grid points; CIFAR-10: 2 and 150.

    Source: Song et al. 2023, appendix C.
    """

    total_steps: int
    s0: int = 2
    s1: int = 150

    def __post_init__(self) -> None:
        _check_curriculum(self.total_steps, self.s0, self.s1)

    def points(self, step: Tensor) -> Tensor:
        """N at step k, int64."""
        k = step.double().clamp_max(self.total_steps)
        squared = k / self.total_steps * ((self.s1 + 1) ** 2 - self.s0**2) + self.s0**2
        return (squared.sqrt() - 1.0).ceil().clamp_min(1.0).long() + 1


@dataclass(frozen=True)
class ICTCurriculum:
    """N(k) of improved consistency training: doubling at equal distances.

    Source: Song & Dhariwal 2023, eq. 11.
    """

    total_steps: int
    s0: int = 10
    s1: int = 1280

    def __post_init__(self) -> None:
        _check_curriculum(self.total_steps, self.s0, self.s1)

    def points(self, step: Tensor) -> Tensor:
        """N at step k, int64."""
        doublings = math.log2(self.s1 // self.s0) + 1
        every = max(math.floor(self.total_steps / doublings), 1)
        # past s1 already, and 2^stage must not overflow
        stage = torch.div(step, every, rounding_mode="floor").clamp_max(math.ceil(doublings))
        return (self.s0 * 2**stage).clamp_max(self.s1) + 1


def _check_curriculum(total_steps: int, s0: int, s1: int) -> None:
    if total_steps < 1 or not 1 <= s0 <= s1:
        raise ValueError(
            f"need total_steps >= 1 and 1 <= s0 <= s1, got {total_steps}, s0={s0}, s1={s1}"
        )


Curriculum = Union[CMCurriculum, ICTCurriculum]


def intervals(discretization: int | Curriculum, step: Tensor) -> Tensor | int:
    """Number of grid intervals at `step`: N - 1 of a curriculum, or the given constant."""
    if isinstance(discretization, int):
        return discretization
    return discretization.points(step) - 1


TimeSampler = Callable[[Tensor, float, float], Tensor]
"""``sampler(u, t_min, t_max) -> t`` from uniforms in (0, 1), float64 ``[B]``."""


@dataclass(frozen=True)
class UniformTime:
    """t uniform on [t_min, t_max]."""

    def __call__(self, u: Tensor, t_min: float, t_max: float) -> Tensor:
        return t_min + u * (t_max - t_min)


@dataclass(frozen=True)
class LogitNormal:
    """logit of the relative time ~ N(mean, std^2). Source: Esser et al. 2024, section 3.1."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_std(self.std)

    def __call__(self, u: Tensor, t_min: float, t_max: float) -> Tensor:
        relative = torch.sigmoid(self.mean + self.std * normal_quantile(u))
        return t_min + relative * (t_max - t_min)


@dataclass(frozen=True)
class LogNormal:
    """ln t ~ N(mean, std^2), truncated to [t_min, t_max].

    On a grid this is iCT's discretised lognormal, p_i ~ erf(ln t_{i+1}) - erf(ln t_i): the mass of
    an interval is the probability that t falls into it. Source: Song & Dhariwal 2023, section 3.5.
    """

    mean: float = -1.1
    std: float = 2.0

    def __post_init__(self) -> None:
        _check_std(self.std)

    def __call__(self, u: Tensor, t_min: float, t_max: float) -> Tensor:
        def cdf(t: float) -> float:
            if t <= 0:
                return 0.0
            return 0.5 * (1 + math.erf((math.log(t) - self.mean) / (math.sqrt(2) * self.std)))

        low, high = cdf(t_min), cdf(t_max)
        t: Tensor = (self.mean + self.std * normal_quantile(low + u * (high - low))).exp()
        return t.clamp(t_min, t_max)


def normal_quantile(u: Tensor) -> Tensor:
    """The standard normal quantile; compiled code fuses erfinv, and calls out for ndtri."""
    return math.sqrt(2.0) * torch.erfinv(2.0 * u - 1.0)


def _check_std(std: float) -> None:
    if not std > 0:
        raise ValueError(f"std must be > 0, got {std}")


def draw_interval(
    u: Tensor,
    n: Tensor | int,
    grid: Grid,
    path: Path,
    sampler: TimeSampler | None = None,
    skip: int = 1,
) -> tuple[Tensor, Tensor]:
    """Grid times (t, s) = (t_k, t_{k - skip}), neighbours unless skip > 1; float64 ``[B]``.

    Args:
        u: uniforms in (0, 1), float64 ``[B]``.
        n: number of intervals, int or 0-d tensor.
        sampler: None draws k uniformly from skip..n; else k is the interval that a time of this
            density falls into, and at least skip.
        skip: intervals from t down to s, 1 <= skip <= n.
    """
    if sampler is None:
        k = (u * (n - skip + 1)).floor() + skip
    else:
        k = grid.index(sampler(u, path.t_min, path.t_max), n, path).ceil()
    k = k.clamp_min(skip)
    # a number is clamped to as it is: made a tensor it would wait for the device
    k = torch.minimum(k, n.double()) if isinstance(n, Tensor) else k.clamp_max(n)
    return grid.time(k, n, path), grid.time(k - skip, n, path)


def sampling_times(grid: Grid, steps: int, path: Path) -> list[float]:
    """The `steps` descending times of a sampler's evaluations, from t_max on; t_min is not one.

    Raises:
        ValueError: steps < 1.
        TypeError: `grid` is none.
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    if isinstance(grid, type) or not hasattr(grid, "time"):
        raise TypeError(
            f"grid must be an object such as fastcm.schedules.KarrasGrid(), got {grid!r:.80}"
        )
    k = torch.arange(steps, 0, -1, dtype=torch.float64, device="cpu")
    times: list[float] = grid.time(k, steps, path).tolist()
    return times
