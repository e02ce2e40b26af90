"""Paths and parameterizations against their defining formulas, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastcm.ops import reference
from fastcm.parameterization import Parameterization, Rescaled
from fastcm.paths import Linear, TrigFlow, VarianceExploding, VariancePreserving, rescale

PATHS = [
    Linear(),
    VarianceExploding(),
    VarianceExploding(t_min=0.01, t_max=50.0, sigma_data=1.5),
    TrigFlow(),
    TrigFlow(sigma_data=1.0),
    VariancePreserving(),
    VariancePreserving(num_steps=100, beta_start=1e-4, beta_end=0.02, scaled=False),
]
LEGAL = [
    (Linear(), "v"),
    (Linear(), "x0"),
    (VarianceExploding(), "v"),
    (VarianceExploding(), "eps"),
    (VarianceExploding(), "x0"),
    (VarianceExploding(), "edm"),
    (VarianceExploding(), "cm"),
    (VarianceExploding(t_min=0.01, t_max=50.0, sigma_data=1.5), "cm"),
    (TrigFlow(), "v"),
    (TrigFlow(sigma_data=1.5), "x0"),
    (VariancePreserving(), "eps"),
    (VariancePreserving(), "v"),
    (VariancePreserving(scaled=False), "x0"),
]


def inside(path, count: int = 40) -> Tensor:
    """Random times, off the ends and off the kinks that the discrete schedule has."""
    if isinstance(path, VariancePreserving):
        return (torch.randint(int(path.t_max), (count,)) + 0.2 + 0.6 * torch.rand(count)).double()
    if isinstance(path, VarianceExploding):
        low, high = math.log(path.t_min * 1.1), math.log(path.t_max * 0.9)
        return (low + (high - low) * torch.rand(count, dtype=torch.float64)).exp()
    span = path.t_max - path.t_min
    return path.t_min + span * (0.02 + 0.96 * torch.rand(count, dtype=torch.float64))


def close(a: Tensor, b: Tensor, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_coefficients_are_those_of_the_papers():
    for t in (0.002, 0.1, 0.7, 1.0):
        at = torch.tensor([t], dtype=torch.float64)
        alpha, sigma, _, _ = (c.item() for c in Linear().at(at))
        assert (alpha, sigma) == pytest.approx((1 - t, t), abs=1e-15)
        alpha, sigma, _, _ = (c.item() for c in VarianceExploding().at(at))
        assert (alpha, sigma) == (1.0, t)
        alpha, sigma, _, _ = (c.item() for c in TrigFlow(sigma_data=0.7).at(at))
        assert (alpha, sigma) == pytest.approx((math.cos(t), 0.7 * math.sin(t)), abs=1e-15)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_derivatives_are_those_of_alpha_and_sigma(path):
    t = inside(path)
    h = 1e-5 * t.clamp_max(1.0)
    low, at, high = path.at(t - h), path.at(t), path.at(t + h)
    close((high.alpha - low.alpha) / (2 * h), at.alpha_dot, rtol=1e-6, atol=1e-8)
    close((high.sigma - low.sigma) / (2 * h), at.sigma_dot, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scaled", [True, False])
def test_ddpm_index_i_is_time_i_plus_one(scaled):
    """The product of 1 - beta, multiplied up in Python."""
    start, end, steps = (0.00085, 0.012, 1000) if scaled else (1e-4, 0.02, 1000)
    path = VariancePreserving(steps, start, end, scaled=scaled)
    product, wanted = 1.0, {}
    for i in range(steps):
        share = i / (steps - 1)
        if scaled:
            beta = (math.sqrt(start) * (1 - share) + math.sqrt(end) * share) ** 2
        else:
            beta = start * (1 - share) + end * share
        product *= 1 - beta
        wanted[i] = product
    for i in (0, 1, 9, 499, 998, 999):
        at = path.at(torch.tensor([i + 1.0]))
        assert at.alpha.item() == pytest.approx(math.sqrt(wanted[i]), rel=1e-12)
        assert at.sigma.item() == pytest.approx(math.sqrt(1 - wanted[i]), rel=1e-10)
        assert path.c_noise(torch.tensor([i + 1.0])).item() == i
    data = path.at(torch.zeros(1))
    assert (data.alpha.item(), data.sigma.item()) == (1.0, 0.0)
    # the well-known final values of the two schedules
    assert wanted[999] == pytest.approx(0.00466 if scaled else 4.036e-5, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("path", "prediction"), [p for p in LEGAL if p[1] != "edm"], ids=str)
def test_the_denoiser_is_the_identity_at_t_min_bit_for_bit(path, prediction, dtype):
    p = Parameterization(path, prediction)
    a, b, _, _ = p.coefficients(torch.full((3,), path.t_min, dtype=dtype))
    assert a.tolist() == [1.0] * 3
    assert b.tolist() == [0.0] * 3
    x, F = torch.randn(3, 5), 1e6 * torch.randn(3, 5)
    assert torch.equal(reference.boundary(x, F, a, b), x)


@pytest.mark.parametrize(("path", "prediction"), LEGAL, ids=str)
def test_the_exact_target_gives_back_data_velocity_and_noise(path, prediction):
    p = Parameterization(path, prediction)
    t = inside(path)
    x0, z = torch.randn(2, 40, dtype=torch.float64)
    at = path.at(t)
    x = at.alpha * x0 + at.sigma * z
    target_x0, target_z = p.target(t)
    F = target_x0 * x0 + target_z * z
    a, b, c, d = p.coefficients(t)
    g, h = p.noise_coefficients(t)
    close(a * x + b * F, x0, rtol=1e-7, atol=1e-7)
    close(g * x + h * F, z, rtol=1e-7, atol=1e-7)
    velocity = at.alpha_dot * x0 + at.sigma_dot * z
    close(c * x + d * F, velocity, rtol=1e-7, atol=1e-7 * velocity.abs().max().item())


def test_targets_are_what_the_prediction_types_are_called():
    t = torch.tensor([0.3], dtype=torch.float64)
    assert [c.item() for c in Parameterization(Linear(), "v").target(t)] == [-1, 1]
    assert [c.item() for c in Parameterization(Linear(), "x0").target(t)] == [1, 0]
    for path in (VarianceExploding(), VariancePreserving()):
        assert [c.item() for c in Parameterization(path, "eps").target(t)] == [0, 1]
    path = VariancePreserving()
    at = path.at(t)
    p, q = Parameterization(path, "v").target(t)
    assert (p.item(), q.item()) == (-at.sigma.item(), at.alpha.item())
    # TrigFlow: dx/dt = sigma_data F
    p, q = Parameterization(TrigFlow(0.8), "v").target(t)
    assert 0.8 * p.item() == pytest.approx(-math.sin(0.3))
    assert 0.8 * q.item() == pytest.approx(0.8 * math.cos(0.3))


def test_consistency_model_preconditioning_has_the_constants_of_the_paper():
    p = Parameterization(VarianceExploding())
    assert p.prediction == "cm"
    eps, sd = 0.002, 0.5
    for t in (0.002, 0.0021, 0.5, 3.0, 80.0):
        at = torch.tensor([t], dtype=torch.float64)
        a, b, c, d = (k.item() for k in p.coefficients(at))
        c_skip = sd**2 / ((t - eps) ** 2 + sd**2)
        c_out = sd * (t - eps) / math.sqrt(t**2 + sd**2)
        assert a == pytest.approx(c_skip, rel=1e-13)
        assert b == pytest.approx(c_out, rel=1e-13)
        # v = (x - f) / t
        assert c == pytest.approx((1 - c_skip) / t, rel=1e-6, abs=1e-12)
        assert d == pytest.approx(-c_out / t, rel=1e-12, abs=1e-15)
        assert p.c_in(at).item() == pytest.approx(1 / math.sqrt(t**2 + sd**2), rel=1e-14)
        assert p.c_noise(at).item() == pytest.approx(250 * math.log(t), rel=1e-6)
        edm = Parameterization(VarianceExploding(c_noise_scale=0.25), "edm")
        a, b, _, _ = (k.item() for k in edm.coefficients(at))
        assert a == pytest.approx(sd**2 / (t**2 + sd**2), rel=1e-13)
        assert b == pytest.approx(sd * t / math.sqrt(t**2 + sd**2), rel=1e-13)
        assert edm.c_noise(at).item() == pytest.approx(math.log(t) / 4, rel=1e-6)


def test_the_edm_input_and_target_have_unit_variance():
    """Why c_in and the target are what they are: data of variance sigma_data^2."""
    path = VarianceExploding(sigma_data=0.7)
    t = torch.tensor([0.01, 0.7, 20.0], dtype=torch.float64)
    p, q = Parameterization(path, "edm").target(t)
    close((p * 0.7) ** 2 + q**2, torch.ones(3, dtype=torch.float64))
    close(path.c_in(t) ** 2 * (0.7**2 + t**2), torch.ones(3, dtype=torch.float64))
    sd = 0.7
    trig = TrigFlow(sd)
    at = trig.at(torch.tensor([0.4], dtype=torch.float64))
    assert (trig.c_in(torch.ones(1)) ** 2 * (at.alpha**2 * sd**2 + at.sigma**2)).item() == (
        pytest.approx(1.0)
    )


def test_network_times_are_float32_and_taken_from_float64():
    t = torch.tensor([0.0020000001, 0.3], dtype=torch.float64)
    told = Parameterization(VarianceExploding()).c_noise(t)
    assert told.dtype == torch.float32
    assert told.tolist() == [torch.tensor(250 * math.log(v)).item() for v in t.tolist()]


@pytest.mark.parametrize("source", PATHS, ids=str)
@pytest.mark.parametrize("target", PATHS, ids=str)
def test_any_two_paths_differ_by_a_rescaling_at_equal_noise_level(source, target):
    t = inside(source, 200)
    there, scale = rescale(source, target, t)
    at, to = source.at(t), target.at(there)
    reached = (there > target.t_min) & (there < target.t_max)
    assert reached.any()
    close((to.sigma / to.alpha)[reached], (at.sigma / at.alpha)[reached], rtol=1e-6)
    close((scale * at.alpha)[reached], to.alpha[reached], rtol=1e-6, atol=1e-12)
    close((scale * at.sigma)[reached], to.sigma[reached], rtol=1e-6, atol=1e-12)


class GaussianNetwork(nn.Module):
    """The exact network for data N(mean, s^2): E[p x0 + q z | x] of its parameterization."""

    def __init__(self, p: Parameterization, s: float = 0.6, mean: float = 0.3) -> None:
        super().__init__()
        self.p, self.s, self.mean = p, s, mean

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        path = self.p.path
        t = path.time_of(t.double()).clamp(path.t_min, path.t_max)
        at = path.at(t)
        alpha, sigma = at.alpha[:, None], at.sigma[:, None]
        c_in = self.p.c_in(t)
        x = x if c_in is None else x / c_in[:, None]
        variance = (alpha * self.s) ** 2 + sigma**2
        x0 = self.mean + alpha * self.s**2 / variance * (x - alpha * self.mean)
        z = sigma / variance * (x - alpha * self.mean)
        p, q = self.p.target(t)
        return p[:, None] * x0 + q[:, None] * z


@pytest.mark.parametrize(("served", "as_"), LEGAL, ids=str)
@pytest.mark.parametrize(
    ("trained", "prediction"),
    [
        (Linear(), "v"),
        (VarianceExploding(), "cm"),
        (VariancePreserving(), "eps"),
        (TrigFlow(), "v"),
    ],
    ids=str,
)
def test_a_network_of_one_path_serves_every_other(trained, prediction, served, as_):
    ours, theirs = Parameterization(trained, prediction), Parameterization(served, as_)
    # noise levels that every path reaches
    level = torch.tensor([0.05, 0.3, 1.0, 4.0, 10.0], dtype=torch.float64)
    t = served.time_at_angle(level.atan())
    assert torch.allclose(served.at(t).sigma / served.at(t).alpha, level)
    x = torch.randn(5, 3, dtype=torch.float64)
    told = theirs.c_noise(t)
    expected = GaussianNetwork(theirs)(x, told)
    got = Rescaled(GaussianNetwork(ours), ours, theirs)(x, told)
    # network times are float32: an error of 1e-7 there is amplified by the affine maps
    close(got, expected, rtol=1e-4, atol=1e-4 * (1 + expected.abs().max().item()))


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_times_outside_the_path_are_refused(path):
    span = path.t_max - path.t_min
    for wrong in (path.t_min - 0.01 * span, path.t_max + 0.01 * span, math.nan):
        with pytest.raises(ValueError, match="outside"):
            path.at(torch.tensor([path.t_max, wrong]))
        with pytest.raises(ValueError, match="outside"):
            path.check_times([wrong])
    ends = path.at(torch.tensor([path.t_min, path.t_max], dtype=torch.float32))
    assert torch.isfinite(ends.alpha).all() and torch.isfinite(ends.sigma).all()


@pytest.mark.parametrize(
    ("path", "prediction", "message"),
    [
        (Linear(), "eps", "alpha = 0"),
        (TrigFlow(), "eps", "alpha = 0"),
        (Linear(), "cm", "VarianceExploding"),
        (VariancePreserving(), "edm", "VarianceExploding"),
        (Linear(), "score", "prediction"),
    ],
)
def test_illegal_predictions_are_refused(path, prediction, message):
    with pytest.raises(ValueError, match=message):
        Parameterization(path, prediction)


@pytest.mark.parametrize(
    "make",
    [
        lambda: VarianceExploding(t_min=0.0),
        lambda: VarianceExploding(t_min=2.0, t_max=1.0),
        lambda: VarianceExploding(sigma_data=0.0),
        lambda: VarianceExploding(c_noise_scale=-1.0),
        lambda: TrigFlow(sigma_data=-0.5),
        lambda: VariancePreserving(num_steps=1),
        lambda: VariancePreserving(beta_start=0.0),
        lambda: VariancePreserving(beta_start=0.02, beta_end=0.01),
        lambda: VariancePreserving(beta_end=1.0),
    ],
)
def test_paths_refuse_constants_that_make_no_path(make):
    with pytest.raises(ValueError):
        make()
