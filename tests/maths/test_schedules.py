"""Time grids, the curricula of grid points, and time samplers, against formulas and counts."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from fastcm import rng
from fastcm.paths import Linear, TrigFlow, VarianceExploding, VariancePreserving
from fastcm.rng import NoiseKey
from fastcm.schedules import (
    CMCurriculum,
    ICTCurriculum,
    KarrasGrid,
    LogitNormal,
    LogNormal,
    ShiftedGrid,
    UniformGrid,
    UniformTime,
    draw_interval,
    intervals,
    resolution_mu,
    sampling_times,
)

PATHS = [
    Linear(),
    VarianceExploding(),
    VarianceExploding(t_min=0.01, t_max=50.0),
    TrigFlow(),
    VariancePreserving(),
]


def uniforms(seed: int, count: int = 200_000):
    return rng.uniform(count, NoiseKey(seed), stream=rng.TIME)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize(
    "grid",
    [UniformGrid(), KarrasGrid(), KarrasGrid(rho=3.0), ShiftedGrid(), ShiftedGrid(0.4)],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 2, 17, 150, 1280])
def test_grids_ascend_from_exactly_t_min_to_exactly_t_max(path, grid, n):
    t = grid.time(torch.arange(n + 1), n, path)
    assert t.dtype == torch.float64
    assert (t[0].item(), t[-1].item()) == (path.t_min, path.t_max)
    assert (t.diff() > 0).all()
    k = torch.arange(n + 1, dtype=torch.float64)
    torch.testing.assert_close(grid.index(t, n, path), k, rtol=1e-9, atol=1e-9)


def test_the_uniform_grid_is_k_over_n():
    t = UniformGrid().time(torch.arange(6), 5, Linear())
    assert t.tolist() == pytest.approx([k / 5 for k in range(6)], abs=1e-16)


def test_the_shifted_grid_keeps_the_signal_to_noise_ratio_s_times_lower():
    """(1 - t) / t of the linear path, divided by s; SD3, figure 6."""
    u = UniformGrid().time(torch.arange(1, 8), 8, Linear())
    t = ShiftedGrid(3.0).time(torch.arange(1, 8), 8, Linear())
    torch.testing.assert_close((1 - t) / t, (1 - u) / u / 3.0, rtol=1e-12, atol=0)
    assert torch.equal(ShiftedGrid(1.0).time(torch.arange(9), 8, Linear())[1:-1], u)
    with pytest.raises(ValueError, match="shift must be > 0"):
        ShiftedGrid(0.0)


def test_a_shift_of_logit_normal_times_is_one_of_their_mean():
    u = uniforms(1)
    t = LogitNormal()(u, 0.0, 1.0)
    shifted = 3.0 * t / (1.0 + 2.0 * t)
    torch.testing.assert_close(LogitNormal(mean=math.log(3.0))(u, 0.0, 1.0), shifted)


def test_the_shift_of_a_resolution():
    """Flux at 256, 1024 and 512 pixels: patches of 16 x 16 pixels."""
    assert resolution_mu(256) == 0.5
    assert resolution_mu(4096) == pytest.approx(1.15, abs=1e-12)
    assert resolution_mu(1024) == pytest.approx(0.63, abs=1e-12)


def test_the_karras_grid_is_equation_5():
    """t_i of N points; the best-known grid of EDM, 18 points from 0.002 to 80."""
    eps, T, N, rho = 0.002, 80.0, 18, 7
    t = KarrasGrid().time(torch.arange(N), N - 1, VarianceExploding()).tolist()
    for i in range(1, N + 1):
        low, high = eps ** (1 / rho), T ** (1 / rho)
        assert t[i - 1] == pytest.approx((low + (i - 1) / (N - 1) * (high - low)) ** rho, rel=1e-12)
    assert t[-2] == pytest.approx(57.586, abs=2e-3)


def cm_points(k: int, K: int, s0: int, s1: int) -> int:
    """ceil(sqrt(q) - 1), q = k/K ((s1+1)^2 - s0^2) + s0^2, in exact integers."""
    numerator = k * ((s1 + 1) ** 2 - s0**2) + K * s0**2
    m = math.isqrt(numerator // K)
    m += m * m * K < numerator
    return max(m - 1, 1) + 1


def test_cm_curriculum_of_cifar10_at_every_change_of_n():
    K, s0, s1 = 800_000, 2, 150
    steps = sorted(
        {0, 1, 2, K - 1, K}
        | {s for m in range(2, 152) for s in _around((m * m - 4) * K // 22797, K)}
        | set(range(0, K, 9973))
    )
    got = CMCurriculum(K, s0, s1).points(torch.tensor(steps)).tolist()
    assert got == [cm_points(k, K, s0, s1) for k in steps]
    assert (got[0], got[-1]) == (2, 151)
    assert got == sorted(got)
    assert set(range(2, 152)) == set(got)


def _around(k: int, K: int) -> list[int]:
    return [s for s in (k - 1, k, k + 1, k + 2) if 0 <= s <= K]


def test_the_last_n_of_cm_holds_beyond_the_planned_steps():
    assert CMCurriculum(100).points(torch.tensor([100, 101, 10**9])).tolist() == [151] * 3


@pytest.mark.parametrize(
    ("K", "s0", "s1"), [(400_000, 10, 1280), (1000, 10, 1280), (1000, 2, 2), (1000, 10, 150)]
)
def test_ict_curriculum_doubles_as_in_the_paper(K, s0, s1):
    """K' = floor(K / (log2 floor(s1 / s0) + 1)), N = min(s0 2^floor(k / K'), s1) + 1.

    With s1 / s0 no power of two, log2 is not rounded, so that s1 is reached within K steps.
    """
    every = math.floor(K / (math.log2(s1 // s0) + 1))
    steps = [*range(0, K, max(K // 97, 1)), every - 1, every, 2 * every - 1, 2 * every, K - 1, K]
    got = ICTCurriculum(K, s0, s1).points(torch.tensor(steps)).tolist()
    assert got == [min(s0 * 2 ** (k // every), s1) + 1 for k in steps]


def test_ict_curriculum_reaches_1280_intervals_in_its_last_eighth():
    at = torch.tensor([0, 49_999, 50_000, 349_999, 350_000, 399_999, 10**12])
    curriculum = ICTCurriculum(400_000)
    assert curriculum.points(at).tolist() == [11, 11, 21, 641, 1281, 1281, 1281]
    assert [int(intervals(curriculum, k)) for k in at] == [10, 10, 20, 640, 1280, 1280, 1280]


def test_curricula_run_on_a_device_without_reading_the_step_back():
    """On the meta device any .item() raises."""
    step = torch.zeros((), dtype=torch.int64, device="meta")
    u = torch.empty(8, dtype=torch.float64, device="meta")
    for curriculum in (CMCurriculum(100), ICTCurriculum(100)):
        n = intervals(curriculum, step)
        assert n.device.type == "meta" and n.dtype == torch.int64 and n.dim() == 0
        for sampler in (None, LogNormal(), LogitNormal()):
            for grid, path in ((UniformGrid(), Linear()), (KarrasGrid(), VarianceExploding())):
                t, s = draw_interval(u, n, grid, path, sampler)
                assert t.device.type == s.device.type == "meta"


def test_one_interval_is_always_the_whole_path():
    u = uniforms(1, 100)
    for path in PATHS:
        for sampler in (None, UniformTime(), LogNormal()):
            t, s = draw_interval(u, 1, KarrasGrid(), path, sampler)
            assert set(t.tolist()) == {path.t_max} and set(s.tolist()) == {path.t_min}


def test_intervals_are_neighbouring_grid_times_drawn_uniformly(seed):
    n, u = 7, uniforms(seed)
    t, s = draw_interval(u, torch.tensor(n), UniformGrid(), Linear())
    k = torch.round(t * n).long()
    assert torch.equal(t, UniformGrid().time(k, n, Linear()))
    assert torch.equal(s, UniformGrid().time(k - 1, n, Linear()))
    counts = torch.bincount(k, minlength=n + 1)
    assert counts[0] == 0
    sigma = math.sqrt(len(u) / n * (1 - 1 / n))
    assert (counts[1:] - len(u) / n).abs().max() < 6 * sigma


@pytest.mark.parametrize("n", [10, 40])
def test_lognormal_intervals_have_the_mass_of_the_discretised_density(seed, n):
    """p_i ~ erf((ln t_{i+1} - Pm) / (sqrt2 Ps)) - erf((ln t_i - Pm) / (sqrt2 Ps))."""
    path, grid, u = VarianceExploding(), KarrasGrid(), uniforms(seed)
    times = grid.time(torch.arange(n + 1), n, path)
    edge = [math.erf((math.log(v) + 1.1) / (math.sqrt(2) * 2.0)) for v in times.tolist()]
    mass = [(b - a) / (edge[-1] - edge[0]) for a, b in pairwise(edge)]
    t, s = draw_interval(u, n, grid, path, LogNormal())
    k = torch.searchsorted(times, t)
    assert torch.equal(times[k], t) and torch.equal(times[k - 1], s)
    counts = torch.bincount(k, minlength=n + 1)[1:].tolist()
    for i, (count, p) in enumerate(zip(counts, mass)):
        assert abs(count - len(u) * p) < 6 * math.sqrt(len(u) * p * (1 - p)) + 1, i


def test_lognormal_times_are_normal_in_the_logarithm(seed):
    t = LogNormal(mean=-1.0, std=0.5)(uniforms(seed), 1e-6, 1e6).log()
    n = len(t)
    assert abs(t.mean() + 1.0) < 6 * 0.5 / math.sqrt(n)
    assert abs(t.var() - 0.25) < 6 * 0.25 * math.sqrt(2 / n)


def test_lognormal_times_stay_on_the_path(seed):
    for low, high in ((0.002, 80.0), (0.0, 1.0), (0.5, 0.6)):
        t = LogNormal()(uniforms(seed, 10_000), low, high)
        assert low <= t.min() and t.max() <= high
        # truncated, not clamped: no mass at the ends
        assert (t == high).sum() + (t == low).sum() <= 1


def test_logit_normal_moments(seed):
    low, high = 0.002, 80.0
    t = LogitNormal(mean=0.4, std=1.3)(uniforms(seed), low, high)
    logit = torch.logit((t - low) / (high - low))
    n = len(t)
    assert abs(logit.mean() - 0.4) < 6 * 1.3 / math.sqrt(n)
    assert abs(logit.var() - 1.69) < 6 * 1.69 * math.sqrt(2 / n)


def test_uniform_times_fill_the_path_evenly(seed):
    t = UniformTime()(uniforms(seed), -1.0, 3.0)
    counts = torch.histc(t, bins=8, min=-1.0, max=3.0)
    assert (counts - len(t) / 8).abs().max() < 6 * math.sqrt(len(t) / 8)


def test_sampling_times_descend_from_t_max_and_leave_out_t_min():
    assert sampling_times(UniformGrid(), 4, Linear()) == [1.0, 0.75, 0.5, 0.25]
    times = sampling_times(KarrasGrid(), 5, VarianceExploding())
    grid = KarrasGrid().time(torch.arange(6), 5, VarianceExploding()).tolist()
    assert times == grid[:0:-1]
    assert sampling_times(KarrasGrid(), 1, VarianceExploding()) == [80.0]


def test_bad_settings_are_refused():
    for make in (
        lambda: CMCurriculum(0),
        lambda: CMCurriculum(100, s0=0),
        lambda: ICTCurriculum(100, s0=20, s1=10),
        lambda: KarrasGrid(rho=0.0),
        lambda: LogNormal(std=0.0),
        lambda: LogitNormal(std=-1.0),
        lambda: sampling_times(UniformGrid(), 0, Linear()),
    ):
        with pytest.raises(ValueError):
            make()
