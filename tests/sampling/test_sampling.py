"""Samplers: calls, noise draws, independence of batching, and exact problems."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastcm import ops, rng, sampling
from fastcm.networks import GaussianConsistency, GaussianMixture
from fastcm.ops import reference
from fastcm.parameterization import Parameterization
from fastcm.paths import Linear, TrigFlow, VarianceExploding, VariancePreserving
from fastcm.rng import NoiseKey
from fastcm.sampling import Sampler
from fastcm.schedules import UniformGrid, sampling_times


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
def streams(monkeypatch, no_native_code):
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
        (steps, {"method": "ode", "solver": "ddim"}),
        (steps, {"method": "ode", "solver": "dpmpp_2m"}),
    ):
        net = Counting()
        Sampler(net, Linear(), **settings, **extra)(4)
        assert net.rows == [4] * expected
    net, key = Counting(), NoiseKey(0)
    times = sampling_times(UniformGrid(), steps, Linear())
    z = torch.randn(4, 3)
    sampling.multistep(net, Linear(), z, key, times=times, constraint=lambda x0: 0.5 * x0)
    assert net.rows == [4] * steps


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_no_noise_is_drawn_after_the_last_evaluation(streams, steps):
    Sampler(Counting(), Linear(), steps=steps, shape=(3,))(2)
    assert streams == [rng.SAMPLE + j for j in range(steps)]
    streams.clear()
    times = sampling_times(UniformGrid(), steps, Linear())
    z = torch.randn(2, 3)
    for constraint in (None, lambda x0: x0):
        sampling.multistep(
            Counting(), Linear(), z, NoiseKey(0), times=times, start=z, constraint=constraint
        )
        assert streams == [rng.SAMPLE + j for j in range(1, steps)]
        streams.clear()
    for solver in sampling.SOLVERS:
        Sampler(Counting(), Linear(), steps=steps, shape=(3,), method="ode", solver=solver)(2)
        assert streams == [rng.SAMPLE]
        streams.clear()


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


@pytest.mark.parametrize("settings", [{"method": "multistep"}, {"solver": "heun"}], ids=str)
@pytest.mark.parametrize("path", [Linear(), VarianceExploding(), TrigFlow()], ids=str)
def test_an_exact_network_gives_the_same_bits_however_it_is_batched(path, settings):
    net = GaussianMixture(torch.randn(4, 2, 3), 0.3, parameterization=Parameterization(path))
    settings = {"method": "ode", **settings, "steps": 4, "null_condition": 4}
    cond = torch.randint(4, (11,))

    def samples(n: int, batch_size: int, seed: int = 4, first: int = 20) -> Tensor:
        sampler = Sampler(net, path, shape=(2, 3), batch_size=batch_size, **settings)
        rows = cond[first - 20 : first - 20 + n]
        return sampler(n, seed=seed, first_sample=first, cond=rows, guidance=1.5)

    whole = samples(11, 512)
    for size in (1, 2, 5, 11):
        assert torch.equal(samples(11, size), whole)
    assert torch.equal(samples(4, 3, first=26), whole[6:10])
    assert not torch.equal(samples(11, 512, seed=5), whole)


S, MEAN = 0.6, 0.3


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(
    "path",
    [Linear(), TrigFlow(), VarianceExploding(t_min=0.5, t_max=80.0), VariancePreserving()],
    ids=str,
)
def test_the_exact_consistency_function_gives_the_data_in_any_number_of_steps(path, steps, seed):
    """Fresh noise of the wrong variance, or a wrong prior, would widen or narrow the samples."""
    p, n = Parameterization(path), 100_000
    net = GaussianConsistency(torch.tensor([MEAN]), S, p)
    x = Sampler(net, p, steps=steps, batch_size=n)((n, 1), seed=seed).double()
    ends = path.at(torch.tensor([path.t_min, path.t_max], dtype=torch.float64))
    std = torch.hypot(ends.alpha[0] * S, ends.sigma[0]).item()
    # a path that ends at alpha > 0 starts without the mean and the width that alpha leaves
    left = (ends.alpha[1] / ends.sigma[1]).item()
    assert abs(x.mean().item() - MEAN) < 6 * std / math.sqrt(n) + 2 * std * MEAN * left
    assert abs(x.std().item() / std - 1) < 6 / math.sqrt(2 * n) + left**2 + 1e-4
    # and normal throughout, by the inequality of Dvoretzky, Kiefer and Wolfowitz
    order = torch.special.ndtr((x[:, 0].sort().values - x.mean()) / x.std())
    rank = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert (order - rank).abs().max() < math.sqrt(math.log(2e9) / (2 * n))


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
    net, z, times = Counting(), torch.empty(0, 3, 4, dtype=torch.float64), [1.0, 0.5]
    assert Sampler(net, Linear(), steps=2, shape=(3, 4))(0).shape == (0, 3, 4)
    for x in (
        sampling.one_step(net, Linear(), z),
        sampling.multistep(net, Linear(), z, NoiseKey(0), times=times, cond=torch.empty(0)),
        *(sampling.ode(net, Linear(), z, times=times, solver=s) for s in sampling.SOLVERS),
    ):
        assert x.shape == z.shape and x.dtype == z.dtype
    assert net.rows == []


def test_an_ode_may_have_more_steps_than_there_are_streams_of_noise():
    net, times = Counting(), sampling_times(UniformGrid(), 300, Linear())
    sampling.ode(net, Linear(), torch.randn(2, 3), times=times)
    Sampler(net, Linear(), times=times, method="ode", shape=(3,))(2)
    assert net.rows == [2] * 600


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arithmetic_and_network_times_are_of_the_dtype_of_z(dtype):
    seen = []

    def net(x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        seen.append((x.dtype, t.dtype))
        return 0.3 * x

    z = torch.randn(2, 3, dtype=dtype)
    times = [80.0, 7.0, 0.3]
    path = VarianceExploding()
    for x in (
        sampling.multistep(net, path, z, NoiseKey(0), times=times, start=z),
        *(sampling.ode(net, path, z, times=times, solver=s) for s in sampling.SOLVERS),
    ):
        assert x.dtype == dtype
    assert set(seen) == {(dtype, dtype)}


def test_start_and_constraint_are_algorithm_4():
    """y + t z, denoise, constrain; then x0 + sqrt(t^2 - t_min^2) z, denoise, constrain, ..."""
    path = VarianceExploding(t_min=0.4, t_max=10.0)
    key, times, y = NoiseKey(5), [6.0, 2.0], torch.randn(4, 3, dtype=torch.float64)
    z = [ops.noise((4, 3), key, stream=rng.SAMPLE + j, dtype=torch.float64) for j in range(2)]
    got = sampling.multistep(
        Counting(), path, z[0], key, times=times, start=y, constraint=lambda x0: x0.clamp(-1, 1)
    )
    x = y + 6.0 * z[0]
    for t in times:
        F = 0.3 * x / math.sqrt(t**2 + 0.25) + math.sin(250 * math.log(t))
        c_skip = 0.25 / ((t - 0.4) ** 2 + 0.25)
        x0 = (c_skip * x + 0.5 * (t - 0.4) / math.sqrt(t**2 + 0.25) * F).clamp(-1, 1)
        x = x0 + math.sqrt(2.0**2 - 0.16) * z[1]
    torch.testing.assert_close(got, x0, rtol=1e-9, atol=1e-9)


def test_the_start_is_noised_by_the_path():
    y, z = torch.randn(2, 4, 3, dtype=torch.float64)
    path, seen = TrigFlow(), []

    def net(x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        seen.append(x)
        return x

    sampling.multistep(net, path, z, NoiseKey(0), times=[0.8], start=y)
    torch.testing.assert_close(0.5 * seen[0], math.cos(0.8) * y + math.sin(0.8) * 0.5 * z)


def test_the_device_is_that_of_buffers_where_there_are_no_parameters():
    net = GaussianMixture(torch.zeros(2, 3), 1.0).to("meta")
    assert Sampler(net, Linear(), shape=(3,)).device.type == "meta"


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"times": []}, "times"),
        ({"times": [0.5, 0.5]}, "descend"),
        ({"times": [0.5, 0.0]}, "descend"),
        ({"times": [1.1, 0.5]}, "outside"),
        ({"times": [1.0], "start": torch.zeros(4, 2)}, "start must have the shape of z"),
        ({"times": [1.0], "start": 0.5}, "start must have the shape of z"),
    ],
    ids=str,
)
def test_bad_arguments_of_the_functions_are_refused_before_any_call(settings, message):
    net, z = Counting(), torch.randn(4, 3)
    with pytest.raises(ValueError, match=message):
        sampling.multistep(net, Linear(), z, NoiseKey(0), **settings)
    if "start" not in settings:
        with pytest.raises(ValueError, match=message):
            sampling.ode(net, Linear(), z, **settings)
    assert net.rows == []


def test_bad_solvers_constraints_and_networks_are_named():
    z, key = torch.randn(4, 3), NoiseKey(0)
    with pytest.raises(ValueError, match="solver must be one of"):
        sampling.ode(Counting(), Linear(), z, times=[1.0], solver="rk45")
    for wrong in (lambda x0: x0[:2], lambda x0: None):
        with pytest.raises(ValueError, match="constraint must return the shape of x0"):
            sampling.multistep(Counting(), Linear(), z, key, times=[1.0], constraint=wrong)
    with pytest.raises(ValueError, match="net must return a tensor of the shape of its input"):
        sampling.one_step(lambda x, t, cond: x[:2], Linear(), z)
