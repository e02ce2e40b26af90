"""``fastcm evaluate --features``: figures in the table, and what is refused."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from test_cli import TINY, fastcm_
from tiny_features import dinov2_weights

import fastcm
from fastcm.evaluation import DINOv2, Reference, compare, image_features

evaluate = importlib.import_module("fastcm.cli.evaluate")
FIGURE = r"(\S+) \((\S+) to (\S+)\)"


def rows(table: str) -> list[list[str]]:
    """The cells of a table with seven columns."""
    return [list(row) for row in re.findall("│" + 7 * r" ([^│]+?) +│", table)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("features") / "flow"
    fastcm_("train", "--method", "flow", "--steps", 20, "--held-out", 0.05, *TINY, "--out", out)
    return out


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "dinov2.safetensors"
    save_file(dinov2_weights(), path)
    return path


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal in which no cell of a table is cut."""
    monkeypatch.setattr(evaluate, "console", Console(width=300))


@pytest.mark.filterwarnings("ignore:48 samples")
def test_the_table_has_the_distance_precision_and_recall(
    run: Path, weights: Path, tmp_path: Path
) -> None:
    options = ["--features", "dinov2", "--weights", weights, "--batch", 50]
    form = ["evaluate", run, "--steps", 1, "--ode", 2, "--n", 48, *options]
    out = fastcm_(*form, "--write-reference", tmp_path / "ref.npz")
    assert "FD-DINOv2 (64 features)" in out and "precision" in out and "recall" in out
    table = rows(out)
    assert [row[0] for row in table] == ["training data", "multistep", "ode"]
    assert float(table[0][4].split()[0]) < float(table[1][4].split()[0])
    assert fastcm_(*form) == out

    net = DINOv2(weights)
    _, held_out = fastcm.cli.runs.datasets(run)
    reference = Reference.of(image_features(net, held_out.samples))
    sampler = fastcm.Sampler.from_run(run, steps=1)
    found = compare(image_features(net, sampler(48, seed=0)), reference)
    assert found.precision is not None
    shown = re.fullmatch(FIGURE, table[1][4])
    assert shown is not None
    value, low, high = map(float, shown.groups())
    wanted = found.frechet
    assert (value, low, high) == pytest.approx((wanted.value, wanted.low, wanted.high), rel=1e-3)
    assert float(table[1][5].split()[0]) == pytest.approx(found.precision.value, abs=6e-4)

    # the same distances from the statistics alone, without precision and recall
    again = rows(fastcm_(*form, "--reference", tmp_path / "ref.npz"))
    assert [row[4] for row in again] == [row[4] for row in table]
    assert all(row[5:] == ["-", "-"] for row in again)


@pytest.mark.filterwarnings("ignore:.* have a covariance of rank")
def test_a_folder_of_images_is_compared_with_another(
    run: Path, weights: Path, tmp_path: Path
) -> None:
    samples, other = tmp_path / "samples", tmp_path / "other"
    fastcm_("sample", run, "--n", 45, "--out", samples)
    fastcm_("sample", run, "--n", 6, "--first", 100, "--out", other)
    form = ["evaluate", samples, "--features", "dinov2", "--weights", weights]
    out = fastcm_(*form, "--reference", other)
    net = DINOv2(weights)
    reference = Reference.read(other, net)
    drawn = fastcm.Sampler.from_run(run, steps=1)(45, seed=0)
    found = compare(image_features(net, drawn), reference)
    assert f"{found.frechet.value:.4g} (" in out and samples.name in out
    said = fastcm_(*form, fails=True)
    assert "is a folder of images, which needs --features and --reference" in said
    said = fastcm_(*form, "--reference", other, "--n", 4, fails=True)
    assert "--n has no meaning for" in said


def test_what_makes_no_sense_is_refused_before_samples_are_drawn(
    run: Path, weights: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    dinov2 = ["--features", "dinov2", "--weights", weights]
    for options, said in (
        (["--features", "clip"], "--features must be one of inception, dinov2, got 'clip'"),
        (["--features", "inception"], "--features inception needs --weights FILE"),
        (["--weights", weights], "--weights has a meaning only with --features"),
        (["--reference", weights], "--reference has a meaning only with --features"),
        (["--write-reference", "x.npz"], "--write-reference has a meaning only with --features"),
        (["--features", "inception", "--weights", weights], "lacks 'Conv2d_1a_3x3.bn.bias'"),
        (["--features", "dinov2", "--weights", "nowhere.pth"], "no such file of DINOv2 weights"),
        ([*dinov2, "--batch", 0], "--batch must be >= 1, got 0"),
        ([*dinov2, "--reference", "nowhere.npz"], "--reference: no such file or folder"),
        ([*dinov2, "--reference", tmp_path / "inception.npz"], "and DINOv2 has 64 features"),
        ([*dinov2, "--write-reference", "ref.pt"], "--write-reference must end in .npz"),
        (["--n", -1], "--n must be >= 0, got -1"),
    ):
        assert said in fastcm_("evaluate", run, *options, fails=True), said


def test_features_are_of_images(weights: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.rand(50, 2).astype(np.float32))
    options = ["--steps", 1, "--data", tmp_path / "x.npy", "--out", tmp_path / "run"]
    fastcm_("train", "--method", "flow", *TINY[:-2], *options)
    said = fastcm_(
        "evaluate", tmp_path / "run", "--features", "dinov2", "--weights", weights, fails=True
    )
    assert "--features needs a run of images [1 | 3, H, W], its samples are [2]" in said


def test_many_samples_are_drawn_a_batch_at_a_time(
    run: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = fastcm.Sampler.from_run(run, steps=1, batch_size=16)
    monkeypatch.setattr(evaluate, "IN_MEMORY", 20)
    x, features = evaluate._drawn(sampler, 40, 3, None)
    torch.testing.assert_close(x, sampler(40, seed=3)[:20])
    assert features is None
