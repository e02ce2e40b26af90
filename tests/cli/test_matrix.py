"""Every method, network and precision that the command line offers, for a few steps each."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from fastcm import cli, networks
from fastcm.cli.tables import METHODS
from fastcm.precision import Precision
from fastcm.runs.checkpoint import load

NETWORKS = ["mlp", "unet", "dit"]
FROM_DATA = ["flow", "stepwise", "ct", "ict", "ect", "sct", "shortcut", "meanflow", "cfm"]
PRECISIONS = get_args(Precision)
TINY = ["--data", "digits", "--width", "24", "--batch", "8", "--steps", "3", "--compile", "off"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


def fastcm_(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fastcm", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
    assert done.value.code in (0, None)


def trained(out: Path, *options: object) -> Path:
    """A run of three steps, which is complete, finite and has moved the weights."""
    fastcm_("train", *TINY, *options, "--log-every", 1, "--save-every", 1, "--out", out)
    losses = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in losses] == [1, 2, 3] and all(m["skipped"] == 0 for m in losses)
    assert all(np.isfinite(m["loss"]) and m["grad_norm"] > 0 for m in losses)
    first, last = (
        load(out / "checkpoints" / f"step_00000000{step}", only={"model"}).groups["model"]
        for step in (1, 3)
    )
    assert any(not torch.equal(first[name], last[name]) for name in last)
    return out


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step_000000003"


def sampled(run: Path, *options: object) -> None:
    out = run / "x.npy"
    fastcm_("sample", run, "--n", 3, *options, "--out", out)
    x = np.load(out)
    assert x.shape == (3, 1, 8, 8) and np.isfinite(x).all()


@pytest.fixture(scope="module")
def teachers(here: Path) -> dict[str, Path]:
    """One for each network, with classes and without condition where guidance needs it."""
    options = ["--method", "flow", "--conditional", "--condition-dropout", 0.2]
    return {net: trained(here / f"teacher-{net}", *options, "--net", net) for net in NETWORKS}


@pytest.fixture(scope="module")
def pairs(teachers: dict[str, Path], here: Path) -> Path:
    out = here / "pairs"
    fastcm_("pairs", "--teacher", teachers["mlp"], "--n", 20, "--steps", 2, "--out", out)
    return out


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("net", NETWORKS)
@pytest.mark.parametrize("method", ["pairs", "flow", "ct"])
def test_training_on_pairs(method: str, net: str, precision: str, pairs: Path, here: Path) -> None:
    run = trained(
        here / f"{method}-{net}-{precision}-of-pairs",
        *("--method", method, "--net", net, "--precision", precision, "--data", pairs),
    )
    sampled(run, "--precision", precision)


def test_the_lists_are_complete() -> None:
    assert set(METHODS) == {*FROM_DATA, "cd", "lcm", "scd", "pairs"}
    assert set(NETWORKS) == set(networks._NETWORKS)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("net", NETWORKS)
@pytest.mark.parametrize("method", FROM_DATA)
def test_training_from_data(method: str, net: str, precision: str, here: Path) -> None:
    run = trained(
        here / f"{method}-{net}-{precision}",
        *("--method", method, "--net", net, "--precision", precision),
    )
    sampled(run, "--precision", precision)
    sampled(run, "--precision", precision, "--steps", 2)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("net", NETWORKS)
def test_distillation_of_guidance(
    net: str, precision: str, teachers: dict[str, Path], here: Path
) -> None:
    run = trained(
        here / f"lcm-{net}-{precision}",
        *("--method", "lcm", "--teacher", teachers[net], "--conditional"),
        *("--net", net, "--precision", precision, "--guidance-range", "1,5"),
    )
    sampled(run, "--precision", precision, "--guidance", 4.0)


@pytest.mark.parametrize("solver", ["heun", "ddim"])
def test_teacher_solvers(solver: str, teachers: dict[str, Path], here: Path) -> None:
    run = trained(
        here / f"cd-{solver}",
        *("--method", "cd", "--teacher", teachers["mlp"], "--conditional", "--guidance", 2.0),
        *("--solver", solver, "--skip", 3),
    )
    sampled(run)


@pytest.mark.parametrize("method", ["ect", "ct", "shortcut", "meanflow"])
def test_a_run_that_starts_from_a_flow(method: str, teachers: dict[str, Path], here: Path) -> None:
    run = trained(
        here / f"{method}-init",
        *("--method", method, "--init", teachers["mlp"], "--conditional", "--lr", 1e-9),
    )
    flow = load(newest(teachers["mlp"]), only={"average_0"}).groups["average_0"]
    found = load(newest(run), only={"model"}).groups["model"]
    for name, value in flow.items():
        assert torch.allclose(found[name], value, atol=1e-6), name


@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("net", NETWORKS)
@pytest.mark.parametrize("method", ["cd", "scd"])
def test_distillation(
    method: str,
    net: str,
    precision: str,
    guidance: float | None,
    teachers: dict[str, Path],
    here: Path,
) -> None:
    more = [] if guidance is None else ["--guidance", guidance]
    run = trained(
        here / f"{method}-{net}-{precision}-{guidance}",
        *("--method", method, "--teacher", teachers[net], "--conditional", *more),
        *("--net", net, "--precision", precision, "--path", "linear"),
    )
    sampled(run, "--precision", precision, "--label", 3)


def test_guidance_in_the_target(here: Path) -> None:
    run = trained(
        here / "meanflow-guided",
        *("--method", "meanflow", "--conditional", "--condition-dropout", 0.2, "--guidance", 2.0),
    )
    sampled(run, "--label", 3)


@pytest.mark.parametrize("method", ["flow", "stepwise", "ct", "ict", "ect"])
def test_a_learned_weight(method: str, here: Path) -> None:
    run = trained(here / f"{method}-learned", "--method", method, "--weight", "learned")
    found = load(newest(run), only={"model"}).groups["model"]
    assert found["log_variance.fc.bias"].abs() > 0
    sampled(run)
