"""How good samples get: every method on digits in the same time, with one network and three seeds.

    python -m benchmarks.quality [--seconds 25] [--seeds 3] [--methods flow ct ...]

Steps a second are measured first, the methods taking turns, and give each its number of steps: what
else the machine does later changes no figure. A method that starts from a flow (`cd`, `ect`,
`pairs`) gets half of the time, and a flow that was trained for the other half. The 4,096 pairs are
solved by that flow in 50 steps, which is not counted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import machine
from fastcm.cli.recipes import Recipe
from fastcm.cli.sample_folder import sample_folder
from fastcm.cli.tables import METHODS as ALL
from fastcm.cli.tables import sampling_method
from fastcm.data import Dataset
from fastcm.evaluation import frechet, sliced_wasserstein
from fastcm.runs.checkpoint import replace_file
from fastcm.sampling import Sampler

RESULTS = Path(__file__).parent / "results" / "quality_cpu.json"
FROM_FLOW = ("ect", "cd", "pairs")
PAIRS, PAIR_STEPS = 4096, 50
METHODS = tuple(m for m in ALL if m != "lcm")  # which is cd with guidance, and needs labels
EVALUATIONS = {"FlowMatching": (1, 2, 10, 50), "Stepwise": (1,), "PairDistillation": (1,)}
TURNS, TIMED = 3, 15


def recipe(method: str, steps: int, seed: int, flow: Path) -> Recipe:
    start: dict[str, Any] = {
        "cd": {"teacher": str(flow)},
        "ect": {"init": str(flow)},
        "pairs": {"init": str(flow), "data": f"{flow}-pairs"},
    }.get(method, {})
    return Recipe(method=method, steps=steps, seed=seed, compile="off", **start)


def train(which: Recipe, out: Path) -> None:
    trainer = which.trainer(out, progress=False, log=lambda line: None)
    trainer.fit(which.steps)
    if trainer.interrupted is not None:
        raise SystemExit(f"stopped by {trainer.interrupted.name}")


def make_pairs(flow: Path, count: int) -> None:
    """Beside a flow; their time counts for nothing."""
    sampler = Sampler.from_run(flow, steps=PAIR_STEPS, method="ode")
    sample_folder(sampler, f"{flow}-pairs", count, format="pairs")


def rates(methods: list[str], folder: Path) -> dict[str, float]:
    """Steps a second of each method, the best of some turns."""
    flow = folder / "rate-flow"
    train(recipe("flow", 2, 0, flow), flow)
    make_pairs(flow, 512)
    trainers = {
        m: recipe(m, 1000, 0, flow).trainer(folder / f"rate-{m}-", log=lambda line: None)
        for m in methods
    }
    best = dict.fromkeys(methods, 0.0)
    for turn in range(1 + TURNS):
        for method, trainer in trainers.items():
            start = time.perf_counter()
            for _ in range(TIMED):
                trainer.train_step()
            if turn:
                best[method] = max(best[method], TIMED / (time.perf_counter() - start))
    return best


def distances(run: Path, count: int, held_out: Dataset) -> dict[str, dict[str, float]]:
    """By the number of evaluations."""
    name = json.loads(next(run.glob("checkpoints/*/state.json")).read_text())["config"]
    objective = name["objective"]["type"]
    method = sampling_method(objective)
    found = {}
    for steps in EVALUATIONS.get(objective, (1, 2, 4)):
        x = Sampler.from_run(run, steps=steps, method=method)(count, seed=0)
        found[str(steps)] = {
            "frechet": frechet(x, held_out.x),
            "sliced_wasserstein": sliced_wasserstein(x, held_out.x),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=25.0, help="of training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        speed = rates(sorted({"flow", *options.methods}), folder)
        train_data, held_out = recipe("flow", 1, 0, folder).datasets()
        report: dict[str, Any] = {
            "machine": machine(),
            "seconds": options.seconds,
            "data": "digits",
            "network": "mlp",
            "floor": {
                "frechet": frechet(train_data.x, held_out.x),
                "sliced_wasserstein": sliced_wasserstein(train_data.x, held_out.x),
            },
            "rows": [],
        }
        for seed in range(options.seeds):
            flow = folder / f"start-{seed}"
            train(recipe("flow", int(0.5 * options.seconds * speed["flow"]), seed, flow), flow)
            if "pairs" in options.methods:
                make_pairs(flow, PAIRS)
            for method in options.methods:
                share = 0.5 if method in FROM_FLOW else 1.0
                which = recipe(method, int(share * options.seconds * speed[method]), seed, flow)
                run = folder / f"{method}-{seed}"
                train(which, run)
                row = {
                    "method": method,
                    "seed": seed,
                    "steps": which.steps,
                    "steps_per_second": speed[method],
                    "evaluations": distances(run, len(train_data), held_out),
                }
                report["rows"].append(row)
                print(json.dumps(row), flush=True)
                replace_file(options.out, json.dumps(report, indent=1).encode())


if __name__ == "__main__":
    main()
