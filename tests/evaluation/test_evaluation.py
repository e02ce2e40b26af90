"""Distances between sets of samples, and the gap between neighbouring outputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastcm import ops
from fastcm.evaluation import consistency_gap, frechet, sliced_wasserstein
from fastcm.evaluation.metrics import features
from fastcm.parameterization import Parameterization
from fastcm.paths import Linear, TrigFlow, VarianceExploding
from fastcm.rng import NoiseKey
from fastcm.schedules import KarrasGrid, UniformGrid


def line(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


def wasserstein_1d(x: list[float], y: list[float]) -> float:
    """Exact: both quantile functions are constant between multiples of 1 / (N M)."""
    x, y = sorted(x), sorted(y)
    cells = [(x[i // len(y)] - y[i // len(x)]) ** 2 for i in range(len(x) * len(y))]
    return math.sqrt(sum(cells) / len(cells))


def test_identical_sets_are_at_distance_zero_in_any_order():
    x = torch.randn(50, 2, 3)
    shuffled = x[torch.randperm(50)]
    assert sliced_wasserstein(x, shuffled) == pytest.approx(0.0, abs=1e-12)
    assert frechet(x, shuffled) == pytest.approx(0.0, abs=1e-5)


def test_in_one_dimension_a_shift_is_the_distance():
    x = torch.randn(64, 1)
    assert sliced_wasserstein(x, x + 1.5) == pytest.approx(1.5, rel=1e-5)
    assert sliced_wasserstein(x, -x) == pytest.approx(
        wasserstein_1d(x.flatten().tolist(), (-x).flatten().tolist()), rel=1e-6
    )


def test_a_shift_in_d_dimensions_shrinks_by_root_d():
    """E <c, u>^2 = |c|^2 / D over directions u."""
    D = 8
    x = torch.randn(30, D)
    shift = torch.randn(D)
    expected = shift.norm().item() / math.sqrt(D)
    assert sliced_wasserstein(x, x + shift, projections=4096) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("n", "m"), [(1, 7), (4, 8), (2, 3), (3, 2), (10, 7)])
def test_sets_of_different_sizes_are_compared_exactly(n, m):
    x, y = torch.randn(n), torch.randn(m)
    expected = wasserstein_1d(x.tolist(), y.tolist())
    assert sliced_wasserstein(x[:, None], y[:, None]) == pytest.approx(expected, rel=1e-6)


def test_repeating_every_sample_changes_nothing():
    x, y = torch.randn(12, 3), torch.randn(12, 3)
    assert sliced_wasserstein(x.repeat(3, 1), y) == pytest.approx(sliced_wasserstein(x, y))


def test_distances_grow_with_a_shift_and_are_symmetric():
    x, y = torch.randn(400, 4), torch.randn(400, 4)
    for distance in (sliced_wasserstein, frechet):
        values = [distance(x, y + shift) for shift in (0.0, 0.5, 1.0, 2.0)]
        assert values == sorted(values) and values[-1] > 3 * values[0]
        assert distance(y, x) == pytest.approx(distance(x, y), rel=1e-6)


def test_the_frechet_distance_is_that_of_the_fitted_gaussians():
    """tr (C_x C_y)^1/2 from the eigenvalues of the product, another way to the same number."""
    x, y = torch.randn(200, 5), 2 * torch.randn(300, 5) + 0.5
    f, g = features(x), features(y)
    C, G = f.T.cov(), g.T.cov()
    cross = torch.linalg.eigvals(C @ G).real.clamp_min(0).sqrt().sum()
    expected = (f.mean(0) - g.mean(0)).square().sum() + C.trace() + G.trace() - 2 * cross
    assert frechet(x, y) == pytest.approx(expected.item(), rel=1e-4)
    assert frechet(x, y) > 0.1


def test_distances_are_deterministic_and_leave_the_generator_alone():
    x, y = torch.randn(40, 3), torch.randn(30, 3)
    before = torch.get_rng_state()
    first = sliced_wasserstein(x, y), frechet(x, y)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert (sliced_wasserstein(x, y), frechet(x, y)) == first


def test_bytes_are_pictures_in_minus_one_to_one():
    x = torch.randint(256, (20, 1, 2, 2), dtype=torch.uint8)
    y = torch.rand(20, 1, 2, 2) * 2 - 1
    as_float = x.float() / 127.5 - 1
    assert sliced_wasserstein(x, y) == pytest.approx(sliced_wasserstein(as_float, y), rel=1e-6)
    assert frechet(x, as_float) == pytest.approx(0.0, abs=1e-5)


def test_sets_that_cannot_be_compared_are_refused():
    for x, y in ((torch.zeros(3, 2), torch.zeros(3, 4)), (torch.zeros(0, 2), torch.zeros(3, 2))):
        with pytest.raises(ValueError, match="sample"):
            sliced_wasserstein(x, y)
    with pytest.raises(ValueError, match="at least 2"):
        frechet(torch.zeros(1, 2), torch.zeros(3, 2))


class PointMass(nn.Module):
    """Data is one point c: the network whose denoiser is c at every time, exactly."""

    def __init__(self, p: Parameterization, c: float) -> None:
        super().__init__()
        self.p, self.c = p, c

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        path = self.p.path
        t = path.time_of(t.double()).clamp(path.t_min, path.t_max)
        c_in = self.p.c_in(t)
        x = x.double() if c_in is None else x.double() / c_in[:, None]
        a, b, _, _ = (k[:, None] for k in self.p.coefficients(t))
        return torch.where(b == 0, 0.0, (self.c - a * x) / b).float()


@pytest.mark.parametrize("path", [Linear(), TrigFlow()], ids=str)
def test_a_constant_consistency_function_has_no_gap(path):
    p = Parameterization(path)
    x0 = torch.full((16, 4), 0.75)
    gap = consistency_gap(PointMass(p, 0.75), p, x0, n=10)
    assert len(gap.gaps) == len(gap.times) == 10
    assert max(gap.gaps) < 1e-4 and gap.sum < 1e-4
    # data elsewhere: all of the error is between t_0, where f = x0, and t_1
    gap = consistency_gap(PointMass(p, 0.0), p, x0, n=10)
    assert gap.gaps[0] == pytest.approx(1.5, rel=1e-4) and sum(gap.gaps[1:]) < 1e-4
    assert (gap.sum, gap.mean) == pytest.approx((sum(gap.gaps), sum(gap.gaps) / 10))


@pytest.mark.parametrize(
    ("path", "grid"), [(Linear(), UniformGrid()), (VarianceExploding(), KarrasGrid())], ids=str
)
def test_the_sum_of_gaps_bounds_the_error_of_the_last_output(path, grid):
    class Wave(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            return (3 * x + t[:, None]).sin()

    p = Parameterization(path)
    x0 = torch.randn(32, 3)
    gap = consistency_gap(Wave(), p, x0, n=7, grid=grid, seed=5)
    ends = []
    for t in (path.t_min, path.t_max):
        at = torch.full((32,), t, dtype=torch.float64)
        point, c_in = path.at(at), p.c_in(at)
        x = ops.noising(x0, point.alpha, point.sigma, NoiseKey(5))
        F = Wave()(x if c_in is None else (c_in[:, None] * x).float(), p.c_noise(at))
        a, b, _, _ = p.coefficients(at)
        ends.append(ops.boundary(x, F, a, b))
    error = (ends[1] - ends[0]).norm(dim=1).mean().item()
    assert 0.01 < error <= gap.sum * (1 + 1e-6)
    assert gap.times[-1] == path.t_max


def test_the_gap_needs_an_interval():
    with pytest.raises(ValueError, match="n must"):
        consistency_gap(nn.Identity(), Parameterization(), torch.zeros(2, 2), n=0)
