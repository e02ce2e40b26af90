"""The Frechet distance between Gaussians fitted to features, and how sure it is.

|m - m'|^2 + tr(C + C' - 2 (C'^1/2 C C'^1/2)^1/2): Dowson and Landau 1982; of Inception's features
Heusel et al. 2017 (FID). float64 throughout. A factor R of C' = R R^T leaves out directions without
variance, so the root's trace, sum_i lambda_i(R^T C R)^1/2, is of one symmetric matrix, which is
as large as the rank of C', or as the number of samples if these are fewer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

GROUPS = 20
_ROWS = 4096  # as float64 at once
_QUANTILE = 2.093  # of Student's t, 0.975 with GROUPS - 1 degrees of freedom


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval.

    Args:
        value: computed from all samples.
        low, high: ends of the interval of 95 %; None where there are too few samples to say.
    """

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean and covariance of features.

    Args:
        mean: float64 ``[D]``.
        covariance: float64 ``[D, D]``, divided by N - 1.
    """

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """Fitted to ``[N, D]``; ValueError for less than two rows."""
        check_count(len(features))
        mean = features.double().mean(0)
        total = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64, device="cpu")
        for rows in torch.split(features, _ROWS):
            centred = rows.double() - mean
            total += centred.T @ centred
        return cls(mean, total / (len(features) - 1))

    @cached_property
    def root(self) -> Tensor:
        """R ``[D, rank]`` with R R^T the covariance, without what rounding made negative or 0."""
        values, vectors = torch.linalg.eigh(self.covariance)
        kept = values > values[-1:].clamp_min(0) * len(values) * torch.finfo(values.dtype).eps
        root: Tensor = vectors[:, kept] * values[kept].sqrt()
        return root


def check_count(n: int) -> None:
    """ValueError unless n samples have a covariance."""
    if n < 2:
        raise ValueError(f"a Frechet distance needs at least 2 samples, got {n}")


def frechet_distance(features: Tensor, reference: Gaussian) -> float:
    """The distance of features ``[N, D]`` to a Gaussian; ValueError for less than two rows."""
    n = len(features)
    check_count(n)
    if n >= reference.root.shape[1]:
        return _Sums.of(features, reference).distance(reference)
    x = features.double()
    centred = x - x.mean(0)
    projected = centred @ reference.root / math.sqrt(n - 1)
    trace = centred.square().sum() / (n - 1)
    return _distance(x.mean(0) - reference.mean, trace, projected @ projected.T, reference)


def frechet_estimate(features: Tensor, reference: Gaussian, *, seed: int = 0) -> Estimate:
    """`frechet_distance` with the interval that the choice of samples leaves.

    From the delete-a-group jackknife: the samples are divided at random into 20 groups, the
    distance is computed without each, and its spread gives the standard error, of which the
    interval takes 2.093, the quantile of Student's t. The reference is taken as known. A bootstrap
    would not do: samples that are drawn twice move the distance up. Nor does the interval speak
    of infinitely many samples, whose distance is lower by a term of 1 / N (Chong, Forsyth 2020).

    Args:
        features: ``[N, D]``; with N < 40 there is no interval.
        reference: the Gaussian.
        seed: of the division.

    Source: Shao and Tu 1995, "The jackknife and bootstrap", section 2.3.
    """
    n = len(features)
    if n < 2 * GROUPS:
        return Estimate(frechet_distance(features, reference))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed), device="cpu")
    groups = order.tensor_split(GROUPS)
    if n < reference.root.shape[1]:  # few enough to begin anew without each group
        value = frechet_distance(features, reference)
        others = [torch.cat([*groups[:i], *groups[i + 1 :]]) for i in range(GROUPS)]
        without = [frechet_distance(features[rows], reference) for rows in others]
    else:
        parts = [_Sums.of(features[rows], reference) for rows in groups]
        whole = parts[0]
        for part in parts[1:]:
            whole = whole.joined(part)
        value = whole.distance(reference)
        without = [whole.joined(part, -1).distance(reference) for part in parts]
    spread = torch.tensor(without, dtype=torch.float64, device="cpu")
    variance = (GROUPS - 1) / GROUPS * (spread - spread.mean()).square().sum()
    error = _QUANTILE * math.sqrt(float(variance))
    return Estimate(value, max(value - error, 0.0), value + error)


def _distance(mean: Tensor, trace: Tensor, product: Tensor, reference: Gaussian) -> float:
    """Of the difference of the means, the trace of C and a matrix with R^T C R's eigenvalues."""
    values = torch.linalg.eigvalsh(product)
    # zero but for rounding, of which the root would be 1e8 times as large
    floor = values[-1:].clamp_min(0) * len(values) * torch.finfo(values.dtype).eps
    cross = values[values > floor].sqrt().sum()
    found = mean.square().sum() + trace + reference.covariance.trace() - 2 * cross
    return max(float(found), 0.0)


@dataclass(frozen=True)
class _Sums:
    """What the distance takes of features, relative to the reference's mean.

    A part of the samples can be taken out of it again.
    """

    n: int
    total: Tensor  # [D]
    squares: Tensor
    products: Tensor  # [rank, rank], of the projections by the reference's root

    @classmethod
    def of(cls, features: Tensor, reference: Gaussian) -> _Sums:
        root = reference.root
        total, squares = torch.zeros_like(reference.mean), reference.mean.new_zeros(())
        products = root.new_zeros(root.shape[1], root.shape[1])
        for rows in torch.split(features, _ROWS):
            x = rows.double() - reference.mean
            projected = x @ root
            total, squares = total + x.sum(0), squares + x.square().sum()
            products.addmm_(projected.T, projected)
        return cls(len(features), total, squares, products)

    def joined(self, other: _Sums, sign: int = 1) -> _Sums:
        return _Sums(
            self.n + sign * other.n,
            self.total + sign * other.total,
            self.squares + sign * other.squares,
            self.products + sign * other.products,
        )

    def distance(self, reference: Gaussian) -> float:
        mean = self.total / self.n
        shift = mean @ reference.root
        trace = (self.squares - self.n * mean.square().sum()) / (self.n - 1)
        product = (self.products - self.n * shift.outer(shift)) / (self.n - 1)
        return _distance(mean, trace, product, reference)
