"""Exact networks of Gaussian mixtures, against quadrature; training that approaches them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastcm
from fastcm import ops, rng, sampling
from fastcm.networks import MLP, GaussianConsistency, GaussianMixture
from fastcm.parameterization import Parameterization
from fastcm.paths import Linear, TrigFlow, VarianceExploding, VariancePreserving
from fastcm.rng import NoiseKey
from fastcm.schedules import UniformGrid, sampling_times

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
MEANS, STDS, WEIGHTS = [-1.0, 0.2, 1.5], [0.3, 0.1, 0.6], [0.5, 0.2, 0.3]


def line(p: Parameterization = Parameterization()) -> GaussianMixture:
    """Three components on the line."""
    means, stds = (torch.tensor(v)[:, None] for v in (MEANS, STDS))
    return GaussianMixture(means, stds, WEIGHTS, p)


def pdf(x: Tensor, mean, std) -> Tensor:
    return (-0.5 * ((x - mean) / std).square()).exp() / (std * math.sqrt(2 * math.pi))


def inner(path, n: int) -> Tensor:
    """Times off the ends; on the variance-preserving path not below the first index."""
    share = 0.05 + 0.9 * torch.rand(n, dtype=torch.float64)
    if isinstance(path, VarianceExploding):
        return path.t_min * (20.0 / path.t_min) ** share
    return path.t_min + share * (path.t_max - path.t_min)


@pytest.mark.parametrize("path", sorted({p.path for p in CASES}, key=str), ids=str)
def test_the_denoiser_is_the_posterior_mean_by_quadrature(path):
    net, t = line(Parameterization(path)), inner(path, 6)
    alpha, sigma, _, _ = path.at(t)
    x = alpha * torch.tensor([-1.2, -0.3, 0.2, 0.9, 1.5, 2.5], dtype=torch.float64) + 0.3 * sigma
    x0 = torch.linspace(-6, 8, 280_001, dtype=torch.float64)
    prior = sum(w * pdf(x0, m, s) for w, m, s in zip(WEIGHTS, MEANS, STDS))
    for i in range(6):
        posterior = prior * pdf(x[i], alpha[i] * x0, sigma[i])
        wanted = (posterior * x0).sum() / posterior.sum()
        got = net.denoiser(x[i : i + 1, None], t[i : i + 1])
        assert got.item() == pytest.approx(wanted.item(), rel=1e-7, abs=1e-7)


LINE = WEIGHTS, MEANS, STDS


def cdf(x: Tensor, alpha: Tensor, sigma: Tensor, data=LINE) -> Tensor:
    return sum(
        w * torch.special.ndtr((x - alpha * m) / (alpha * s).hypot(sigma)) for w, m, s in zip(*data)
    )


@pytest.mark.parametrize("path", sorted({p.path for p in CASES}, key=str), ids=str)
def test_the_velocity_carries_the_distribution_along(path):
    """On a line: d/dt P(x_t <= x) + p_t(x) v(x, t) = 0, by differences in t and x."""
    t = inner(path, 8)
    if isinstance(path, VariancePreserving):
        t = t.floor() + 0.5  # its coefficients have a kink at every integer
    alpha, sigma, _, _ = path.at(t)
    x = alpha * torch.randn(8, dtype=torch.float64) + sigma * torch.randn(8, dtype=torch.float64)
    h = 1e-5 * t.clamp_max(1.0)
    (before, after) = (cdf(x, *path.at(s)[:2]) for s in (t - h, t + h))
    e = 1e-5 * sigma
    density = (cdf(x + e, alpha, sigma) - cdf(x - e, alpha, sigma)) / (2 * e)
    v = line(Parameterization(path)).velocity(x[:, None], t)[:, 0]
    torch.testing.assert_close(density * v, (before - after) / (2 * h), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("p", CASES, ids=lambda p: f"{type(p.path).__name__}-{p.prediction}")
def test_as_a_network_it_gives_denoiser_and_velocity_back(p):
    net = GaussianMixture(torch.randn(3, 2, 2), torch.rand(3, 2, 2) + 0.1, None, p)
    t = inner(p.path, 12)
    if isinstance(p.path, VariancePreserving):
        t = t.clamp_min(1.5)
    x = torch.randn(12, 2, 2, dtype=torch.float64)
    a, b, c, d = (k[:, None, None] for k in p.coefficients(t))
    c_in = p.c_in(t)
    F = net(x if c_in is None else c_in[:, None, None] * x, p.path.c_noise(t))
    torch.testing.assert_close(a * x + b * F, net.denoiser(x, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(c * x + d * F, net.velocity(x, t), rtol=1e-8, atol=1e-8)
    assert net(x.float(), p.c_noise(t)).dtype == torch.float32
    start = p.c_noise(torch.full((12,), p.path.t_min)) - 1e-3  # as rounding may leave it
    assert torch.isfinite(net(x.float(), start)).all()


@pytest.mark.parametrize("p", CASES, ids=lambda p: f"{type(p.path).__name__}-{p.prediction}")
def test_the_consistency_network_is_the_end_of_the_flow(p):
    """Its derivative along the flow is zero, and at t_min it is the identity."""
    mean, std = torch.randn(3), torch.rand(3) + 0.2
    net, flow = GaussianConsistency(mean, std, p), GaussianMixture(mean[None], std[None], None, p)
    t = inner(p.path, 10)
    if isinstance(p.path, VariancePreserving):
        t = t.floor() + 0.5
    alpha, sigma, _, _ = p.path.at(t)
    x = alpha[:, None] * mean + sigma[:, None] * torch.randn(10, 3, dtype=torch.float64)
    h = 1e-4 * t.clamp_max(1.0)
    v = flow.velocity(x, t)
    ahead, behind = (net.solution(x + s[:, None] * v, t + s) for s in (h, -h))
    assert (((ahead - behind) / (2 * h)[:, None]).abs() <= 1e-6 * (1 + v.abs())).all()
    start = torch.full((10,), p.path.t_min, dtype=torch.float64)
    torch.testing.assert_close(net.solution(x, start), x, rtol=1e-12, atol=1e-12)
    c_in, (a, b, _, _) = p.c_in(t), (k for k in p.coefficients(t))
    F = net(x if c_in is None else c_in[:, None] * x, p.path.c_noise(t))
    torch.testing.assert_close(a[:, None] * x + b[:, None] * F, net.solution(x, t))
    assert torch.isfinite(net(x, p.path.c_noise(start) - 1e-3)).all()


def quantile_map(x: Tensor, path, data=LINE) -> Tensor:
    """The flow of data on a line from t_max to t_min: it keeps each point's quantile."""
    start, end = (path.at(torch.tensor([t], dtype=torch.float64)) for t in (path.t_max, path.t_min))
    rank = cdf(x, start.alpha, start.sigma, data)
    low, high = torch.full_like(x, -8.0), torch.full_like(x, 8.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = cdf(middle, end.alpha, end.sigma, data) < rank
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


@pytest.mark.parametrize("path", [Linear(), TrigFlow()], ids=str)
def test_the_flow_of_a_mixture_keeps_quantiles(path):
    """The ODE of the network, solved finely, is the monotone map between the distributions."""
    z = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)[:, None]
    times = sampling_times(UniformGrid(), 240, path)
    x = sampling.ode(line(Parameterization(path)), path, z, times=times, solver="heun")
    sigma = path.at(torch.tensor([path.t_max])).sigma
    torch.testing.assert_close(x, quantile_map(sigma * z, path), rtol=0, atol=5e-4)


def test_labels_choose_a_component():
    net = line()
    x, t = torch.randn(6, 1), torch.full((6,), 0.4)
    cond = torch.tensor([0, 1, 2, 3, 3, 0])
    got = net(x, t, cond)
    assert torch.equal(got[3:5], net(x, t)[3:5])
    for k in (0, 1, 2):
        alone = GaussianMixture(torch.tensor([[MEANS[k]]]), STDS[k])
        torch.testing.assert_close(got[cond == k], alone(x, t)[cond == k])


def test_samples_are_of_the_mixture_and_depend_on_seed_and_index_alone():
    net, n = line(), 50_000
    x, component = net.sample(n, seed=3)
    assert x.shape == (n, 1) and x.dtype == torch.float32 and component.dtype == torch.int64
    for k in range(3):
        share = (component == k).double().mean().item()
        assert abs(share - WEIGHTS[k]) < 5 * math.sqrt(WEIGHTS[k] / n)
    rank = cdf(x[:, 0].double().sort().values, torch.ones(1), torch.zeros(1))
    even = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert (rank - even).abs().max() < math.sqrt(math.log(2e9) / (2 * n))
    part, of = net.sample(20, seed=3, first_sample=100)
    assert torch.equal(part, x[100:120]) and torch.equal(of, component[100:120])
    assert not torch.equal(net.sample(n, seed=4)[0], x)
    assert net.sample(0)[0].shape == (0, 1)
    assert net.sample(2, dtype=torch.float64)[0].dtype == torch.float64
    for stream in (rng.NOISE, rng.SAMPLE):  # independent of the noise of training and sampling
        z = ops.noise((n, 1), NoiseKey(3), stream=stream)
        both = torch.stack([z[:, 0], (x[:, 0] - x.mean()) / x.std()])
        assert abs(both.corrcoef()[0, 1].item()) < 6 / math.sqrt(n)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), 1.0), "means"),
        ((torch.zeros(0, 2), 1.0), "means"),
        ((torch.zeros(3, 2), 0.0), "stds must be > 0"),
        ((torch.zeros(3, 2), torch.ones(2, 1)), "broadcast to means"),
        ((torch.zeros(3, 2), 1.0, [1.0, 1.0]), "weights"),
        ((torch.zeros(3, 2), 1.0, [1.0, 0.0, 1.0]), "weights"),
    ],
    ids=str,
)
def test_bad_mixtures_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(*arguments)


def test_bad_calls_are_refused():
    net, x, t = line(), torch.randn(2, 1), torch.full((2,), 0.5)
    for arguments, message in (
        ((torch.randn(2, 3), t), "x must have shape"),
        ((x, t[:1]), "t must have shape"),
        ((x, t, torch.tensor([0.0, 1.0])), "cond must be int64 labels in 0..3"),
        ((x, t, torch.tensor([0])), "cond must be int64 labels in 0..3"),
        ((x, t, torch.tensor([0, 4])), "cond must be labels in 0..3"),
        ((x, t, torch.tensor([-1, 0])), "cond must be labels in 0..3"),
    ):
        with pytest.raises(ValueError, match=message):
            net(*arguments)
    with pytest.raises(ValueError, match="n must be >= 0"):
        net.sample(-1)
    with pytest.raises(ValueError, match="seed"):
        net.sample(2, seed=-1)


@pytest.mark.parametrize(
    ("method", "n", "steps", "share"),
    [("training", 40, 800, 0.45), ("distillation", 20, 500, 0.2)],
    ids=str,
)
def test_a_short_training_approaches_the_exact_consistency_function(method, n, steps, share):
    """Root mean square distance of one-step samples from the quantile map, sample by sample.

    The metric is the squared distance, whose minimum is the mean that the limit of many intervals
    asks for; training from data alone keeps an error of the order of 1 / n (measured: 0.31, 0.24,
    0.20 at n = 10, 20, 40).
    """
    means, stds, weights = [-0.5, 1.5], [0.15, 0.3], [0.6, 0.4]
    teacher = GaussianMixture(*(torch.tensor(v)[:, None] for v in (means, stds)), weights)
    settings = {"discretization": n, "metric": fastcm.losses.SquaredL2()}
    objective = (
        fastcm.ConsistencyTraining(**settings)
        if method == "training"
        else fastcm.ConsistencyDistillation(teacher, **settings)
    )
    torch.manual_seed(0)
    trainer = fastcm.Trainer(
        MLP(shape=(1,), width=64, depth=2),
        objective,
        data=teacher.sample(8192, seed=1)[0],
        averages=(fastcm.EMA(0.99),),
        compile=False,
        progress=False,
    )
    z = ops.noise((2000, 1), NoiseKey(9), stream=rng.SAMPLE)
    exact = quantile_map(z.double(), Linear(), (weights, means, stds))

    def distance() -> float:
        with torch.no_grad():
            x = sampling.one_step(trainer.ema_network(0), Linear(), z).double()
        return (x - exact).square().mean().sqrt().item()

    before = distance()
    trainer.fit(steps)
    assert distance() < share * before
