"""Stochastic churn: EDM's loop on the same noise, its equivalents on other paths, its refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fastcm
from fastcm import rng, sampling
from fastcm.networks import MLP, GaussianMixture
from fastcm.ops import reference
from fastcm.parameterization import Parameterization
from fastcm.paths import Linear, TrigFlow, VarianceExploding, VariancePreserving
from fastcm.rng import NoiseKey
from fastcm.sampling import Churn, Sampler

TIMES = [80.0, 20.0, 5.0, 1.0, 0.2, 0.05]
CHURN = Churn(3.0, s_min=0.1, s_max=50.0, s_noise=1.003)
SHAPE = (5, 4)


def mixture(p: Parameterization) -> GaussianMixture:
    means = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return GaussianMixture(means, torch.full((3, 1), 0.4), [1.0, 2.0, 3.0], p)


def noise(i: int) -> Tensor:
    key = NoiseKey(7)
    return reference.noise(SHAPE, key, stream=rng.SAMPLE + i, first_sample=2, dtype=torch.float64)


def edm(net: GaussianMixture, times: list[float], churn: Churn, *, heun: bool) -> Tensor:
    """Karras et al. 2022, algorithm 2, line by line; levels stay at or below t_max = 80."""
    x, N = times[0] * noise(0), len(times)
    ends = [*times, 0.0]

    def d(x: Tensor, t: float) -> Tensor:
        at = torch.full((len(x),), t, dtype=torch.float64)
        return (x - net.denoiser(x, at, None)) / t

    for i in range(N):
        t, s = ends[i], ends[i + 1]
        inside = churn.s_min <= t <= churn.s_max
        gamma = min(churn.s_churn / N, math.sqrt(2) - 1) if inside else 0.0
        t_hat = t + gamma * t
        if t_hat > 80.0:
            t_hat = 80.0
        x = x + math.sqrt(t_hat**2 - t**2) * churn.s_noise * noise(i + 1)
        slope = d(x, t_hat)
        y = x + (s - t_hat) * slope
        if heun and s != 0:
            y = x + (s - t_hat) * (slope / 2 + d(y, s) / 2)
        x = y
    return x


@pytest.mark.parametrize("churn", [CHURN, Churn(1.2), Churn(100.0, s_noise=1.007)], ids=str)
@pytest.mark.parametrize("solver", ["euler", "heun", "ddim"])
def test_it_is_edms_loop_on_the_same_noise(solver: str, churn: Churn) -> None:
    p = Parameterization(VarianceExploding(), "edm")
    settings = {"times": TIMES, "churn": churn, "key": NoiseKey(7), "first_sample": 2}
    got = sampling.ode(mixture(p), p, noise(0), solver=solver, **settings)
    wanted = edm(mixture(p), TIMES, churn, heun=solver == "heun")
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", [TrigFlow(), Linear(), VariancePreserving()], ids=str)
def test_on_another_path_it_is_the_same_at_equal_noise_levels(path) -> None:
    """By ddim, which sees of a path its noise levels alone."""
    angles = torch.tensor(TIMES[2:], dtype=torch.float64).atan()
    times = path.time_at_angle(angles).tolist()
    at = path.at(torch.tensor(times, dtype=torch.float64))
    ratios = (at.sigma / at.alpha).tolist()
    ends = []
    for p, t in ((Parameterization(path), times), (Parameterization(VarianceExploding()), ratios)):
        settings = {"times": t, "churn": CHURN, "key": NoiseKey(7), "first_sample": 2}
        ends.append(sampling.ode(mixture(p), p, noise(0), solver="ddim", **settings))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint", "rk4", "ddim"])
def test_without_churn_it_is_the_ode_and_pure_noise_is_left_alone(solver: str) -> None:
    p = Parameterization(Linear())
    z = noise(0)
    plain = sampling.ode(mixture(p), p, z, times=[1.0, 0.6, 0.3], solver=solver)
    for churn in (Churn(0.0), Churn(5.0, s_min=0.0, s_max=0.01), Churn(5.0, s_min=1e3)):
        settings = {"times": [1.0, 0.6, 0.3], "solver": solver, "churn": churn}
        assert torch.equal(plain, sampling.ode(mixture(p), p, z, key=NoiseKey(0), **settings))
    churned = sampling.ode(
        mixture(p), p, z, times=[1.0, 0.6, 0.3], solver=solver, churn=Churn(1.0), key=NoiseKey(0)
    )
    assert (churned - plain).abs().max() > 1e-3


def test_a_sample_does_not_depend_on_its_batch() -> None:
    net = MLP((4,), width=8)
    for q in net.parameters():
        nn.init.normal_(q, std=0.3)
    options = {"steps": 4, "method": "ode", "solver": "heun", "churn": Churn(2.0), "shape": (4,)}
    one, two = (Sampler(net, fastcm.VarianceExploding(), batch_size=n, **options) for n in (11, 3))
    whole = one(11, seed=3)
    torch.testing.assert_close(whole, two(11, seed=3), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole[6:], two(5, seed=3, first_sample=6), rtol=1e-5, atol=1e-5)
    assert torch.equal(whole, one(11, seed=3)) and not torch.equal(whole, one(11, seed=4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"s_churn": -1.0}, "s_churn must be >= 0"),
        ({"s_churn": math.nan}, "s_churn must be >= 0"),
        ({"s_churn": 1.0, "s_min": 2.0, "s_max": 1.0}, "s_min <= s_max"),
        ({"s_churn": 1.0, "s_noise": 0.0}, "s_noise must be > 0"),
    ],
)
def test_numbers_out_of_range_are_named(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        Churn(**arguments)


def test_where_it_has_no_meaning_it_is_refused() -> None:
    net, z = mixture(Parameterization(Linear())), noise(0)
    with pytest.raises(ValueError, match="churn has no meaning for solver 'dpmpp_2m'"):
        sampling.ode(net, Linear(), z, times=[1.0], solver="dpmpp_2m", churn=CHURN, key=NoiseKey(0))
    with pytest.raises(ValueError, match="churn needs key"):
        sampling.ode(net, Linear(), z, times=[1.0], churn=CHURN)
    with pytest.raises(ValueError, match="at most 239 times, got 240"):
        Sampler(net, Linear(), method="ode", steps=240, churn=CHURN)
    with pytest.raises(TypeError, match="churn must be a Churn"):
        Sampler(net, Linear(), method="ode", churn=3.0)
    with pytest.raises(ValueError, match="churn has a meaning only with method='ode'"):
        Sampler(net, Linear(), churn=CHURN)
