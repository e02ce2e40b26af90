"""ODE solvers: orders against exact flows, their formulas written plainly, passes and calls."""

from __future__ import annotations

import itertools
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastcm import ops, sampling
from fastcm.networks import GaussianMixture
from fastcm.parameterization import Parameterization
from fastcm.paths import Linear, TrigFlow, VarianceExploding, VariancePreserving
from fastcm.sampling import held, solvers
from fastcm.sampling.guidance import Evaluator, Guided
from fastcm.sampling.levels import levels
from fastcm.sampling.steps import Step

MEAN = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64)
STD = torch.tensor([0.6, 0.3, 1.2], dtype=torch.float64)
CASES = [
    Parameterization(path, prediction)
    for path, predictions in (
        (Linear(), ("v", "x0")),
        (VarianceExploding(), ("cm", "edm", "v", "eps", "x0")),
        (TrigFlow(), ("v", "x0")),
        (VariancePreserving(), ("eps", "v", "x0")),
    )
    for prediction in predictions
]


def case(p: Parameterization) -> str:
    return f"{type(p.path).__name__}-{p.prediction}"


def levels_at(path, t: float):
    at = path.at(torch.tensor([t], dtype=torch.float64))
    return at.alpha.item(), at.sigma.item()


def even_times(path, n: int) -> list[float]:
    """Even in t, where the velocity is smooth in it; on the variance-preserving path in sqrt t."""
    if isinstance(path, VariancePreserving):  # which has no index below t = 1
        return [1 + (path.t_max - 1) * (k / (n - 1)) ** 2 for k in range(n - 1, -1, -1)]
    if isinstance(path, VarianceExploding):
        low, high = path.t_min ** (1 / 7), path.t_max ** (1 / 7)
        return [(low + k / n * (high - low)) ** 7 for k in range(n, 0, -1)]
    return [path.t_min + k / n * (path.t_max - path.t_min) for k in range(n, 0, -1)]


def even_ratios(path, n: int) -> list[float]:
    """sigma / alpha from at most 50 downwards, each the same multiple of the next."""
    alpha, sigma = levels_at(path, path.t_max)
    high = min(50.0, sigma / alpha) if alpha > 0 else 50.0
    if path.t_min > 0:  # the step to t_min is one of them
        ratios = [high * (path.t_min / high) ** (k / n) for k in range(n)]
    else:
        ratios = [high * (0.03 / high) ** (k / (n - 1)) for k in range(n)]
    angles = torch.tensor(ratios, dtype=torch.float64).atan()
    return path.time_at_angle(angles).tolist()


def error(p: Parameterization, solver: str, times: list[float]) -> float:
    """Against the exact flow from the first time to t_min.

    Where sigma(t_min) = 0, to the last time, and from there by the solver's own last step: that is
    one of first order for all of them.
    """
    z = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net = GaussianMixture(MEAN[None], STD[None], None, p)
    got = sampling.ode(net, p, z, times=times, solver=solver)
    assert got.dtype == torch.float64
    to = p.path.t_min if p.path.t_min > 0 else times[-1]
    (alpha, sigma), (alpha_e, sigma_e) = (levels_at(p.path, t) for t in (times[0], to))
    ratio = ((alpha_e * STD).square() + sigma_e**2) / ((alpha * STD).square() + sigma**2)
    exact = alpha_e * MEAN + ratio.sqrt() * (sigma * z - alpha * MEAN)
    if to != p.path.t_min:
        exact = sampling.ode(net, p, exact / sigma_e, times=[to], solver=solver)
    return (got - exact).abs().max().item()


def error_to_last(p: Parameterization, solver: str, times: list[float]) -> float:
    """Against the exact flow to the last time, relative to what the last step makes of it."""
    z = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net = GaussianMixture(MEAN[None], STD[None], None, p)
    got = sampling.ode(net, p, z, times=times, solver=solver)
    (alpha, sigma), (alpha_e, sigma_e) = (levels_at(p.path, t) for t in (times[0], times[-1]))
    ratio = ((alpha_e * STD).square() + sigma_e**2) / ((alpha * STD).square() + sigma**2)
    exact = alpha_e * MEAN + ratio.sqrt() * (sigma * z - alpha * MEAN)
    last = sampling.ode(net, p, exact / sigma_e, times=[times[-1]], solver=solver)
    return (got - last).abs().max().item()


@pytest.mark.parametrize("p", CASES, ids=case)
def test_euler_is_of_first_order(p):
    first, second = (error(p, "euler", even_times(p.path, n)) for n in (64, 128))
    assert 1.8 < first / second < 2.2
    assert second < 0.1


@pytest.mark.parametrize("p", CASES, ids=case)
def test_ddim_is_of_first_order(p):
    first, second = (error(p, "ddim", even_ratios(p.path, n)) for n in (64, 128))
    assert 1.8 < first / second < 2.2
    assert second < 0.1


@pytest.mark.parametrize("p", CASES, ids=case)
def test_heun_is_of_second_order(p):
    first, second = (error(p, "heun", even_times(p.path, n)) for n in (64, 128))
    assert second < 0.1 * error(p, "euler", even_times(p.path, 128))
    if not isinstance(p.path, VariancePreserving):  # whose velocity jumps at every integer t
        assert 3.5 < first / second < 4.6


@pytest.mark.parametrize("p", CASES, ids=case)
def test_midpoint_is_of_second_order(p):
    first, second = (error(p, "midpoint", even_times(p.path, n)) for n in (64, 128))
    assert second < 0.1 * error(p, "euler", even_times(p.path, 128))
    if not isinstance(p.path, VariancePreserving):
        # on the straight path the leading error of a Gaussian cancels
        assert 3.5 < first / second < (8.5 if isinstance(p.path, Linear) else 4.6)


@pytest.mark.parametrize("p", CASES, ids=case)
def test_rk4_is_of_fourth_order(p):
    if isinstance(p.path, VariancePreserving):
        first, second = (error(p, s, even_times(p.path, 128)) for s in ("euler", "rk4"))
        assert second < 0.1 * first
        return

    def times(n: int) -> list[float]:
        if isinstance(p.path, VarianceExploding):  # far from both ends
            return [0.5 + k / n * 7.5 for k in range(n, -1, -1)]
        return even_times(p.path, n)

    first, second = (error_to_last(p, "rk4", times(n)) for n in (16, 32))
    assert 12 < first / second < 30


@pytest.mark.parametrize("p", CASES, ids=case)
def test_dpm_solver_2m_is_of_second_order(p):
    first, second = (error(p, "dpmpp_2m", even_ratios(p.path, n)) for n in (64, 128))
    assert 3.5 < first / second < 4.6
    assert second < 0.1 * error(p, "ddim", even_ratios(p.path, 128))


@pytest.fixture
def mixture():
    means = torch.randn(3, 4, dtype=torch.float64)
    return lambda p: GaussianMixture(means, torch.full((3, 1), 0.4), [1.0, 2.0, 3.0], p)


@pytest.mark.parametrize("path", [Linear(), VarianceExploding()], ids=str)
def test_euler_is_ddim_where_the_path_is_straight_in_the_noise_level(path, mixture):
    net, z = mixture(Parameterization(path)), torch.randn(5, 4, dtype=torch.float64)
    times = even_times(path, 7)
    euler, ddim = (sampling.ode(net, path, z, times=times, solver=s) for s in ("euler", "ddim"))
    torch.testing.assert_close(euler, ddim, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("path", [TrigFlow(), VariancePreserving(), Linear()], ids=str)
def test_exponential_solvers_see_of_a_path_its_noise_levels_alone(path, solver, mixture):
    """Two paths at equal sigma / alpha differ by the scale of x at every step."""
    times = even_ratios(path, 9)
    exploding = VarianceExploding()
    ratios = [sigma / alpha for alpha, sigma in (levels_at(path, t) for t in times)]
    z = torch.randn(5, 4, dtype=torch.float64)
    ends = []
    for p, at in ((Parameterization(path), times), (Parameterization(exploding), ratios)):
        *starts, _ = levels(p, at)
        x = ratios[0] * z * starts[0].alpha
        steps = [Step(i, *both) for i, both in enumerate(pairwise(starts))]
        evaluate = Evaluator(mixture(p), z)
        x = sampling.SOLVERS[solver](evaluate, x, steps, lambda x, step: x)
        ends.append(x / starts[-1].alpha)
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-9)


def plain(net, solver: str, x: Tensor, times: list[float], guided) -> Tensor:
    """The solvers as their papers write them, on velocities and denoisers of `net`."""
    ends = [*times, 0.0]  # EDM and k-diffusion end at sigma = 0, too

    def at(kind: str, x: Tensor, time: float) -> Tensor:
        t = torch.full((len(x),), time, dtype=torch.float64)
        f = getattr(net, kind)
        c, u = (f(x, t, guided[0]), f(x, t, guided[1]))
        return u + guided[2] * (c - u)

    before, h_before = None, math.nan
    for i, (t, s) in enumerate(pairwise(ends)):
        if solver == "euler" or (solver in ("heun", "midpoint", "rk4") and i == len(times) - 1):
            x = x - (t - s) * at("velocity", x, t)
        elif solver == "midpoint":
            m = 0.5 * (t + s)
            x = x - (t - s) * at("velocity", x - (t - m) * at("velocity", x, t), m)
        elif solver == "rk4":
            m, h = 0.5 * (t + s), t - s
            v1 = at("velocity", x, t)
            v2 = at("velocity", x - h / 2 * v1, m)
            v3 = at("velocity", x - h / 2 * v2, m)
            v4 = at("velocity", x - h * v3, s)
            x = x - h * (v1 + 2 * v2 + 2 * v3 + v4) / 6
        elif solver == "heun":
            v = at("velocity", x, t)
            y = x - (t - s) * v
            x = x - (t - s) * (v + at("velocity", y, s)) / 2
        else:  # k-diffusion's sample_dpmpp_2m, on noise levels sigma with alpha = 1
            D = at("denoiser", x, t)
            if s == 0:
                return D
            h = math.log(t) - math.log(s)
            extrapolated = D
            if solver == "dpmpp_2m" and before is not None:
                r = h_before / h
                extrapolated = (1 + 1 / (2 * r)) * D - before / (2 * r)
            x = s / t * x - math.expm1(-h) * extrapolated
            before, h_before = D, h
    return x


@pytest.mark.parametrize("guidance", [None, 2.5])
@pytest.mark.parametrize(
    ("path", "solver"),
    [
        (Linear(), "euler"),
        (TrigFlow(), "euler"),
        (TrigFlow(), "heun"),
        (VarianceExploding(), "heun"),
        (VarianceExploding(), "midpoint"),
        (TrigFlow(), "midpoint"),
        (Linear(), "rk4"),
        (VarianceExploding(), "rk4"),
        (VarianceExploding(), "ddim"),
        (VarianceExploding(), "dpmpp_2m"),
    ],
    ids=str,
)
def test_each_solver_is_its_formula_with_and_without_guidance(path, solver, guidance, mixture):
    net = mixture(Parameterization(path))
    z, cond = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    times = even_times(path, 6)
    got = sampling.ode(
        net, path, z, times=times, solver=solver, cond=cond, guidance=guidance, null_condition=3
    )
    weight = 1.0 if guidance is None else guidance
    first = levels_at(path, times[0])[1] * z
    wanted = plain(net, solver, first, times, (cond, torch.full_like(cond, 3), weight))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", list(sampling.SOLVERS))
def test_the_last_step_leads_to_the_denoisers_estimate(solver, mixture):
    """Also where t_min > 0, and however far the last step is: of first order, at sigma = 0."""
    for path in (VarianceExploding(), VarianceExploding(t_min=1e-9), Linear()):
        net = mixture(Parameterization(path))
        z = torch.randn(6, 4, dtype=torch.float64)
        got = sampling.ode(net, path, z, times=[path.t_max], solver=solver)
        t = torch.full((6,), path.t_max, dtype=torch.float64)
        wanted = net.denoiser(path.t_max * z, t, None)
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_2m_starts_and_ends_with_steps_of_first_order():
    """From pure noise (alpha = 0) and to clean data (sigma = 0) it is finite, and ddim."""
    p = Parameterization(Linear())
    net = GaussianMixture(MEAN[None], STD[None], None, p)
    z = torch.randn(4, 3, dtype=torch.float64)
    for times in ([1.0], [1.0, 0.5], [1.0, 0.6, 0.3]):
        both = [sampling.ode(net, p, z, times=times, solver=s) for s in ("ddim", "dpmpp_2m")]
        torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)
    times = [1.0, 0.7, 0.5, 0.3]
    both = [sampling.ode(net, p, z, times=times, solver=s) for s in ("ddim", "dpmpp_2m")]
    assert (both[0] - both[1]).abs().max() > 1e-4


@pytest.mark.parametrize("signs", list(itertools.product((-1.0, 0.0, 1.0), repeat=3)), ids=str)
def test_any_three_terms_combine_in_one_pass(signs):
    c = [s * k for s, k in zip(signs, (0.7, 0.7, 1.3))]  # the first two cancel if they can
    y = list(torch.randn(3, 4, 5, dtype=torch.float64))
    got = solvers.combine(*zip(c, y))
    torch.testing.assert_close(got, sum(k * v for k, v in zip(c, y)), rtol=1e-14, atol=1e-14)
    low = solvers.combine((c[0], y[0].float()), (c[1], y[1].float()), (c[2], y[2].bfloat16()))
    assert low.dtype == torch.float32
    wanted = sum(k * v for k, v in zip(c, (*y[:2], y[2].bfloat16().double())))
    torch.testing.assert_close(low.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("solver", "guided", "passes"),
    [
        ("euler", False, 5),
        ("euler", True, 5),
        ("ddim", True, 5),
        ("heun", False, 9),
        ("heun", True, 13),
        ("midpoint", False, 9),
        ("midpoint", True, 13),
        ("rk4", False, 21),
        ("rk4", True, 33),
        ("dpmpp_2m", False, 8),  # 2 steps of second order of 2, one denoiser for the first
        ("dpmpp_2m", True, 8),
    ],
)
def test_a_step_is_one_pass_over_the_samples(monkeypatch, solver, guided, passes):
    count = 0

    def counted(f):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            return f(*args, **kwargs)

        return call

    monkeypatch.setattr(held, "SMALL", 0)  # whose maps are no calls of the operators
    for name in ("boundary", "euler_step", "sampler_update", "noising"):
        monkeypatch.setattr(ops, name, counted(getattr(ops, name)))
    settings = {"cond": torch.arange(2), "guidance": 2.0, "null_condition": -1} if guided else {}
    sampling.ode(
        lambda x, t, cond: 0.3 * x,
        Linear(),
        torch.randn(2, 3),
        times=[1.0, 0.8, 0.6, 0.4, 0.2],
        solver=solver,
        **settings,
    )
    assert count == passes


def test_low_precision_outputs_are_combined_in_float32():
    x = torch.randn(4, 6)
    F, F_u = torch.randn(2, 4, 6).bfloat16()
    out = Guided(F, F_u, 3.3)
    v = F_u.double() + 3.3 * (F.double() - F_u.double())
    for got, wanted in ((out.combined(), v), (out.map(x, 0.4, -1.7), 0.4 * x.double() - 1.7 * v)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=2e-6)
