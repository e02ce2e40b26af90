"""Pairs of noise and sample: made by a teacher, resumed, read, trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastcm
from fastcm import FlowMatching, Linear, PairDistillation, Sampler, Trainer, data, ops, rng
from fastcm.cli.sample_folder import sample_folder
from fastcm.networks import MLP, GaussianMixture
from fastcm.objectives import Batch
from fastcm.rng import NoiseKey


@pytest.fixture
def sampler() -> Sampler:
    net = GaussianMixture(torch.tensor([[0.5, -0.5], [-1.0, 0.2]]), 0.3)
    return Sampler(net, Linear(), steps=8, method="ode", shape=(2,), batch_size=16)


def made(sampler: Sampler, folder: Path, n: int = 40, **options: Any) -> Path:
    sample_folder(sampler, folder, n, format="pairs", seed=7, **options)
    return folder


def test_a_pair_is_a_sample_and_the_noise_it_was_made_from(
    sampler: Sampler, tmp_path: Path
) -> None:
    found = data.load(made(sampler, tmp_path / "p"))
    assert found.paired and found.x.shape == (40, 2, 2) and found.shape == (2,)
    x, z = found.x.unbind(1)
    assert torch.equal(found.samples, x)
    assert torch.equal(z, ops.noise((40, 2), NoiseKey(7), stream=rng.SAMPLE))
    torch.testing.assert_close(x, sampler(40, seed=7), rtol=0, atol=1e-5)
    # the files hold no noise
    with np.load(tmp_path / "p" / "000000-000015.npz") as file:
        assert set(file) <= {"x", "labels"} and file["x"].shape == (16, 2)


def test_ranges_of_several_processes_make_the_same_pairs(sampler: Sampler, tmp_path: Path) -> None:
    whole = data.load(made(sampler, tmp_path / "whole"))
    made(sampler, tmp_path / "parts", 24, first=16)
    with pytest.raises(FileNotFoundError):
        data.pairs(tmp_path / "nowhere")
    parts = made(sampler, tmp_path / "parts", 16)
    assert torch.equal(data.load(parts).x, whole.x)


def test_shards_follow_their_indices_and_not_their_names(sampler: Sampler, tmp_path: Path) -> None:
    """One of 7 digits comes before one of 6 in the alphabet; other files are none."""
    folder = made(sampler, tmp_path / "p", 32, first=10**6 - 16)
    assert sorted(f.name for f in folder.glob("*.npz"))[0].startswith("1000000")
    np.savez(folder / "my-notes.npz", x=np.zeros(3))
    x = data.load(folder).samples
    torch.testing.assert_close(x, sampler(32, seed=7, first_sample=10**6 - 16), rtol=0, atol=1e-5)
    kept = (folder / "1000000-1000015.npz").read_bytes()
    (folder / "1000008-1000023.npz").write_bytes(kept)
    with pytest.raises(ValueError, match="holds pairs below 1000016 that another shard holds"):
        data.load(folder)


def test_damaged_pairs_are_refused(sampler: Sampler, tmp_path: Path) -> None:
    folder = made(sampler, tmp_path / "p", 64)
    shard = folder / "000016-000031.npz"
    kept = shard.read_bytes()
    shard.write_bytes(kept[:-100])
    with pytest.raises(ValueError, match=r"000016-000031.npz is not a readable"):
        data.load(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=r"no shard of the pairs 16..31"):
        data.load(folder)
    np.savez(shard, x=np.zeros((16, 3), np.float32))
    with pytest.raises(ValueError, match=r"must hold 16 samples \[2\] in float32"):
        data.load(folder)
    shard.write_bytes(kept)
    assert len(data.load(folder)) == 64
    made(sampler, tmp_path / "p", 64)  # complete: the same settings draw nothing anew
    with pytest.raises(ValueError, match="samples of another setting: seed: 7 -> 8"):
        sample_folder(sampler, folder, 64, format="pairs", seed=8)
    plain = tmp_path / "plain"
    sample_folder(sampler, plain, 16, format="npz")
    with pytest.raises(ValueError, match="samples without their noise"):
        data.load(plain)
    (folder / "samples.json").write_text(json.dumps({"format": "pairs"}))
    with pytest.raises(ValueError, match="seed and shape"):
        data.load(folder)


def test_a_batch_of_pairs_has_their_noise_in_every_method() -> None:
    x0, z = torch.randn(6, 3), torch.randn(6, 3)
    batch = Batch(x0, NoiseKey(0), z=z)
    p = FlowMatching().parameterization
    t = torch.tensor([0.3] * 6, dtype=torch.float64)
    (x_t,) = batch.states(p, t)
    torch.testing.assert_close(x_t, 0.7 * x0 + 0.3 * z)
    (inputs,) = batch.network_inputs(p, (t, x_t))
    torch.testing.assert_close(inputs, x_t)
    torch.testing.assert_close(batch.stored((t, -t))[0], 0.3 * (x0 - z))


def test_pair_distillation_is_the_distance_in_one_step() -> None:
    x0, z = torch.randn(6, 3), torch.randn(6, 3)
    objective = PairDistillation(metric=fastcm.losses.SquaredL2())

    def net(x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        assert torch.equal(x, z) and (t == 1).all()
        return z - x0 + 0.5

    loss = objective.loss(net, Batch(x0, NoiseKey(0), z=z))
    torch.testing.assert_close(loss.per_sample, torch.full((6,), 0.75))
    with pytest.raises(ValueError, match="needs samples with their noise"):
        objective.loss(net, Batch(x0, NoiseKey(0)))


def test_a_second_rectification_is_straighter(sampler: Sampler, tmp_path: Path) -> None:
    """One Euler step of a flow that was trained on pairs follows them; of one on data, the mean."""
    found = data.load(made(sampler, tmp_path / "p", 512))
    x, z = found.x.unbind(1)
    error = []
    for source in (found, data.Dataset(found.samples)):
        torch.manual_seed(0)
        t = Trainer(
            MLP(shape=(2,), width=64, depth=2),
            FlowMatching(),
            data=source,
            batch_size=256,
            compile=False,
            progress=False,
            averages=(fastcm.EMA(0.9),),
        ).fit(300)
        one = fastcm.sampling.ode(t.ema_network(0), Linear(), z, times=[1.0])
        error.append((one - x).square().sum(1).mean().item())
        assert t.metadata["shape"] == [2]
    assert error[0] < 0.25 * error[1]


def test_both_halves_of_a_batch_of_pairs_are_dense() -> None:
    """Operators would copy a view with gaps, in every step."""
    pairs = data.Dataset(torch.randn(20, 2, 3, 4), torch.arange(20), paired=True)
    source = data.DeviceData(pairs, 0, "cpu")
    for step in range(5):  # across epochs
        x, labels = source.draw(step, 8)
        assert x.shape == (8, 2, 3, 4) and torch.equal(x, pairs.x[labels])
        part = x[2:6]  # a micro-batch
        assert all(half.is_contiguous() for half in (*x.unbind(1), *part.unbind(1)))


def test_pairs_of_the_wrong_form_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pairs must be \[N, 2, ...\]"):
        data.Dataset(torch.zeros(4, 3), paired=True)
    halves = data.Dataset(torch.zeros(10, 2, 3), torch.arange(10), paired=True).split(0.5)
    assert all(half.paired and half.shape == (3,) for half in halves)
    assert halves[0].without_labels().labels is None
