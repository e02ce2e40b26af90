"""The demo: ReFlow on handwritten digits, distilled to one step, with a picture and a table."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastcm.cli.recipes import Recipe
from fastcm.cli.runs import open_run
from fastcm.data import Dataset
from fastcm.evaluation import consistency_gap, frechet, sliced_wasserstein
from fastcm.evaluation.pictures import save_rows
from fastcm.runs.checkpoint import list_checkpoints, replace_file
from fastcm.sampling import Sampler
from fastcm.training import Trainer

FLOW = Recipe(method="flow", steps=1200)


def distillation(teacher: Path) -> Recipe:
    """The second half of the demo."""
    return Recipe(
        method="cd", teacher=str(teacher), steps=800, intervals="40", target_ema=0.9, ema=(0.99,)
    )


def run(out: Path, console: Console) -> None:
    """Train both runs under `out` (continuing what is there), write picture.png and report.json.

    Args:
        out: directory; demo/flow and demo/cd are run directories of `fastcm train`.
        console: where progress and the table go.
    """
    start = time.perf_counter()
    continued = bool(list_checkpoints(out / "flow") or list_checkpoints(out / "cd"))
    flow = _train(FLOW, out / "flow", console)
    flow_s = time.perf_counter() - start
    distilled = _train(distillation(out / "flow"), out / "cd", console)
    cd_s = time.perf_counter() - start - flow_s

    train_data, held_out = FLOW.datasets()
    assert isinstance(train_data, Dataset)
    n = len(train_data)
    samples: dict[str, tuple[str, Tensor]] = {"training data": ("-", train_data.x)}
    for name, where, steps, method in (
        ("ReFlow, 50 steps", "flow", 50, "ode"),
        ("ReFlow, 1 step", "flow", 1, "ode"),
        ("distilled, 1 step", "cd", 1, "multistep"),
        ("distilled, 2 steps", "cd", 2, "multistep"),
    ):
        sampler = Sampler.from_run(out / where, steps=steps, method=method)
        samples[name] = (str(steps), sampler(n, seed=0))

    table = Table("samples", "evaluations", "sliced Wasserstein", "Frechet")
    figures = {}
    for name, (steps_, x) in samples.items():
        figures[name] = sliced_wasserstein(x, held_out.x), frechet(x, held_out.x)
        table.add_row(name, steps_, f"{figures[name][0]:.4f}", f"{figures[name][1]:.4f}")
    gaps = {
        name: consistency_gap(t.ema_network(0), t.objective.parameterization, held_out.x)
        for name, t in (("ReFlow", flow), ("distilled", distilled))
    }
    rows = {"real digits": held_out.x, **{k: x for k, (_, x) in samples.items()}}
    del rows["training data"]
    picture = save_rows(rows, out / "picture.png")
    total_s = time.perf_counter() - start
    seconds = {"flow": flow_s, "distillation": cd_s, "total": total_s}
    path = out / "report.json"
    if continued and path.exists():  # the times of the training, not of looking at it again
        seconds = json.loads(path.read_text())["seconds"]
    report = {
        "distances to held-out digits": {
            name: {"sliced_wasserstein": a, "frechet": b} for name, (a, b) in figures.items()
        },
        "consistency gap": {name: {"mean": g.mean, "sum": g.sum} for name, g in gaps.items()},
        "seconds": seconds,
    }
    replace_file(path, json.dumps(report, indent=1).encode())
    console.print(table)
    for name, gap in gaps.items():
        console.print(f"consistency gap, {name}: mean {gap.mean:.4f}, sum {gap.sum:.3f}")
    console.print(
        f"ReFlow {seconds['flow']:.0f} s, distillation {seconds['distillation']:.0f} s, "
        f"all {seconds['total']:.0f} s",
        highlight=False,
    )
    console.print(f"picture: {picture}", highlight=False)


def _train(recipe: Recipe, directory: Path, console: Console) -> Trainer:
    trainer = recipe.trainer(directory, save_every=200)
    if open_run(directory, dataclasses.asdict(recipe), resume=True):
        trainer.load()
        console.print(f"{directory}: continues at step {trainer.step}", highlight=False)
    trainer.fit(max(recipe.steps - trainer.step, 0))
    if trainer.interrupted is not None:
        console.print(f"{directory}: stopped at step {trainer.step}, the same command continues")
        raise SystemExit(0)
    return trainer
