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

    def decay(self, step: Tensor) -> Tensor:
        k = step.double() + 1.0
        return (1.0 - 1.0 / k) ** (self.gamma + 1.0)


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


Average = EMA | CurriculumEMA | PowerEMA | LastPhase


@torch.no_grad()
def update_(averages: Sequence[Tensor], parameters: Sequence[Tensor], decay: Tensor) -> None:
    """e <- e + (1 - decay) (p - e) for float32 averages, in place, on the device."""
    assert len(averages) == len(parameters)
    rate = (1.0 - decay).float()
    for average, parameter in zip(averages, parameters):
        average.lerp_(parameter.detach().float(), rate)
