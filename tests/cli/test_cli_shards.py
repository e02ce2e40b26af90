"""``fastcm train --data`` on a folder of shards, and what compares its samples with the data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")

from typer.testing import CliRunner

from fastcm.cli import recipes, runs
from fastcm.cli.app import app
from fastcm.cli.recipes import Recipe
from fastcm.data import Shards, digits, write_shards
from fastcm.runs.checkpoint import list_checkpoints, load


def fastcm_(*arguments: object) -> None:
    """The command, in this process."""
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("sklearn")
    data = digits()
    assert data.labels is not None
    write_shards(tmp_path / "s", zip(data.x.split(500), data.labels.split(500)), rows=300)
    return tmp_path / "s"


def test_a_run_on_shards_is_trained_resumed_and_evaluated(folder: Path, tmp_path: Path) -> None:
    def train(run: str, *more: object) -> None:
        options = ["--data", folder, "--net", "mlp", "--width", 8, "--batch", 16, "--steps", 6]
        options += ["--save-every", 3, "--conditional", "--compile", "off", *more]
        fastcm_("train", "--out", tmp_path / run, *options)

    train("straight")
    train("stopped")
    stopped = list_checkpoints(tmp_path / "stopped")
    for file in stopped[0].iterdir():  # as if killed between the two saves
        file.unlink()
    stopped[0].rmdir()
    train("stopped", "--resume")
    weights = [load(list_checkpoints(tmp_path / run)[0]).groups for run in ("straight", "stopped")]
    for name, tensor in weights[0]["average_0"].items():
        assert torch.equal(tensor, weights[1]["average_0"][name])
    train_data, held_out = runs.datasets(tmp_path / "straight")
    assert (len(train_data), len(held_out), held_out.num_classes) == (1500, 297, 10)
    assert torch.equal(held_out.x, digits().x[1500:])
    fastcm_("evaluate", tmp_path / "straight", "--n", 20, "--steps", 1, "--ode", 2)


def test_of_many_shards_the_first_rows_are_compared(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "IN_MEMORY", 100)
    train_data, held_out = Recipe(data=str(folder)).datasets()
    assert isinstance(train_data, Shards) and len(train_data) == 1500
    assert len(held_out) == 100 and held_out.labels is None


def test_labels_that_are_not_there_are_asked_for(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", [torch.zeros(10, 2)], rows=5)
    with pytest.raises(ValueError, match="--conditional needs labels"):
        Recipe(data=str(tmp_path / "s"), conditional=True).datasets()
