"""Autoguidance by a second network, and weights of guidance that differ from sample to sample."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from recorded_graphs import RecordedGraph
from torch import Tensor, nn

import fastcm
from fastcm import sampling
from fastcm.networks import MLP
from fastcm.paths import Linear
from fastcm.rng import NoiseKey
from fastcm.sampling import Sampler

TIMES = [1.0, 0.7, 0.4]
METHODS = ["multistep", *sampling.SOLVERS]


class Net(nn.Module):
    """Pointwise; its t is overwritten, as a careless network may do."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        assert not self.training
        shift = 0.1 * t[:, None] if cond is None else (t + 0.1 * cond)[:, None]
        out: Tensor = (self.scale * x).sin() + shift
        t.zero_()
        return out


class Careful(Net):
    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return super().forward(x, t.clone(), cond)


def run(net: Any, method: str, z: Tensor, **settings: Any) -> Tensor:
    if method == "multistep":
        return sampling.multistep(net, Linear(), z, NoiseKey(3), times=TIMES, **settings)
    return sampling.ode(net, Linear(), z, times=TIMES, solver=method, **settings)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_guide_stands_in_for_the_unconditional_network(method: str, conditional: bool) -> None:
    net, guide, z = Net(1.0).eval(), Net(0.5).eval(), torch.randn(5, 3)
    cond = torch.arange(5.0) if conditional else None

    def combined(x: Tensor, t: Tensor, c: Tensor | None) -> Tensor:
        F, G = net(x, t.clone(), c), guide(x, t.clone(), c)
        return G + 2.5 * (F - G)

    got = run(net, method, z, cond=cond, guidance=2.5, guide=guide)
    torch.testing.assert_close(got, run(combined, method, z, cond=cond), rtol=1e-4, atol=1e-4)
    one = run(net, method, z, cond=cond, guidance=1.0, guide=guide)
    assert torch.equal(one, run(net, method, z, cond=cond))


@pytest.mark.parametrize("steps", [3, 10])
def test_the_sampler_replays_what_it_launches(
    steps: int, recorded_graphs: type[RecordedGraph]
) -> None:
    options = {"shape": (6,), "steps": steps, "guide": Careful(0.5), "batch_size": 4}
    net = Careful(1.0)
    launched, replayed = (Sampler(net, Linear(), graph=g, **options) for g in ("off", "on"))
    for i in range(14):
        for guidance in (1.5, torch.linspace(0.5, 3.0, 7) + i):
            call: dict[str, Any] = {"seed": i, "guidance": guidance}
            assert torch.equal(launched(7, **call), replayed(7, **call))
    assert recorded_graphs.replays >= 3
    assert net.training and options["guide"].training
    assert not torch.equal(launched(7, guidance=1.5), launched(7))
    with torch.no_grad():
        options["guide"].scale.mul_(0.5)
    assert torch.equal(launched(7, guidance=1.5), replayed(7, guidance=1.5))


@pytest.mark.parametrize("method", METHODS)
def test_each_sample_has_its_weight(method: str) -> None:
    """As if each were drawn alone; by time, too."""
    net, z, cond = Net(1.0).eval(), torch.randn(3, 4), torch.tensor([0.0, 1.0, 2.0])
    weights = torch.tensor([0.5, 2.0, 3.5])
    by_time = [1.5, weights, weights + 1]
    settings = {"null_condition": 5}

    def alone(i: int, guidance: Any) -> Tensor:
        if method == "multistep":
            return sampling.multistep(
                net,
                Linear(),
                z[i : i + 1],
                NoiseKey(3),
                times=TIMES,
                cond=cond[i : i + 1],
                guidance=guidance,
                first_sample=i,
                **settings,
            )
        return run(net, method, z[i : i + 1], cond=cond[i : i + 1], guidance=guidance, **settings)

    got = run(net, method, z, cond=cond, guidance=weights, **settings)
    wanted = [alone(i, float(w)) for i, w in enumerate(weights)]
    torch.testing.assert_close(got, torch.cat(wanted), rtol=1e-5, atol=1e-5)
    mixed = run(net, method, z, cond=cond, guidance=by_time, **settings)
    wanted = [alone(i, [1.5, float(w), float(w) + 1]) for i, w in enumerate(weights)]
    torch.testing.assert_close(mixed, torch.cat(wanted), rtol=1e-5, atol=1e-5)
    table = torch.stack([torch.full_like(weights, 1.5), weights, weights + 1])
    assert torch.equal(mixed, run(net, method, z, cond=cond, guidance=table, **settings))


def test_weights_follow_their_samples_through_batches_and_streams() -> None:
    net, cond = Net(1.0), torch.arange(11.0) % 3
    weights = torch.linspace(0.5, 4.0, 11)

    def sampler(batch_size: int) -> Sampler:
        return Sampler(
            net, Linear(), times=TIMES, shape=(6,), null_condition=5, batch_size=batch_size
        )

    whole = sampler(11)(11, cond=cond, guidance=weights)
    assert torch.equal(whole, sampler(4)(11, cond=cond, guidance=weights))
    for guidance in (weights, lambda t: weights):
        parts = sampler(4).stream(11, batch=5, cond=cond, guidance=guidance, progress=False)
        assert torch.equal(whole, torch.cat(list(parts)))
    last = sampler(4)(3, first_sample=8, cond=cond[8:], guidance=weights[8:])
    assert torch.equal(whole[8:], last)
    sampler(4).prepare(4, 2, cond=cond, guidance=torch.ones(1))


def test_guides_and_weights_can_be_exported() -> None:
    net, guide = (MLP((3,), width=8) for _ in range(2))
    for module in (net, guide):
        for q in module.parameters():
            nn.init.normal_(q, std=0.3)
    s = Sampler(net, Linear(), steps=2, shape=(3,), guide=guide)
    weights = torch.tensor([1.5, 2.0, 3.0])
    program = fastcm.export_sampler(s, 3, guidance=weights).module()
    got = program(NoiseKey(4).tensor)
    torch.testing.assert_close(got, s(3, seed=4, guidance=weights), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": torch.ones(3)}, r"one weight per sample, \[4\].*got weights \[3\]"),
        ({"guidance": torch.ones(4, 4)}, "3 times, got 4 weights"),
        ({"guidance": torch.ones(3, 2)}, r"got weights \[2\]"),
        ({"guidance": torch.tensor([1.0, 2.0, math.nan, 1.0])}, "finite"),
        ({"guide": Net(1.0)}, "guide needs guidance"),
        ({"guide": lambda x, t, cond: x[:2], "guidance": 2.0}, "guide must return a tensor of"),
    ],
)
def test_what_does_not_fit_is_named(settings: dict[str, Any], message: str) -> None:
    settings = {"cond": torch.zeros(4), "null_condition": 5, **settings}
    with pytest.raises(ValueError, match=message):
        run(Net(1.0).eval(), "euler", torch.randn(4, 2), **settings)
