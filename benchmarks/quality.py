"""How good samples get: every method on digits in the same time, with one network and three seeds.

    python -m benchmarks.quality [--seconds 25] [--seeds 3] [--methods flow ct ...]
    python -m benchmarks.quality --data photographs    four methods, a UNet on colour crops, one run

Steps a second are measured first, the methods taking turns, and give each its number of steps: what
else the machine does later changes no figure. A method that starts from a flow (`cd`, `scd`, `ect`,
`pairs`) gets half of the time, and a flow that was trained for the other half. The 4,096 pairs are
solved by that flow in 50 steps, which is not counted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import machine
from fastcm.cli.recipes import Recipe
from fastcm.cli.sample_folder import sample_folder
from fastcm.cli.tables import METHODS as ALL
from fastcm.data import Dataset
from fastcm.evaluation import frechet, sliced_wasserstein
from fastcm.hub import sampling_method
from fastcm.runs.checkpoint import replace_file
from fastcm.sampling import Sampler

RESULTS = Path(__file__).parent / "results"
FROM_FLOW = ("ect", "cd", "scd", "pairs")
PAIRS, PAIR_STEPS = 4096, 50
METHODS = tuple(m for m in ALL if m != "lcm")  # which is cd with guidance, and needs labels
EVALUATIONS = {"Stepwise": (1,), "PairDistillation": (1,)}
TURNS = 3


@dataclass(frozen=True)
class Setting:
    """What is trained on, and for how long; `samples` None makes as many as there are data."""

    recipe: dict[str, Any]
    methods: tuple[str, ...]
    seconds: float
    seeds: int
    timed: int
    flow_steps: tuple[int, ...]
    file: str
    samples: int | None = None


SETTINGS = {
    "digits": Setting({}, METHODS, 25.0, 3, 15, (1, 2, 10, 50), "quality_cpu.json"),
    "photographs": Setting(
        {
            **{"data": "photographs", "net": "unet", "width": 16, "batch": 16},
            **{"lr": 2e-3, "ema": (0.99,)},
        },
        ("flow", "cd", "ect", "shortcut"),
        100.0,
        1,
        4,
        (1, 2, 4, 10),
        "quality_photographs_cpu.json",
        256,
    ),
}


def recipe(setting: Setting, method: str, steps: int, seed: int, flow: Path) -> Recipe:
    from_run: dict[str, Any] = {
        "cd": {"teacher": str(flow)},
        "scd": {"teacher": f"{flow}-trig"},
        "ect": {"init": str(flow)},
        "pairs": {"init": str(flow), "data": f"{flow}-pairs"},
    }.get(method, {})
    options = {**setting.recipe, **from_run}
    return Recipe(method=method, steps=steps, seed=seed, compile="off", **options)


def make_flows(setting: Setting, steps: int, seed: int, flow: Path, methods: Iterable[str]) -> None:
    """The flows that some methods start from; that of `scd` is on its own path."""
    which = recipe(setting, "flow", steps, seed, flow)
    train(which, flow)
    if "scd" in methods:
        train(replace(which, path="trig"), Path(f"{flow}-trig"))


def train(which: Recipe, out: Path) -> None:
    trainer = which.trainer(out, progress=False, log=lambda line: None)
    trainer.fit(which.steps)
    if trainer.interrupted is not None:
        raise SystemExit(f"stopped by {trainer.interrupted.name}")


def make_pairs(flow: Path, count: int) -> None:
    """Beside a flow; their time counts for nothing."""
    sampler = Sampler.from_run(flow, steps=PAIR_STEPS, method="ode")
    sample_folder(sampler, f"{flow}-pairs", count, format="pairs")


def rates(setting: Setting, methods: list[str], folder: Path) -> dict[str, float]:
    """Steps a second of each method, the best of some turns."""
    flow = folder / "rate-flow"
    make_flows(setting, 2, 0, flow, methods)
    if "pairs" in methods:
        make_pairs(flow, 512)
    trainers = {
        m: recipe(setting, m, 1000, 0, flow).trainer(folder / f"rate-{m}-", log=lambda line: None)
        for m in methods
    }
    best = dict.fromkeys(methods, 0.0)
    for turn in range(1 + TURNS):
        for method, trainer in trainers.items():
            start = time.perf_counter()
            for _ in range(setting.timed):
                trainer.train_step()
            if turn:
                best[method] = max(best[method], setting.timed / (time.perf_counter() - start))
    return best


def distances(
    run: Path, count: int, held_out: Dataset, flow_steps: tuple[int, ...]
) -> dict[str, dict[str, float]]:
    """By the number of evaluations."""
    name = json.loads(next(run.glob("checkpoints/*/state.json")).read_text())["config"]
    objective = name["objective"]["type"]
    method = sampling_method(objective)
    found = {}
    usual = flow_steps if objective == "FlowMatching" else (1, 2, 4)
    for steps in EVALUATIONS.get(objective, usual):
        x = Sampler.from_run(run, steps=steps, method=method)(count, seed=0)
        found[str(steps)] = {
            "frechet": frechet(x, held_out.x),
            "sliced_wasserstein": sliced_wasserstein(x, held_out.x),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=list(SETTINGS), default="digits")
    parser.add_argument("--seconds", type=float, help="of training")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    setting = SETTINGS[options.data]
    seconds = options.seconds or setting.seconds
    methods = options.methods or setting.methods
    out = options.out or RESULTS / setting.file
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        speed = rates(setting, sorted({"flow", *methods}), folder)
        train_data, held_out = recipe(setting, "flow", 1, 0, folder).datasets()
        count = setting.samples or len(train_data)
        report: dict[str, Any] = {
            "machine": machine(),
            "seconds": seconds,
            "data": options.data,
            "network": setting.recipe.get("net", "mlp"),
            "samples": count,
            "floor": {
                "frechet": frechet(train_data.x[:count], held_out.x),
                "sliced_wasserstein": sliced_wasserstein(train_data.x[:count], held_out.x),
            },
            "rows": [],
        }
        for seed in range(options.seeds or setting.seeds):
            flow = folder / f"start-{seed}"
            steps = int(0.5 * seconds * speed["flow"])
            make_flows(setting, steps, seed, flow, methods)
            if "pairs" in methods:
                make_pairs(flow, PAIRS)
            for method in methods:
                share = 0.5 if method in FROM_FLOW else 1.0
                steps = int(share * seconds * speed[method])
                which = recipe(setting, method, steps, seed, flow)
                run = folder / f"{method}-{seed}"
                train(which, run)
                row = {
                    "method": method,
                    "seed": seed,
                    "steps": which.steps,
                    "steps_per_second": speed[method],
                    "evaluations": distances(run, count, held_out, setting.flow_steps),
                }
                report["rows"].append(row)
                print(json.dumps(row), flush=True)
                replace_file(out, json.dumps(report, indent=1).encode())


if __name__ == "__main__":
    main()
