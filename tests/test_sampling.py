"""Samplers: calls, noise draws, independence of batching, and exact problems."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastcm import ops, reference, rng, sampling
from fastcm.parameterization import Parameterization
from fastcm.paths import Linear, TrigFlow, VarianceExploding
from fastcm.rng import NoiseKey
from fastcm.sampler import Sampler
from fastcm.schedules import KarrasGrid, UniformGrid, sampling_times

S, MEAN = 0.6, 0.3
"""Gaussian data N(MEAN, S^2): the flow and its solution have closed forms."""


class Gaussian(nn.Module):
    """The exact denoiser E[x0 | x] ("flow"), or the end of the ODE's trajectory ("solution")."""

    def __init__(self, p: Parameterization, kind: str) -> None:
        super().__init__()
        self.p, self.kind = p, kind

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        path, dtype = self.p.path, x.dtype
        t = path.time_of(t.double()).clamp(path.t_min, path.t_max)
        at, end = path.at(t), path.at(torch.full_like(t, path.t_min))
        c_in = self.p.c_in(t)
        x = x.double() if c_in is None else x.double() / c_in[:, None]
        std = torch.hypot(at.alpha * S, at.sigma)[:, None]
        centred = x - at.alpha[:, None] * MEAN
        if self.kind == "flow":
            f = MEAN + at.alpha[:, None] * S**2 / std**2 * centred
        else:
            f = MEAN + torch.hypot(end.alpha * S, end.sigma)[:, None] / std * centred
        a, b, _, _ = (k[:, None] for k in self.p.coefficients(t))
        return ((f - a * x) / b).to(dtype)


class Counting(nn.Module):
    """F = 0.3 x + sin t + cond, element by element, counting calls and rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        self.rows.append(len(x))
        F = 0.3 * x + t.sin().reshape(-1, *[1] * (x.dim() - 1))
        return F if cond is None else F + cond.reshape(-1, *[1] * (x.dim() - 1))


@pytest.fixture
def streams(monkeypatch):
    """The stream of every noise draw."""
    drawn: list[int] = []
    original = reference.noise

    def counted(*args, stream: int, **kwargs) -> Tensor:
        drawn.append(stream)
        return original(*args, stream=stream, **kwargs)

    monkeypatch.setattr(reference, "noise", counted)
    return drawn


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_every_sampler_spends_the_calls_it_says(steps):
    settings = {"steps": steps, "shape": (3,), "device": "cpu"}
    for expected, extra in (
        (steps, {}),
        (steps, {"method": "ode"}),
        (2 * steps - 1, {"method": "ode", "solver": "heun"}),
    ):
        net = Counting()
        Sampler(net, Linear(), **settings, **extra)(4)
        assert net.rows == [4] * expected


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_no_noise_is_drawn_after_the_last_evaluation(streams, steps):
    Sampler(Counting(), Linear(), steps=steps, shape=(3,))(2)
    assert streams == [rng.SAMPLE + j for j in range(steps)]
    streams.clear()
    Sampler(Counting(), Linear(), steps=steps, shape=(3,), method="ode")(2)
    assert streams == [rng.SAMPLE]


def test_multistep_sampling_is_its_formula():
    """On the variance-exploding path the fresh noise is sqrt(t^2 - t_min^2) z."""
    path = VarianceExploding(t_min=0.4, t_max=10.0)
    p, times, key = Parameterization(path), [10.0, 2.0, 0.7], NoiseKey(5)
    got = Sampler(Counting(), path, times=times)((4, 3), seed=5, first_sample=9)

    def z(j: int) -> Tensor:
        return ops.noise((4, 3), key, stream=rng.SAMPLE + j, first_sample=9, dtype=torch.float64)

    x0 = torch.zeros(())
    x = 10.0 * z(0)
    for j, t in enumerate(times):
        if j:
            x = x0 + math.sqrt(t**2 - 0.16) * z(j)
        F = 0.3 * x / math.sqrt(t**2 + 0.25) + math.sin(250 * math.log(t))
        c_skip = 0.25 / ((t - 0.4) ** 2 + 0.25)
        x0 = c_skip * x + 0.5 * (t - 0.4) / math.sqrt(t**2 + 0.25) * F
    torch.testing.assert_close(got.double(), x0, rtol=1e-4, atol=2e-4)
    assert p.coefficients(torch.tensor([0.4], dtype=torch.float64)).a.item() == 1.0


@pytest.mark.parametrize("method", ["multistep", "ode"])
def test_samples_do_not_depend_on_how_they_are_batched(method):
    def sampler(batch_size: int) -> Sampler:
        return Sampler(
            Counting(), Linear(), steps=3, method=method, shape=(2, 3), batch_size=batch_size
        )

    cond = torch.randn(10)
    whole = sampler(512)(10, seed=4, first_sample=20, cond=cond)
    for size in (1, 3, 10):
        assert torch.equal(sampler(size)(10, seed=4, first_sample=20, cond=cond), whole)
    assert torch.equal(sampler(4)(3, seed=4, first_sample=25, cond=cond[5:8]), whole[5:8])
    assert not torch.equal(sampler(4)(10, seed=5, first_sample=20, cond=cond), whole)


def error(path, solver: str, steps: int) -> float:
    """Of the ODE solution at t_min, in float64, relative to its spread."""
    p = Parameterization(path, "v" if path != Linear() else None)
    grid = KarrasGrid() if isinstance(path, VarianceExploding) else UniformGrid()
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    times = sampling_times(grid, steps, path)
    x = sampling.ode(Gaussian(p, "flow"), p, z, times=times, solver=solver)
    assert x.dtype == torch.float64
    ends = path.at(torch.tensor([path.t_min, path.t_max], dtype=torch.float64))
    spread = torch.hypot(ends.alpha * S, ends.sigma)
    start = ends.sigma[1] * z - ends.alpha[1] * MEAN
    exact = ends.alpha[0] * MEAN + spread[0] / spread[1] * start
    return (x - exact).abs().max().item()


@pytest.mark.parametrize("path", [Linear(), VarianceExploding(), TrigFlow()], ids=str)
def test_euler_is_of_first_order(path):
    first, second = error(path, "euler", 64), error(path, "euler", 128)
    assert 1.8 < first / second < 2.2
    assert second < 0.05


@pytest.mark.parametrize("path", [Linear(), VarianceExploding(), TrigFlow()], ids=str)
def test_heun_is_of_second_order(path):
    first, second = error(path, "heun", 64), error(path, "heun", 128)
    assert 3.3 < first / second < 4.8
    assert second < 0.1 * error(path, "euler", 128)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(
    "path", [Linear(), TrigFlow(), VarianceExploding(t_min=0.5, t_max=80.0)], ids=str
)
def test_the_exact_consistency_function_gives_the_data_in_any_number_of_steps(path, steps, seed):
    """Fresh noise of the wrong variance, or a wrong prior, would widen or narrow the samples."""
    p, n = Parameterization(path), 100_000
    x = Sampler(Gaussian(p, "solution"), p, steps=steps, batch_size=n)((n, 1), seed=seed).double()
    end = path.at(torch.tensor([path.t_min], dtype=torch.float64))
    std = torch.hypot(end.alpha * S, end.sigma).item()
    # a path that ends at alpha = 1 starts without the mean, off by MEAN / t_max of a deviation
    slack = 2 * std * MEAN / path.t_max if isinstance(path, VarianceExploding) else 0.0
    assert abs(x.mean().item() - MEAN) < 6 * std / math.sqrt(n) + slack
    assert abs(x.std().item() / std - 1) < 6 / math.sqrt(2 * n) + 1e-4


def test_one_step_is_the_denoiser_of_pure_noise():
    z = torch.randn(5, 3)
    x = sampling.one_step(Counting(), Linear(), z)
    torch.testing.assert_close(x, z - (0.3 * z + math.sin(1.0)))


def test_guidance_is_one_call_of_twice_the_rows_and_its_formula():
    net, z, cond = Counting(), torch.randn(4, 3), torch.randn(4)
    x = sampling.one_step(net, Linear(), z, cond=cond, guidance=2.5, null_condition=-1)
    assert net.rows == [8]
    F = 0.3 * z + math.sin(1.0) + (-1 + 2.5 * (cond[:, None] + 1))
    torch.testing.assert_close(x, z - F, rtol=1e-5, atol=1e-5)


def test_no_samples_cost_no_call():
    net = Counting()
    x = Sampler(net, Linear(), steps=2, shape=(3, 4))(0)
    assert x.shape == (0, 3, 4) and net.rows == []


def test_sampling_leaves_every_module_in_the_mode_it_was_in():
    """A part that was frozen in eval mode stays there, also within a network in training."""

    class Frozen(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Dropout().eval()

        def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            assert not self.training and not self.backbone.training
            return super().forward(x, t, cond)

    net = Frozen()
    assert net.training
    Sampler(net, Linear(), shape=(3,))(2)
    assert net.training and not net.backbone.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 2, "times": [1.0]}, "steps or times"),
        ({"times": []}, "times"),
        ({"times": [0.5, 0.5]}, "descend"),
        ({"times": [0.5, 1.0]}, "descend"),
        ({"times": [1.0, 0.0]}, "descend"),
        ({"times": [1.5]}, "outside"),
        ({"times": [math.nan]}, "outside"),
        ({"steps": 241}, "at most 240"),
        ({"method": "sde"}, "method"),
        ({"solver": "rk4"}, "solver"),
        ({"batch_size": 0}, "batch_size"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampler(Counting(), Linear(), **settings)


@pytest.mark.parametrize(
    ("n", "arguments", "message"),
    [
        (-1, {}, "n must"),
        ((4,), {}, "shape"),
        (4, {"cond": torch.zeros(3)}, "cond"),
        (4, {"cond": torch.zeros(4), "guidance": 2.0}, "null_condition"),
        (4, {"guidance": 2.0}, "cond"),
        (4, {"seed": -1}, "seed"),
    ],
    ids=str,
)
def test_bad_calls_are_refused(n, arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampler(Counting(), Linear(), shape=(3,))(n, **arguments)
    with pytest.raises(ValueError, match="shape"):
        Sampler(Counting(), Linear())(4)
