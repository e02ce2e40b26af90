"""Metrics between a student output and its target, and weights over time.

A metric reduces the *whole* sample before anything non-linear happens: pseudo-Huber per element is
another loss (MATH: Song & Dhariwal 2023, "Improved techniques for training consistency models",
eq. 12). Every metric is a callable ``metric(f, target) -> [B]``; any function of that form, such
as LPIPS, serves too.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcm.paths import Path

PSEUDO_HUBER_SCALE = 0.00054


def _sum(r: Tensor) -> Tensor:
    # flattened last: compiled backward passes read r in its own shape, measured 12 % faster
    return r.flatten(1).sum(1)


def _over(value: Tensor, r: Tensor) -> Tensor:
    return value.reshape(-1, *[1] * (r.dim() - 1))


class SampleMetric(ABC):
    """A metric of the residual r = f - target, with its gradient written out for the kernels."""

    @abstractmethod
    def value(self, r: Tensor) -> Tensor:
        """The metric of residuals ``[B, ...]``, ``[B]``."""

    @abstractmethod
    def gradient(self, r: Tensor) -> Tensor:
        """d value / d r, the shape of r."""

    def __call__(self, f: Tensor, target: Tensor) -> Tensor:
        return self.value(f - target)


@dataclass(frozen=True)
class SquaredL2(SampleMetric):
    """sum r^2 over the sample."""

    def value(self, r: Tensor) -> Tensor:
        return _sum(r.square())

    def gradient(self, r: Tensor) -> Tensor:
        return 2.0 * r


@dataclass(frozen=True)
class AdaptiveL2(SampleMetric):
    """S / (S + c)^p for S = sum r^2 over the sample, the factor of S a constant of the gradient.

    Args:
        p: power >= 0; 1 makes the gradients of all samples about as large.
        c: > 0.

    Source: Geng et al. 2025, "Mean flows for one-step generative modeling", eq. 22.
    """

    p: float = 1.0
    c: float = 0.01

    def __post_init__(self) -> None:
        if not (self.p >= 0 and self.c > 0):
            raise ValueError(f"AdaptiveL2 needs p >= 0 and c > 0, got {self.p} and {self.c}")

    def value(self, r: Tensor) -> Tensor:
        squared = _sum(r.square())
        return squared / (squared.detach() + self.c).pow(self.p)

    def gradient(self, r: Tensor) -> Tensor:
        return 2.0 * r / _over((_sum(r.square()) + self.c).pow(self.p), r)


@dataclass(frozen=True)
class L2(SampleMetric):
    """sqrt(sum r^2) over the sample; the gradient at r = 0 is 0."""

    def value(self, r: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(r.flatten(1), dim=1)
        return norm

    def gradient(self, r: Tensor) -> Tensor:
        norm = _over(self.value(r), r)
        return torch.where(norm == 0, 0.0, r / norm)


@dataclass(frozen=True)
class L1(SampleMetric):
    """sum |r| over the sample."""

    def value(self, r: Tensor) -> Tensor:
        return _sum(r * self.gradient(r).detach())  # |r|, with NaN in its gradient, too

    def gradient(self, r: Tensor) -> Tensor:
        return torch.where(r.isnan(), r, r.sign())


@dataclass(frozen=True)
class PseudoHuber(SampleMetric):
    """sqrt(sum r^2 + c^2) - c over the sample.

    Args:
        c: > 0; None means 0.00054 sqrt(D), D the elements of a sample.

    Source: Song & Dhariwal 2023, eq. 12 and section 3.3.
    """

    c: float | None = None

    def __post_init__(self) -> None:
        if self.c is not None and not self.c > 0:
            raise ValueError(f"PseudoHuber c must be > 0, got {self.c}; for c -> 0 use L2()")

    def scale(self, elements: int) -> float:
        """The constant c for samples of `elements` elements."""
        return PSEUDO_HUBER_SCALE * math.sqrt(elements) if self.c is None else self.c

    def value(self, r: Tensor) -> Tensor:
        c = self.scale(r.shape[1:].numel())
        squared = _sum(r.square())
        root = (squared + c * c).sqrt()
        # root - c without its cancellation near zero, and with its cheaper gradient
        value: Tensor = squared.detach() / (root.detach() + c) + (root - root.detach())
        return value

    def gradient(self, r: Tensor) -> Tensor:
        c = self.scale(r.shape[1:].numel())
        return r / _over((_sum(r.square()) + c * c).sqrt(), r)


@dataclass(frozen=True)
class ElementwiseHuber(SampleMetric):
    """The mean over the elements of sqrt(r^2 + c^2) - c.

    Another loss than `PseudoHuber`, not another scale of it: each element has a bend of its own, so
    a large error in one element leaves the pull on the others as it is.

    Args:
        c: > 0.

    Source: the published training script of LCM (Luo et al. 2023), ``--loss_type huber``.
    """

    c: float = 0.001

    def __post_init__(self) -> None:
        if not self.c > 0:
            raise ValueError(f"ElementwiseHuber c must be > 0, got {self.c}")

    def value(self, r: Tensor) -> Tensor:
        squared = r.square()
        # root - c without its cancellation near zero
        return (squared / ((squared + self.c * self.c).sqrt() + self.c)).flatten(1).mean(1)

    def gradient(self, r: Tensor) -> Tensor:
        root = (r.square() + self.c * self.c).sqrt()
        return r / (root * r.shape[1:].numel())


@dataclass(frozen=True)
class ElementwiseL2(SampleMetric):
    """The mean over the elements of r^2: `SquaredL2` over D.

    Source: as `ElementwiseHuber`, ``--loss_type l2``.
    """

    def value(self, r: Tensor) -> Tensor:
        return r.square().flatten(1).mean(1)

    def gradient(self, r: Tensor) -> Tensor:
        return 2.0 / r.shape[1:].numel() * r


Metric = SampleMetric | Callable[[Tensor, Tensor], Tensor]

Weight = Callable[[Tensor, Tensor, Path], Tensor]
"""``weight(t, s, path) -> [B]`` from float64 times ``t > s``; ``s`` is ``t_min`` where a method
has no second time."""


def uniform(t: Tensor, s: Tensor, path: Path) -> Tensor:
    """1 for every time."""
    return torch.ones_like(t)


@dataclass(frozen=True)
class Learned:
    """exp(-u(t)) base(t, s) / D with a learned log-variance u, which is added to the loss.

    The weight under which the expected loss is the same at every time. The network holds
    ``log_variance``, a `fastcm.networks.LogVariance`: networks here are ``log_variance=True``.

    Args:
        base: the weight that it multiplies.

    Source: Karras et al. 2024 (EDM2), eq. 14-15; Lu & Song 2024 (sCM), section 4.3.
    """

    base: Weight = uniform

    def __call__(self, t: Tensor, s: Tensor, path: Path) -> Tensor:
        return self.base(t, s, path)


def inverse_gap(t: Tensor, s: Tensor, path: Path) -> Tensor:
    """1 / (t - s), as iCT and ECT weight neighbouring times."""
    return 1.0 / (t - s)


def inverse_square(t: Tensor, s: Tensor, path: Path) -> Tensor:
    """1 / t^2: turns a denoiser error into a velocity error on the linear path (seed eq. 2)."""
    return 1.0 / t.square()


def snr(t: Tensor, s: Tensor, path: Path) -> Tensor:
    """Signal-to-noise ratio alpha^2 / sigma^2."""
    at = path.at(t)
    return (at.alpha / at.sigma).square()


def snr_plus_one(t: Tensor, s: Tensor, path: Path) -> Tensor:
    """SNR + 1: makes of the error of x0 that of "v" on `VariancePreserving`.

    Source: Salimans & Ho 2022, "Progressive distillation", section 4.
    """
    return snr(t, s, path) + 1.0


def truncated_snr(t: Tensor, s: Tensor, path: Path) -> Tensor:
    """max(SNR, 1). Source: Salimans & Ho 2022, "Progressive distillation", section 4."""
    return snr(t, s, path).clamp_min(1.0)


@dataclass(frozen=True)
class MinSNR:
    """min(SNR, gamma). Source: Hang et al. 2023, "Efficient diffusion training via min-SNR"."""

    gamma: float = 5.0

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"MinSNR gamma must be > 0, got {self.gamma}")

    def __call__(self, t: Tensor, s: Tensor, path: Path) -> Tensor:
        return snr(t, s, path).clamp_max(self.gamma)


@dataclass(frozen=True)
class Karras:
    """(sigma^2 + alpha^2 sd^2) / (sigma sd)^2, EDM's weight of the denoiser error (Karras 2022)."""

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise ValueError(f"Karras sigma_data must be > 0, got {self.sigma_data}")

    def __call__(self, t: Tensor, s: Tensor, path: Path) -> Tensor:
        at = path.at(t)
        total = at.sigma.square() + (at.alpha * self.sigma_data).square()
        return total / (at.sigma * self.sigma_data).square()
