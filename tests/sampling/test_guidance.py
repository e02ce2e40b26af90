"""Guidance: one batched call, equal to two; weights by time; networks that take the weight."""

from __future__ import annotations

import math

import pytest
import torch
from recorded_graphs import RecordedGraph
from torch import Tensor, nn

from fastcm import sampling
from fastcm.networks import GaussianMixture
from fastcm.networks.guidance import guided
from fastcm.parameterization import Parameterization
from fastcm.paths import Linear, VarianceExploding
from fastcm.rng import NoiseKey
from fastcm.sampling import Sampler

TIMES = [1.0, 0.7, 0.4]
METHODS = ["multistep", *sampling.SOLVERS]


class Labelled(nn.Module):
    """F = 0.3 x + sin t + cond, recording the rows and labels of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        assert cond is not None
        self.calls.append(cond)
        return 0.3 * x + t.sin()[:, None] + cond[:, None].to(x)


def run(net, method: str, z: Tensor, path=Linear(), times=TIMES, **settings) -> Tensor:
    if method == "multistep":
        return sampling.multistep(net, path, z, NoiseKey(3), times=times, **settings)
    return sampling.ode(net, path, z, times=times, solver=method, **settings)


@pytest.mark.parametrize("prediction", ["cm", "v"])
@pytest.mark.parametrize("method", METHODS)
def test_guidance_equals_two_separate_calls(method, prediction):
    p = Parameterization(VarianceExploding(), prediction)
    mixture = GaussianMixture(torch.randn(3, 4), 0.4, parameterization=p)
    z, cond = torch.randn(6, 4), torch.tensor([0, 1, 2, 2, 1, 0])
    rows = []

    def counted(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        rows.append(len(x))
        return mixture(x, t, c)

    def separately(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        F_c, F_u = mixture(x, t, c), mixture(x, t, None)
        return F_u + 2.5 * (F_c - F_u)

    times = [80.0, 5.0, 0.5]
    settings = {"path": p, "times": times, "cond": cond}
    got = run(counted, method, z, guidance=2.5, null_condition=3, **settings)
    wanted = run(separately, method, z, **settings)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert rows == [12] * {"heun": 5, "midpoint": 5, "rk4": 9}.get(method, 3)


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_may_change_from_time_to_time(method):
    """The second evaluation of Heun's step takes the weight of the time it is at."""
    weights = dict(zip(TIMES, [2.0, 3.5, 0.5]))
    z, cond = torch.randn(4, 2), torch.randn(4)

    def weighted(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        (w,) = {weights[min(weights, key=lambda k: abs(k - s))] for s in t.tolist()}
        return 0.3 * x + t.sin()[:, None] + (-1 + w * (c[:, None] + 1))

    wanted = run(weighted, method, z, cond=cond)
    for given in (list(weights.values()), weights.__getitem__):
        got = run(Labelled(), method, z, cond=cond, guidance=given, null_condition=-1)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def deviation(x: Tensor) -> Tensor:
    return x.flatten(1).std(1, keepdim=True)


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("method", [*METHODS, "flow-map", "one-step"])
def test_a_rescaled_output_has_the_deviation_of_the_conditional_one(method: str, share: float):
    """Of each sample, before any arithmetic of a sampler: one network that does so by itself."""
    z, cond = torch.randn(5, 6), torch.randn(5)

    def net(x: Tensor, t: Tensor, c: Tensor, s: Tensor | None = None) -> Tensor:
        return (1.0 + 0.5 * c[:, None]) * x.sin() + 0.1 * t[:, None]

    def rescaled(x: Tensor, t: Tensor, c: Tensor, s: Tensor | None = None) -> Tensor:
        F, F_u = net(x, t, c), net(x, t, torch.full_like(c, -1.0))
        G = F_u + 3.0 * (F - F_u)
        return (1.0 - share) * G + share * G * deviation(F) / deviation(G)

    def samples(network, **guidance) -> Tensor:
        if method == "flow-map":
            return sampling.flow_map(network, Linear(), z, times=TIMES, cond=cond, **guidance)
        if method == "one-step":
            return sampling.one_step(network, Linear(), z, cond=cond, **guidance)
        return run(network, method, z, cond=cond, **guidance)

    options = {"guidance": 3.0, "null_condition": -1, "guidance_rescale": share}
    torch.testing.assert_close(samples(net, **options), samples(rescaled), rtol=1e-4, atol=1e-4)
    assert (share == 0.0) == torch.equal(
        samples(net, **options), samples(net, guidance=3.0, null_condition=-1)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_rescaled_output_is_that_of_diffusers(dtype: torch.dtype):
    pipelines = pytest.importorskip("diffusers.pipelines.stable_diffusion")
    F, F_u = torch.randn(4, 3, 5, 5).to(dtype), 2.0 + torch.randn(4, 3, 5, 5).to(dtype)
    w = torch.linspace(0.0, 7.5, 4)
    got = guided(F, F_u, w, 0.7)
    F, F_u = F.to(got.dtype), F_u.to(got.dtype)
    plain = F_u + w[:, None, None, None] * (F - F_u)
    wanted = pipelines.pipeline_stable_diffusion.rescale_noise_cfg(plain, F, 0.7)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_constant_output_has_no_deviation_to_rescale():
    F, w = torch.tensor([[1.5], [-2.0]]), torch.tensor([2.0, 3.0])
    assert torch.equal(guided(F, torch.zeros(2, 1), w, 1.0), torch.tensor([[3.0], [-6.0]]))


@pytest.mark.parametrize("steps", [3, 10])
def test_a_rescaling_sampler_replays_what_it_launches(
    steps: int, recorded_graphs: type[RecordedGraph]
):
    options = {"shape": (6,), "steps": steps, "null_condition": -1, "batch_size": 4}
    net, cond = Labelled(), torch.randn(7)
    plain = Sampler(net, Linear(), **options)
    options["guidance_rescale"] = 0.6
    launched, replayed = (Sampler(net, Linear(), graph=g, **options) for g in ("off", "on"))
    call = {"cond": cond, "guidance": 2.5}
    for seed in range(14):
        x = launched(7, seed=seed, **call)
        assert torch.equal(x, replayed(7, seed=seed, **call))
        assert not torch.equal(x, plain(7, seed=seed, **call))
    assert recorded_graphs.replays >= 3
    # without guidance there is nothing to rescale
    assert torch.equal(launched(7, cond=cond), plain(7, cond=cond))


def test_where_the_weight_is_one_the_conditional_rows_go_alone():
    net, z, cond = Labelled(), torch.randn(4, 2), torch.randn(4)
    interval = run(net, "euler", z, cond=cond, guidance=[1.0, 3.0, 1.0], null_condition=0)
    assert [len(c) for c in net.calls] == [4, 8, 4]
    assert not torch.equal(interval, run(net, "euler", z, cond=cond))
    unguided = run(net, "euler", z, cond=cond, guidance=1.0, null_condition=0)
    assert torch.equal(unguided, run(net, "euler", z, cond=cond))
    none = run(net, "euler", z, cond=cond, guidance=0.0, null_condition=0)
    torch.testing.assert_close(none, run(net, "euler", z, cond=torch.zeros(4)))


def test_the_sampler_takes_a_schedule():
    net, cond = Labelled(), torch.randn(5)

    def samples(guidance, batch_size: int) -> Tensor:
        sampler = Sampler(
            net, Linear(), times=TIMES, shape=(2,), null_condition=-1, batch_size=batch_size
        )
        return sampler(5, seed=1, cond=cond, guidance=guidance)

    by_time = samples(lambda t: 1 + t, 2)
    assert torch.equal(by_time, samples([2.0, 1.7, 1.4], 5))
    assert not torch.equal(by_time, samples(2.0, 5))


def test_a_network_takes_the_weight_through_cond():
    """One call of B rows; labels and weights arrive as they were."""
    labels, weights = torch.tensor([0, 7, 2**24 - 1]), torch.tensor([1.5, 4.0, 7.25])
    rows = []

    def student(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        rows.append(len(x))
        features, w = sampling.split_weight(cond)
        assert torch.equal(features[:, 0].long(), labels)
        assert torch.equal(w, weights)
        return w[:, None] * x

    z = torch.randn(3, 2)
    x = sampling.one_step(student, Linear(), z, cond=sampling.append_weight(labels, weights))
    torch.testing.assert_close(x, (1 - weights[:, None]) * z)
    assert rows == [3]
    features = torch.randn(3, 5)
    both, w = sampling.split_weight(sampling.append_weight(features, 2.0))
    assert torch.equal(both, features) and w.tolist() == [2.0] * 3
    nothing, w = sampling.split_weight(sampling.append_weight(None, 2.0, n=4))
    assert nothing.shape == (4, 0) and w.tolist() == [2.0] * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": 2.0}, "guidance needs cond"),
        ({"guidance_rescale": 0.5}, "guidance_rescale needs guidance"),
        (
            {"guidance": 2.0, "guidance_rescale": 1.5},
            r"guidance_rescale must be in \[0, 1\], got 1.5",
        ),
        ({"guidance": 2.0, "cond": torch.zeros(4)}, "null_condition"),
        ({"cond": torch.zeros(3)}, "cond must have one row per sample, 4"),
        ({"cond": torch.tensor(1.0)}, "cond must have one row per sample, 4"),
        ({"guidance": [2.0], "cond": torch.zeros(4), "null_condition": 0}, "3 times, got 1"),
        ({"guidance": math.nan, "cond": torch.zeros(4), "null_condition": 0}, "finite"),
        ({"guidance": lambda t: math.inf, "cond": torch.zeros(4), "null_condition": 0}, "finite"),
    ],
)
@pytest.mark.parametrize("method", ["multistep", "euler"])
def test_guidance_that_does_not_fit_is_refused_before_any_call(method, settings, message):
    net = Labelled()
    with pytest.raises(ValueError, match=message):
        run(net, method, torch.randn(4, 2), **settings)
    assert net.calls == []


def test_other_misuse_is_named():
    z = torch.randn(4, 2)
    with pytest.raises(TypeError, match=r"cond(\[0\])? must be a tensor"):
        run(Labelled(), "euler", z, cond=[0, 1, 2, 3])
    with pytest.raises(TypeError, match="guidance_rescale must be a number in"):
        Sampler(Labelled(), Linear(), guidance_rescale="0.7")
    with pytest.raises(ValueError, match=r"guidance_rescale must be in \[0, 1\], got -0.1"):
        Sampler(Labelled(), Linear(), guidance_rescale=-0.1)
    with pytest.raises(ValueError, match="append_weight needs cond or n"):
        sampling.append_weight(None, 2.0)
    with pytest.raises(ValueError, match=r"cond must be \[B\], \[B, C\] or a dict"):
        sampling.append_weight(torch.zeros(2, 3, 4), 2.0)
