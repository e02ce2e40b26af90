"""Exponential moving averages of the weights: decays as functions of the step, and the update.

``decay(step)`` maps the 0-based index of an update, a 0-d int64 device tensor, to beta, a 0-d
float64 tensor; the update after the optimizer's is e <- e + (1 - beta) (p - e).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcm.schedules import CMCurriculum, ICTCurriculum

Ramp = tuple[float, float, float, float]
"""A decay that kernels evaluate, min(first, ((k + second) / (k + third))^fourth)."""


@dataclass(frozen=True)
class EMA:
    """Constant decay, optionally warmed up as min(decay, (1 + k) / (10 + k)).

    Args:
        beta: decay in (0, 1).
        warmup: start with short averages.
    """

    beta: float
    warmup: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ValueError(f"EMA decay must be in (0, 1), got {self.beta}")

    @classmethod
    def half_life(cls, images: float, batch_size: int) -> EMA:
        """The decay at which the weight of a step halves after `images` training images."""
        if not images > 0 or batch_size < 1:
            raise ValueError(f"need images > 0 and batch_size >= 1, got {images} and {batch_size}")
        return cls(0.5 ** (batch_size / images))

    @property
    def ramp(self) -> Ramp | None:
        """A warmed decay in numbers."""
        return (self.beta, 1.0, 10.0, 1.0) if self.warmup else None

    def decay(self, step: Tensor) -> Tensor:
        beta = torch.full_like(step, self.beta, dtype=torch.float64)
        k = step.double()
        return torch.minimum(beta, (1.0 + k) / (10.0 + k)) if self.warmup else beta


@dataclass(frozen=True)
class CurriculumEMA:
    """mu(k) = exp(s0 ln mu0 / (N(k) - 1)) of consistency training, N counting points.

    Args:
        curriculum: N(k).
        mu0: decay in (0, 1) at the first step; CIFAR-10: 0.9.

    Source: Song et al. 2023, appendix C (its N is the number of intervals, ours of points).
    """

    curriculum: CMCurriculum | ICTCurriculum
    mu0: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.mu0 < 1:
            raise ValueError(f"CurriculumEMA mu0 must be in (0, 1), got {self.mu0}")

    def decay(self, step: Tensor) -> Tensor:
        n = self.curriculum.points(step).double() - 1.0
        return (self.curriculum.s0 * math.log(self.mu0) / n).exp()


@functools.cache
def _gamma(std: float) -> float:
    inverse = std**-2

    def cubic(g: float) -> float:
        return ((g + 7.0) * g + 16.0 - inverse) * g + 12.0 - inverse

    low, high = 0.0, std**-1
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if cubic(middle) > 0 else (middle, high)
    return 0.5 * (low + high)


@dataclass(frozen=True)
class PowerEMA:
    """Power-function average of relative width `std`: beta = (1 - 1 / k)^(gamma + 1).

    Args:
        std: relative standard deviation of the profile, in (0, 0.28); EDM2 keeps 0.05 and 0.10.

    Source: Karras et al. 2023, "Analyzing and improving the training dynamics of diffusion
    models" (EDM2), eq. 123 and algorithm 2.
    """

    std: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.std < 12**-0.5:
            raise ValueError(f"PowerEMA std must be in (0, {12**-0.5:.3f}), got {self.std}")

    @property
    def gamma(self) -> float:
        """The largest real root of g^3 + 7 g^2 + (16 - std^-2) g + (12 - std^-2) = 0."""
        return _gamma(self.std)

    @property
    def ramp(self) -> Ramp:
        """The decay in numbers."""
        return 1.0, 0.0, 1.0, self.gamma + 1.0

    def decay(self, step: Tensor) -> Tensor:
        k = step.double() + 1.0
        return (1.0 - 1.0 / k) ** (self.gamma + 1.0)


@dataclass(frozen=True)
class WarmupEMA:
    """beta = 1 - (1 + k / inv_gamma)^-power, within [minimum, beta]; the first update copies.

    Args:
        beta: largest decay, in (0, 1).
        inv_gamma: > 0, the steps over which the warm-up unfolds.
        power: > 0; 2/3 for a million steps and more, 3/4 for fewer.
        minimum: smallest decay after the first update, in [0, beta].

    Source: `EMAModel` of diffusers with ``use_ema_warmup``, and ema-pytorch, where `beta` is the
    decay; their ``update_after_step`` is `DelayedEMA`.
    """

    beta: float = 0.9999
    inv_gamma: float = 1.0
    power: float = 2 / 3
    minimum: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ValueError(f"WarmupEMA beta must be in (0, 1), got {self.beta}")
        if not (self.inv_gamma > 0 and self.power > 0):
            raise ValueError(
                f"WarmupEMA needs inv_gamma > 0 and power > 0, got {self.inv_gamma} and "
                f"{self.power}"
            )
        if not 0 <= self.minimum <= self.beta:
            raise ValueError(
                f"WarmupEMA minimum must be in [0, {self.beta}], the largest decay, got "
                f"{self.minimum}"
            )

    def decay(self, step: Tensor) -> Tensor:
        beta = 1.0 - (1.0 + step.double() / self.inv_gamma) ** -self.power
        return torch.where(step > 0, beta.clamp(self.minimum, self.beta), 0.0)


@dataclass(frozen=True)
class HalfLifeEMA:
    """beta = 0.5^(batch_size / h), h the half-life in images, at most `rampup` of those seen.

    Args:
        images: half-life, > 0; EDM: 500,000 on CIFAR-10.
        batch_size: images a step, >= 1.
        rampup: > 0, share of the images seen before the step; EDM: 0.05. Without it the decay is
            constant: `EMA.half_life`.

    Source: Karras et al. 2022 (EDM), its training loop's ``ema_rampup_ratio``.
    """

    images: float
    batch_size: int
    rampup: float = 0.05

    def __post_init__(self) -> None:
        if not self.images > 0 or self.batch_size < 1 or not self.rampup > 0:
            raise ValueError(
                "HalfLifeEMA needs images > 0, batch_size >= 1 and rampup > 0, got "
                f"{self.images}, {self.batch_size} and {self.rampup}"
            )

    def decay(self, step: Tensor) -> Tensor:
        half_life = (step.double() * (self.rampup * self.batch_size)).clamp_max(self.images)
        beta: Tensor = 0.5 ** (self.batch_size / half_life)  # 0 at step 0, where 1 / 0 is infinite
        return beta


@dataclass(frozen=True)
class DelayedEMA:
    """The weights themselves for `start` updates, then an average that begins there.

    Args:
        average: what begins; its first step is `start`.
        start: >= 0, how many updates copy the weights.
    """

    average: EMA | CurriculumEMA | PowerEMA | WarmupEMA | HalfLifeEMA
    start: int

    def __post_init__(self) -> None:
        if self.start < 0:
            raise ValueError(f"DelayedEMA start must be >= 0, got {self.start}")

    def decay(self, step: Tensor) -> Tensor:
        later = self.average.decay((step - self.start).clamp_min(0))
        return torch.where(step < self.start, 0.0, later)


@dataclass(frozen=True)
class LastPhase:
    """The weights as they were when the last phase of `steps` updates ended; before, the first.

    Source: seed eq. 3-4, where each network is trained to the finished one before it.
    """

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"LastPhase steps must be >= 1, got {self.steps}")

    def decay(self, step: Tensor) -> Tensor:
        return ((step + 1) % self.steps != 0).double()


Average = EMA | CurriculumEMA | PowerEMA | WarmupEMA | HalfLifeEMA | DelayedEMA | LastPhase


@torch.no_grad()
def update_(averages: Sequence[Tensor], parameters: Sequence[Tensor], decay: Tensor) -> None:
    """e <- e + (1 - decay) (p - e) for float32 averages, in place, on the device."""
    assert len(averages) == len(parameters)
    rate = (1.0 - decay).float()
    for average, parameter in zip(averages, parameters):
        average.lerp_(parameter.detach().float(), rate)
