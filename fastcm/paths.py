"""Paths from data to noise: x_t = alpha(t) x0 + sigma(t) z, with t = 0 on the side of the data.

A path only produces coefficients, in float64 on ``[B]`` vectors of times. Any two paths differ by
a rescaling of x at equal sigma / alpha (`rescale`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Point(NamedTuple):
    """Coefficients of a path at times ``[B]`` and their derivatives in t, float64 ``[B]``."""

    alpha: Tensor
    sigma: Tensor
    alpha_dot: Tensor
    sigma_dot: Tensor


class Path(ABC):
    """A path x_t = alpha(t) x0 + sigma(t) z on [t_min, t_max]."""

    t_min: float
    t_max: float
    default_prediction: str = "v"

    @abstractmethod
    def _at(self, t: Tensor) -> Point: ...

    @abstractmethod
    def velocity_target(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(p, q) of the network target p x0 + q z that this path calls "v"."""

    @abstractmethod
    def time_at_angle(self, angle: Tensor) -> Tensor:
        """The time at which atan2(sigma, alpha) is `angle`, clamped to the path's range."""

    def at(self, t: Tensor) -> Point:
        """Coefficients at times `t`.

        Args:
            t: ``[B]``, any float dtype, in [t_min, t_max].

        Raises:
            ValueError: a time lies outside the range (checked where that costs no device
                synchronisation: on the CPU, outside compiled code).
        """
        if t.device.type == "cpu" and not torch.compiler.is_compiling() and t.numel():
            self.check_times((t.min().item(), t.max().item()))
        return self._at(t.double())

    def check_times(self, times: Sequence[float]) -> None:
        """Raise ValueError if one of `times` lies outside [t_min, t_max]."""
        slack = 1e-6 * (self.t_max - self.t_min)  # float32 times may round past the ends
        for t in times:
            if not self.t_min - slack <= t <= self.t_max + slack:
                raise ValueError(
                    f"t = {t} is outside [{self.t_min}, {self.t_max}], the range of {self}"
                )

    def c_in(self, t: Tensor) -> Tensor | None:
        """Factor on the network's input, or None where it is 1."""
        return None

    def c_noise(self, t: Tensor) -> Tensor:
        """What the network is told of the time, before its own embedding."""
        return t

    def time_of(self, c_noise: Tensor) -> Tensor:
        """The inverse of `c_noise`."""
        return c_noise


@dataclass(frozen=True)
class Linear(Path):
    """Rectified flow: x_t = (1 - t) x0 + t z, t in [0, 1]; the network predicts v = z - x0.

    Source: Liu et al. 2022, "Flow straight and fast".
    """

    t_min = 0.0
    t_max = 1.0

    def _at(self, t: Tensor) -> Point:
        one = torch.ones_like(t)
        return Point(1.0 - t, t, -one, one)

    def velocity_target(self, t: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(t)
        return -one, one

    def time_at_angle(self, angle: Tensor) -> Tensor:
        return angle.sin() / (angle.sin() + angle.cos())


@dataclass(frozen=True)
class VarianceExploding(Path):
    """x_t = x0 + t z, t in [t_min, t_max], with the preconditioning of EDM.

    Args:
        t_min: smallest noise level, > 0.
        t_max: largest noise level.
        sigma_data: standard deviation of the data, > 0.
        c_noise_scale: c_noise / ln t; consistency models: 250, EDM: 0.25.

    Source: Karras et al. 2022, table 1; Song et al. 2023, "Consistency models", appendix C.
    """

    t_min: float = 0.002
    t_max: float = 80.0
    sigma_data: float = 0.5
    c_noise_scale: float = 250.0
    default_prediction = "cm"

    def __post_init__(self) -> None:
        if not 0 < self.t_min < self.t_max:
            raise ValueError(f"need 0 < t_min < t_max, got {self.t_min} and {self.t_max}")
        if not self.sigma_data > 0 or not self.c_noise_scale > 0:
            raise ValueError(f"sigma_data and c_noise_scale must be > 0, got {self}")

    def _at(self, t: Tensor) -> Point:
        one = torch.ones_like(t)
        return Point(one, t, torch.zeros_like(t), one)

    def velocity_target(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)

    def time_at_angle(self, angle: Tensor) -> Tensor:
        return angle.tan().clamp(self.t_min, self.t_max)

    def c_in(self, t: Tensor) -> Tensor:
        return (t.double().square() + self.sigma_data**2).rsqrt()

    def c_noise(self, t: Tensor) -> Tensor:
        return self.c_noise_scale * t.log()

    def time_of(self, c_noise: Tensor) -> Tensor:
        return (c_noise / self.c_noise_scale).exp()


@dataclass(frozen=True)
class TrigFlow(Path):
    """x_t = cos(t) x0 + sin(t) sigma_data z, t in [0, pi/2]; the velocity is sigma_data F.

    Source: Lu & Song 2024, "Simplifying, stabilizing and scaling continuous-time consistency
    models", section 3.
    """

    sigma_data: float = 0.5
    t_min = 0.0
    t_max = math.pi / 2

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data must be > 0, got {self.sigma_data}")

    def _at(self, t: Tensor) -> Point:
        c, s, sd = t.cos(), t.sin(), self.sigma_data
        return Point(c, sd * s, -s, sd * c)

    def velocity_target(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -t.sin() / self.sigma_data, t.cos()

    def time_at_angle(self, angle: Tensor) -> Tensor:
        return torch.atan2(angle.sin(), self.sigma_data * angle.cos())

    def c_in(self, t: Tensor) -> Tensor:
        return torch.full_like(t, 1.0 / self.sigma_data, dtype=torch.float64)


@dataclass(frozen=True)
class VariancePreserving(Path):
    """x_t = sqrt(abar) x0 + sqrt(1 - abar) z on the discrete schedule of DDPM, made continuous.

    t = k is the state after k noising steps: abar(0) = 1 is data and index i of a DDPM schedule is
    t = i + 1, which the network is told as c_noise = i (0 below t = 1, where DDPM has no index).
    Between the integers ln abar is linear. Here "v" is alpha z - sigma x0 (Salimans & Ho 2022),
    the velocity per unit angle.

    Args:
        num_steps: length of the schedule, >= 2.
        beta_start, beta_end: first and last beta, 0 < beta_start <= beta_end < 1.
        scaled: True: linear in sqrt(beta) (Stable Diffusion, LCM); False: linear in beta (DDPM).
    """

    num_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    scaled: bool = True
    t_min = 0.0
    default_prediction = "eps"

    def __post_init__(self) -> None:
        if self.num_steps < 2:
            raise ValueError(f"num_steps must be >= 2, got {self.num_steps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"need 0 < beta_start <= beta_end < 1, got {self.beta_start} and {self.beta_end}"
            )

    @property
    def t_max(self) -> float:  # type: ignore[override]
        return float(self.num_steps)

    def _log_abar(self, device: torch.device) -> Tensor:
        power = 2.0 if self.scaled else 1.0
        ends = self.beta_start ** (1 / power), self.beta_end ** (1 / power)
        betas = torch.linspace(*ends, self.num_steps, dtype=torch.float64, device=device) ** power
        return torch.cat([betas.new_zeros(1), torch.log1p(-betas).cumsum(0)])

    def _at(self, t: Tensor) -> Point:
        table = self._log_abar(t.device)
        low = t.floor().clamp(0, self.num_steps - 1).long()
        slope = table[low + 1] - table[low]
        log_abar = table[low] + (t - low) * slope
        alpha = (0.5 * log_abar).exp()
        sigma = (-torch.expm1(log_abar)).clamp_min(0.0).sqrt()
        alpha_dot = 0.5 * slope * alpha
        return Point(alpha, sigma, alpha_dot, -alpha * alpha_dot / sigma)

    def velocity_target(self, t: Tensor) -> tuple[Tensor, Tensor]:
        at = self._at(t.double())
        return -at.sigma, at.alpha

    def time_at_angle(self, angle: Tensor) -> Tensor:
        table = self._log_abar(angle.device)
        log_abar = 2.0 * angle.double().cos().clamp_min(1e-300).log()
        low = (torch.searchsorted(-table, -log_abar) - 1).clamp(0, self.num_steps - 1)
        t = low + (log_abar - table[low]) / (table[low + 1] - table[low])
        return t.clamp(self.t_min, self.t_max)

    def c_noise(self, t: Tensor) -> Tensor:
        return (t - 1.0).clamp_min(0.0)

    def time_of(self, c_noise: Tensor) -> Tensor:
        return c_noise + 1.0


def rescale(source: Path, target: Path, t: Tensor) -> tuple[Tensor, Tensor]:
    """Where `target` has the noise level that `source` has at `t`.

    Args:
        source, target: two paths.
        t: ``[B]``, times on `source`.

    Returns:
        (t', scale), float64 ``[B]``: x on `source` at t, times scale, is x on `target` at t'.
        A level that `target` does not reach is clamped to the end of its range.
    """
    at = source.at(t)
    there_t = target.time_at_angle(torch.atan2(at.sigma, at.alpha))
    there = target._at(there_t)
    return there_t, torch.hypot(there.alpha, there.sigma) / torch.hypot(at.alpha, at.sigma)
