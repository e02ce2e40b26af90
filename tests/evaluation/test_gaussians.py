"""The Frechet distance from statistics, and its interval, against closed forms and repetition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastcm.evaluation.gaussians import Gaussian, frechet_distance, frechet_estimate


def covariance(width: int, rank: int | None = None) -> Tensor:
    factor = torch.randn(width, rank or 2 * width, dtype=torch.float64)
    return factor @ factor.T / width


def samples(n: int, width: int) -> Tensor:
    return torch.randn(n, width) @ torch.randn(width, width) + torch.randn(width)


def by_scipy(x: Tensor, reference: Gaussian) -> float:
    """FID as its authors wrote it, with the root of a matrix that is not symmetric."""
    linalg = pytest.importorskip("scipy.linalg")
    x = x.double()
    cov = x.T.cov()
    root = torch.from_numpy(linalg.sqrtm((cov @ reference.covariance).numpy()).real)
    shift = (x.mean(0) - reference.mean).square().sum()
    return float(shift + cov.trace() + reference.covariance.trace() - 2 * root.trace())


@pytest.mark.parametrize("n", [8, 30, 5000])  # fewer than features, about as many, blocks of them
def test_it_is_the_distance_of_the_papers_formula(n: int) -> None:
    x, reference = samples(n, 24), Gaussian(torch.randn(24).double(), covariance(24))
    # the root of a singular matrix is good to eight digits only
    assert frechet_distance(x, reference) == pytest.approx(by_scipy(x, reference), rel=1e-5)


def test_between_gaussians_with_common_axes_it_is_the_closed_form() -> None:
    """|m - m'|^2 + sum (sigma_i - sigma'_i)^2."""
    x = torch.randn(400, 6).double()
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # white, centred
    axes = torch.linalg.qr(torch.randn(6, 6).double()).Q
    mine, theirs, shift = torch.rand(6).double(), torch.rand(6).double(), torch.randn(6).double()
    reference = Gaussian(shift, axes @ torch.diag(theirs**2) @ axes.T)
    expected = shift.square().sum() + (mine - theirs).square().sum()
    assert frechet_distance(x * mine @ axes.T, reference) == pytest.approx(float(expected))


@pytest.mark.parametrize("n", [5, 200])
def test_of_samples_to_their_own_gaussian_it_is_nothing(n: int) -> None:
    x = samples(n, 40)
    assert frechet_distance(x, Gaussian.of(x)) == pytest.approx(0, abs=1e-6)
    assert Gaussian.of(x).root.shape == (40, min(n - 1, 40))


def test_what_rounding_made_negative_is_left_out() -> None:
    x, exact = samples(100, 16), covariance(16, rank=3)
    values, vectors = torch.linalg.eigh(exact)
    values[:13] = -1e-9 * torch.rand(13)
    rounded = Gaussian(torch.zeros(16).double(), vectors @ torch.diag(values) @ vectors.T)
    assert rounded.root.shape == (16, 3)
    expected = frechet_distance(x, Gaussian(torch.zeros(16).double(), exact))
    assert frechet_distance(x, rounded) == pytest.approx(expected, rel=1e-6)


def test_a_covariance_of_nothing_leaves_the_means_and_the_trace() -> None:
    x = samples(50, 4)
    nothing = Gaussian(torch.zeros(4).double(), torch.zeros(4, 4).double())
    expected = x.double().mean(0).square().sum() + x.double().T.cov().trace()
    assert frechet_distance(x, nothing) == pytest.approx(float(expected))


@pytest.mark.parametrize(("n", "width"), [(45, 3), (1000, 8), (90, 100)])
def test_the_interval_is_what_leaving_out_each_group_gives(n: int, width: int) -> None:
    """By the definition, every group's distance computed anew."""
    x, reference = samples(n, width), Gaussian(torch.zeros(width).double(), covariance(width))
    found = frechet_estimate(x, reference, seed=5)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(5))
    groups = order.tensor_split(20)
    left = [
        frechet_distance(x[torch.cat([g for g in groups if g is not group])], reference)
        for group in groups
    ]
    mean = sum(left) / 20
    error = math.sqrt(19 / 20 * sum((value - mean) ** 2 for value in left))
    assert found.value == pytest.approx(frechet_distance(x, reference))
    assert found.low is not None and found.high is not None
    assert found.high - found.value == pytest.approx(2.093 * error, rel=1e-5)
    assert found.low == pytest.approx(max(found.value - 2.093 * error, 0), rel=1e-5)
    assert found == frechet_estimate(x, reference, seed=5)


def test_the_interval_is_as_wide_as_the_distance_of_new_samples_varies() -> None:
    reference = Gaussian(torch.ones(3).double(), covariance(3))
    scale = torch.randn(3, 3)
    found = [frechet_estimate(torch.randn(400, 3) @ scale, reference) for _ in range(300)]
    values = torch.tensor([e.value for e in found])
    errors = torch.tensor([(e.high - e.value) / 2.093 for e in found])  # type: ignore[operator]
    # both standard deviations are known to about 4 % of 300 repetitions
    assert errors.square().mean().sqrt() == pytest.approx(values.std().item(), rel=0.25)
    middle = values.mean()
    covered = sum(e.low <= middle <= e.high for e in found) / 300  # type: ignore[operator]
    assert covered > 0.88


def test_few_samples_have_no_interval_and_one_has_no_distance() -> None:
    reference = Gaussian(torch.zeros(3).double(), covariance(3))
    found = frechet_estimate(torch.randn(39, 3), reference)
    assert found.value > 0 and (found.low, found.high) == (None, None)
    for call in (frechet_distance, frechet_estimate):
        with pytest.raises(ValueError, match="at least 2 samples, got 1"):
            call(torch.zeros(1, 3), reference)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        Gaussian.of(torch.zeros(1, 3))
