"""Every option of a recipe changes what is computed, or is refused: none is silently ignored."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcm import Sampler
from fastcm.cli import tables
from fastcm.cli.recipes import Recipe
from fastcm.cli.sample_folder import sample_folder

CHANGES: dict[str, list[Any]] = {
    "data": ["folder"],
    "net": ["dit"],
    "steps": [8],
    "batch": [12],
    "size": [4],
    "channels": [1],
    "held_out": [0.5],
    "conditional": [True, False],
    "condition_dropout": [0.5],
    "path": ["trig", "ve", "linear"],
    "prediction": ["x0", "eps"],
    "times": ["uniform", "logit-normal", "log-normal"],
    "metric": list(tables.METRIC_NAMES),
    "lpips_weights": ["weights.pth"],
    "weight": list(tables.WEIGHTS),
    "grid": ["karras", "uniform"],
    "intervals": ["30"],
    "target_ema": [0.3],
    "segments": [5],
    "init": ["flow"],
    "teacher": ["flow"],
    "guidance": [3.0],
    "guidance_range": ["2,9"],
    "solver": ["heun", "ddim"],
    "skip": [2],
    "shift": [3.0],
    "width": [16],
    "lr": [7e-3],
    "warmup": [2],
    "lr_floor": [0.9],
    "ema": [(0.3,)],
    "clip": [1e-3],
    "seed": [1],
    "precision": ["bf16"],
}
"""Another value of every option; those of a table all."""
PATHS_OF_RUNS = ("data", "init", "teacher")
USUAL: dict[tuple[str, str], tuple[str, ...]] = {
    ("path", "ict"): ("ve",),
    ("times", "flow"): ("logit-normal",),
    ("times", "ict"): ("log-normal",),
    ("metric", "flow"): ("squared-l2",),
    ("metric", "shortcut"): ("squared-l2",),
    ("metric", "cfm"): ("squared-l2",),
    ("metric", "ect"): ("l2",),
    ("weight", "flow"): ("uniform",),
    ("weight", "lcm"): ("uniform",),
    ("grid", "ict"): ("karras",),
    ("path", "sct"): ("trig",),
    ("path", "scd"): ("linear",),
    ("times", "meanflow"): (),
    ("metric", "meanflow"): (),
    ("metric", "sct"): ("squared-l2",),
    ("metric", "scd"): ("squared-l2",),
    ("weight", "sct"): ("learned",),
    ("weight", "scd"): ("learned",),
    ("solver", "cd"): ("euler", "ddim"),  # one step, on the linear path
    ("solver", "lcm"): ("ddim", "euler"),
    ("path", ""): ("linear",),
    ("times", ""): ("uniform",),
    ("metric", ""): ("pseudo-huber",),
    ("weight", ""): ("inverse-gap",),
    ("grid", ""): ("uniform",),
}
"""The values of a table that say what a method does anyway; "" stands for the methods not named."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flow, two with classes, pairs of the first, and a folder of images."""
    here, image = tmp_path_factory.mktemp("runs"), pytest.importorskip("PIL.Image")
    guided = {"conditional": True, "condition_dropout": 0.3}
    for name, more in (("flow", {}), ("teacher", guided), ("other", {**guided, "seed": 1})):
        trained(here / name, Recipe(**{**BASE, "method": "flow", **more}))
    sampler = Sampler.from_run(here / "flow", steps=2, method="ode")
    sample_folder(sampler, here / "pairs", 40, format="pairs")
    (here / "folder").mkdir()
    for i in range(8):
        pixels = torch.randint(256, (10, 10, 3), dtype=torch.uint8).numpy()
        image.fromarray(pixels).save(here / "folder" / f"{i}.png")
    return here


BASE: dict[str, Any] = {"steps": 6, "batch": 16, "width": 24, "warmup": 1, "compile": "off"}
CASES = (*tables.METHODS, "folder")


OF_A_TEACHER = {"conditional", "data", "net", "path", "prediction", "width"}
REFUSED = {
    "flow": {"data"},  # without labels, like that of pairs
    "ict": {"init"},  # a flow of another path
    "sct": {"init", "prediction"},
    "shortcut": {"path", "prediction"},
    "cfm": {"path", "prediction"},
    "cd": OF_A_TEACHER,
    "lcm": OF_A_TEACHER,
    "scd": OF_A_TEACHER,
    "meanflow": {"data", "path", "prediction"},
    "pairs": {"conditional", "data"},
    "folder": {"conditional", "init"},
}
"""Beside the options of other methods and of other data, those that do not fit these runs."""


def options(case: str, runs: Path) -> dict[str, Any]:
    """Of a run of a method, or of consistency training on a folder of images."""
    more: dict[str, dict[str, Any]] = {
        "flow": {"conditional": True},
        "cd": {"teacher": str(runs / "teacher"), "conditional": True},
        "lcm": {"teacher": str(runs / "teacher"), "conditional": True},
        "scd": {"teacher": str(runs / "teacher"), "conditional": True, "path": "linear"},
        "meanflow": {"conditional": True},
        "pairs": {"data": str(runs / "pairs")},
        "stepwise": {"steps": 32, "intervals": "2"},
        "folder": {"data": str(runs / "folder"), "method": "ct", "size": 8},
    }
    return {**BASE, "method": case, **more.get(case, {})}


def trained(out: Path, recipe: Recipe) -> tuple[list[Tensor], dict[str, Any]]:
    """What a run ends with, the network and its averages, and what it is described as."""
    t = recipe.trainer(out, progress=False, log=lambda line: None).fit(recipe.steps)
    nets = [t.net, *t.update.networks]
    return [p.detach().float() for net in nets for p in net.parameters()], t.config()


def test_every_option_is_here() -> None:
    fields = {field.name for field in dataclasses.fields(Recipe)}
    assert fields == CHANGES.keys() | {"method", "compile"}


@pytest.mark.parametrize("case", CASES)
def test_every_option_changes_the_computation_or_is_refused(
    case: str, runs: Path, tmp_path: Path
) -> None:
    base = options(case, runs)
    method = base["method"]
    expected, described = trained(tmp_path / "base", Recipe(**base))
    silent, refused, changed = [], set(), set()
    for name, values in CHANGES.items():
        usual = USUAL.get((name, method), USUAL.get((name, ""), ()))
        for value in values:
            if name in ("init", "teacher") and base.get("conditional"):
                value = "other"
            given = str(runs / value) if name in PATHS_OF_RUNS else value
            if value in usual or given == base.get(name, False):
                continue
            try:
                found, as_ = trained(tmp_path / f"{name}-{value}", Recipe(**{**base, name: given}))
            except ValueError:
                refused.add(name)
                continue
            changed.add(name)
            same = len(found) == len(expected) and all(map(torch.equal, found, expected))
            # where a run starts is not what it is; --resume asks run.json
            if same or (as_ == described and name != "init"):
                silent.append(f"{name}={value!r}")
    assert not silent
    elsewhere = {name for name, methods in tables.METHODS_WITH.items() if method not in methods}
    if case != "folder":
        elsewhere |= {"size", "channels"}
    assert refused - changed == elsewhere | {"lpips_weights"} | REFUSED.get(case, set())
