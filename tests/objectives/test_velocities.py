"""Methods whose network predicts velocities: shortcut, of two times, and straight segments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_family import small
from test_objectives import GAUSSIAN, Net
from torch import Tensor

import fastcm
from fastcm import (
    ConsistencyFlowMatching,
    Shortcut,
)
from fastcm.losses import SquaredL2
from fastcm.objectives import Batch
from fastcm.parameterization import Parameterization
from fastcm.paths import Linear, TrigFlow, VarianceExploding
from fastcm.rng import NoiseKey


def exact_mean_velocity(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Of Gaussian data: the trajectory through (x, t) scales as the standard deviation."""
    t, s = t.double()[:, None], s.double()[:, None]

    def std(t: Tensor) -> Tensor:
        return (((1 - t) * GAUSSIAN) ** 2 + t**2).sqrt()

    here = (t - (1 - t) * GAUSSIAN**2) / std(t) ** 2 * x
    gap = torch.where(t > s, t - s, 1.0)
    return torch.where(t > s, x * (1 - std(s) / std(t)) / gap, here).float()


class TwoTimes(Net):
    def __init__(self, function: Any = exact_mean_velocity) -> None:
        super().__init__()
        self.of = function
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None
    ) -> Tensor:
        s = t if s is None else s
        self.seen.append((x, t, s))
        return self.gain * self.of(x, t, s)


def test_times_of_shortcut_rows_are_dyadic() -> None:
    objective = Shortcut(steps=8, every=4)
    t, d = objective.draw(Batch(torch.zeros(40_000, 1), NoiseKey(3)))
    bootstrap = torch.arange(40_000) % 4 == 0
    assert (d[~bootstrap] == 0).all() and len(t[~bootstrap].unique()) > 20_000
    t, d = t[bootstrap], d[bootstrap]
    assert sorted(d.unique().tolist()) == [1 / 8, 1 / 4, 1 / 2, 1]
    assert torch.equal((t / d).round() * d, t) and (t >= d).all() and (t <= 1).all()
    for size in (1 / 8, 1 / 4, 1 / 2, 1):
        assert abs((d == size).double().mean().item() - 0.25) < 0.02


def test_a_large_shortcut_is_the_mean_of_two_halves() -> None:
    """The exact map of Gaussian data is consistent with itself: only the smallest steps err."""
    objective = Shortcut(steps=64, every=2)
    batch = Batch(GAUSSIAN * torch.randn(4000, 2), NoiseKey(4))
    net, target = TwoTimes(), TwoTimes()
    loss = objective.loss(net, batch, target)
    _, d = objective.draw(batch)
    rows = slice(None, None, 2)
    assert len(net.seen) == 1 and len(target.seen) == 2  # one call of everything
    assert len(target.seen[0][0]) == 2000
    large = d[rows] > 1 / 64
    assert loss.per_sample[rows][large].max() < 1e-6
    assert loss.per_sample[rows][~large].max() < 5e-3
    told = target.seen[0][1] - target.seen[0][2]
    torch.testing.assert_close(told[large].double(), 0.5 * d[rows][large], rtol=1e-4, atol=1e-7)
    assert (told[~large] == 0).all()
    assert loss.per_sample[1::2].mean() > 0.1  # flow matching has its variance


def test_micro_batches_of_shortcut_are_those_of_the_whole_batch() -> None:
    objective, x0 = Shortcut(steps=16), torch.randn(32, 3)
    whole = objective.loss(TwoTimes(), Batch(x0, NoiseKey(1)), TwoTimes()).per_sample
    parts = [
        objective.loss(TwoTimes(), Batch(x0[i : i + 16], NoiseKey(1, 0, i)), TwoTimes()).per_sample
        for i in (0, 16)
    ]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_clipping_bounds_the_target() -> None:
    def huge(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return torch.full_like(x, 100.0)

    batch = Batch(torch.randn(8, 2), NoiseKey(1))
    loss = Shortcut(clip=4.0).loss(TwoTimes(huge), batch, TwoTimes(huge))
    assert loss.per_sample[0].item() == pytest.approx(2 * (100.0 - 4.0) ** 2)


def test_the_flow_map_of_a_gaussian_is_exact_in_any_number_of_steps() -> None:
    z = torch.randn(500, 2)
    for times in ([1.0], [1.0, 0.5], [1.0, 0.9, 0.3, 0.1]):
        x = fastcm.sampling.flow_map(TwoTimes(), Linear(), z, times=times)
        torch.testing.assert_close(x, GAUSSIAN * z, rtol=1e-4, atol=1e-5)
    sampler = fastcm.Sampler(TwoTimes(), Linear(), steps=2, method="flow-map", shape=(2,))
    assert sampler(1000, seed=1).std().item() == pytest.approx(GAUSSIAN, rel=0.05)
    with pytest.raises(ValueError, match="must predict 'v' on Linear"):
        fastcm.Sampler(TwoTimes(), VarianceExploding(), method="flow-map")


def test_straight_velocities_have_no_loss_and_the_end_of_a_segment_is_given() -> None:
    """One data point c: v = (x - c) / t is straight, so both parts vanish where t > delta."""
    straight = Net(lambda x, t, cond: (x - 0.7) / t[:, None].clamp_min(1e-6))
    objective = ConsistencyFlowMatching(segments=2, delta=0.01, velocity_weight=1e-2)
    batch = Batch(torch.full((2000, 2), 0.7), NoiseKey(5))
    loss = objective.loss(straight, batch, straight)
    t, s = straight.calls[-1][1], straight.calls[0][1]
    away = s > 0
    assert loss.per_sample[away].max() < 1e-6
    inside = ((t > 0.01) & (t < 0.5)) | (t > 0.51)
    torch.testing.assert_close((t - s)[inside], torch.full_like(t[inside], 0.01), rtol=0, atol=1e-5)
    near = (t > 0.5) & (t < 0.51)
    assert near.any() and (s[near] == 0.5).all()


def test_both_parts_of_consistency_flow_matching_reach_the_gradient() -> None:
    batch = Batch(torch.randn(64, 2), NoiseKey(6))
    found = {}
    for weight in (0.0, 0.5):
        net, target = Net(), Net(lambda x, t, cond: torch.zeros_like(x))
        objective = ConsistencyFlowMatching(velocity_weight=weight)
        loss = objective.loss(net, batch, target)
        loss.backward()
        F = net.calls[0]
        found[weight] = net.gain.grad.item()
    v = 0.5 * F[0] + F[1][:, None]
    expected = 0.5 * (2 * v.square()).sum().item() / 64  # d (|g v|^2) / dg at g = 1
    assert found[0.5] - found[0.0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Shortcut(steps=6), "power of 2, got 6"),
        (lambda: Shortcut(Parameterization(TrigFlow())), "must predict 'v' on Linear"),
        (lambda: Shortcut(clip=0.0), "clip must be > 0"),
        (lambda: ConsistencyFlowMatching(segments=0), "segments must be >= 1"),
        (lambda: ConsistencyFlowMatching(delta=0.6), r"delta must be in \(0, 0.5\]"),
        (lambda: ConsistencyFlowMatching(Parameterization(Linear(), "x0")), "must predict 'v'"),
    ],
)
def test_settings_of_the_flow_methods_out_of_range_are_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_an_objective_of_two_times_needs_a_network_of_two_times() -> None:
    settings: dict[str, Any] = {"data": torch.randn(8, 3), "batch_size": 8}
    with pytest.raises(ValueError, match="Shortcut needs a network of two times"):
        fastcm.Trainer(small(), Shortcut(), **settings)
    with pytest.raises(ValueError, match="s was given to a network of one time"):
        small()(torch.zeros(2, 3), torch.ones(2), s=torch.zeros(2))
    fastcm.Trainer(small(two_times=True), Shortcut(), **settings, progress=False).fit(2)


def test_the_second_time_changes_nothing_at_the_start_and_something_later() -> None:
    one, two = small(), small(two_times=True)
    two.load_state_dict(one.state_dict(), strict=False)
    for net in (one, two):
        torch.nn.init.ones_(net.output.weight)
    x, t = torch.randn(4, 3), torch.rand(4)
    assert torch.equal(one(x, t), two(x, t, s=0 * t))
    torch.nn.init.normal_(two.conditioning.gap.weight)
    assert not torch.equal(two(x, t, s=0 * t), two(x, t, s=0.5 * t))
    assert torch.equal(two(x, t), two(x, t, s=t))
    assert SquaredL2()(two(x, t), two(x, t)).sum() == 0
