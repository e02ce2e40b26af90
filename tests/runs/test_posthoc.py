"""Reconstruction of averages from snapshots of others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastcm import EMA, FlowMatching, PowerEMA, Trainer, networks
from fastcm.runs import posthoc

STEPS = 2000


def walk() -> torch.Tensor:
    """A trajectory of 8 parameters that drifts and jitters, as weights in training do."""
    t = torch.arange(1, STEPS + 1, dtype=torch.float64)[:, None]
    frequency = torch.linspace(1, 6, 8, dtype=torch.float64)
    return (t / STEPS * frequency).sin() + 0.05 * torch.randn(STEPS, 8, dtype=torch.float64)


def track(points: torch.Tensor, average: PowerEMA, keep: set[int]) -> dict[int, torch.Tensor]:
    e, kept = points[0].clone(), {}
    for k, p in enumerate(points):
        e += (1 - average.decay(torch.tensor(k))) * (p - e)
        if k + 1 in keep:
            kept[k + 1] = e.clone()
    return kept


@pytest.mark.parametrize(
    ("std", "end"), [(0.05, STEPS), (0.075, STEPS), (0.15, STEPS), (0.1, 1350)]
)
def test_an_average_that_was_not_kept_is_reconstructed_from_two_that_were(std, end):
    points, ends = walk(), {STEPS * i // 20 for i in range(1, 21)}
    stored, snapshots = [], []
    for width in (0.05, 0.10):
        for k, value in track(points, PowerEMA(width), ends).items():
            stored.append((k, PowerEMA(width)))
            snapshots.append({"w": value})
    wanted = track(points, PowerEMA(std), {end})[end]
    found = posthoc.combine(snapshots, posthoc.weights(stored, (end, PowerEMA(std))))["w"]
    neighbour = track(points, PowerEMA(0.05 if std > 0.05 else 0.1), {end})[end]
    assert (found - wanted).norm() < 0.01 * wanted.norm()
    assert (found - wanted).norm() < 0.2 * (neighbour - wanted).norm()


def test_a_stored_profile_is_its_own_reconstruction():
    stored = [(k, PowerEMA(std)) for k in (100, 300, 900) for std in (0.05, 0.1)]
    for i, profile in enumerate(stored):
        one_hot = torch.eye(len(stored), dtype=torch.float64)[i]
        assert torch.allclose(posthoc.weights(stored, profile), one_hot, atol=1e-8)


def test_weights_of_a_reconstruction_sum_to_one_in_the_limit_of_many_snapshots():
    stored = [(k, PowerEMA(0.05)) for k in range(20, 2001, 20)]
    for profile in ((2000, PowerEMA(0.1)), (700, PowerEMA(0.2)), (1333, PowerEMA(0.03))):
        # a weight that never changed is its own average
        assert posthoc.weights(stored, profile).sum().item() == pytest.approx(1, abs=1e-12)


def test_a_run_gives_averages_of_other_widths(tmp_path: Path) -> None:
    data = torch.randn(64, 3)
    kept = (PowerEMA(0.05), PowerEMA(0.10), EMA(0.9))
    net = networks.MLP(shape=(3,), width=16, depth=1)
    options = {"data": data, "batch_size": 8, "compile": False, "progress": False}
    trainer = Trainer(
        net,
        FlowMatching(),
        averages=(*kept, PowerEMA(0.07)),
        directory=tmp_path,
        save_every=5,
        keep=100,
        **options,
    )
    trainer.fit(100)
    wanted = trainer.ema_network(3).state_dict()
    found = posthoc.from_run(tmp_path, PowerEMA(0.07))
    start = trainer.ema_network(1).state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert (found[name] - value).norm() <= 1e-4 * value.norm(), name
    other = posthoc.from_run(tmp_path, PowerEMA(0.08))
    between = [name for name in wanted if not torch.equal(other[name], wanted[name])]
    assert between, "another width gave the same weights"
    for name in between:
        assert (other[name] - start[name]).norm() < (wanted[name] - start[name]).norm()


def test_what_cannot_be_reconstructed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no snapshot"):
        posthoc.weights([], (10, PowerEMA(0.1)))
    with pytest.raises(ValueError, match=r"in \(0, 50\]"):
        posthoc.weights([(50, PowerEMA(0.1))], (51, PowerEMA(0.1)))
    with pytest.raises(ValueError, match="repeat"):
        posthoc.weights([(50, PowerEMA(0.1))] * 2, (50, PowerEMA(0.1)))
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        posthoc.from_run(tmp_path, PowerEMA(0.1))
    net = networks.MLP(shape=(3,), width=8, depth=1)
    Trainer(
        net, FlowMatching(), data=torch.randn(16, 3), batch_size=4, directory=tmp_path,
        progress=False, compile=False,
    ).fit(2)  # fmt: skip
    with pytest.raises(ValueError, match="has a PowerEMA"):
        posthoc.from_run(tmp_path, PowerEMA(0.1))
