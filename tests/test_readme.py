"""What the README and its tutorial of loops say is what the code does and what was measured."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import ROOT, block, shortened, text

import fastcm
from benchmarks import report

README, LOOP, EXPORT = "README.md", "docs/tutorials/loop.md", "docs/export.md"


def test_the_tables_and_plots_are_those_of_the_results() -> None:
    for name, made in report.rendered().items():
        assert text(name) == made, f"{name}: run python -m benchmarks.report"


def test_the_first_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = shortened(block(README, "runs/cd", "fit(1000)"))
    scope: dict[str, object] = {}
    exec(code, scope)
    x = scope["x"]
    assert isinstance(x, torch.Tensor) and x.shape == (1000, 2)


def test_the_optimizer_in_a_loop_of_ones_own() -> None:
    scope: dict[str, Any] = {}
    exec(block(LOOP, "optimizer.averaged"), scope)
    weight, average = scope["net"].weight, scope["target"].weight
    assert scope["optimizer"].counts.tolist() == [3, 0, 0]
    assert not torch.equal(weight, average) and torch.allclose(weight, average, atol=0.01)


@pytest.mark.parametrize("page", [README, LOOP])
def test_the_gradients_in_a_loop_of_ones_own(page: str) -> None:
    scope: dict[str, Any] = {}
    exec(block(page, "Gradients("), scope)
    assert scope["key"].step == 4 and scope["optimizer"].counts.tolist() == [4, 0, 0]
    assert torch.isfinite(scope["loss"])


def test_the_sampler_of_the_readme_draws_the_same_samples_again() -> None:
    scope: dict[str, Any] = {}
    exec(block(README, ".stream("), scope)
    torch.testing.assert_close(scope["x"][90:], scope["y"], rtol=1e-5, atol=1e-5)
    assert len(scope["batch"]) == 1000 % 256


def test_the_exported_sampler_draws_what_the_sampler_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(block(EXPORT, "export_sampler"), scope)
    expected = scope["sampler"](64, seed=7, first_sample=128)
    torch.testing.assert_close(scope["x"], expected, rtol=1e-5, atol=1e-5)


def test_the_objective_of_the_readme_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "readme_objective.py").write_text(block(LOOP, "class Denoising"))
    monkeypatch.syspath_prepend(tmp_path)
    objective = importlib.import_module("readme_objective").Denoising()
    torch.manual_seed(0)
    net = fastcm.networks.MLP(shape=(2,), width=64, depth=1)
    data = torch.randn(256, 2) * 0.1 + 1.0
    losses: list[float] = []
    trainer = fastcm.Trainer(
        net,
        objective,
        data=data,
        log_every=1,
        callbacks=[lambda t, event: losses.append(t.metrics["loss"]) if event == "log" else None],
    )
    trainer.fit(60)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_the_example_script_distils_two_moons() -> None:
    out = subprocess.run(
        [sys.executable, "examples/own_data.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    many, one, distilled = (float(v) for v in re.findall(r"(\d\.\d+)$", out, flags=re.M))
    assert many < one / 2 and distilled < one / 2
