"""The command ``fastcm evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from fastcm.cli import runs
from fastcm.evaluation import consistency_gap, frechet, sliced_wasserstein
from fastcm.sampling import Sampler

console = Console()


def evaluate(
    run: Annotated[Path, typer.Argument(help="directory of a run of `fastcm train`")],
    steps: Annotated[list[int], typer.Option(help="numbers of evaluations; may repeat")] = [  # noqa: B006
        1,
        2,
        4,
    ],
    ode: Annotated[list[int], typer.Option(help="numbers of Euler steps; may repeat")] = [50],  # noqa: B006
    ema: Annotated[int, typer.Option(help="which weight average; -1: the raw weights")] = 0,
    n: Annotated[int, typer.Option(help="samples; 0: as many as training data, at most 5000")] = 0,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
) -> None:
    """Distances of samples to held-out data, next to those of the training data as the floor."""
    train_data, held_out = runs.datasets(run)
    count = n or min(len(train_data), 5000)
    table = Table("samples", "evaluations", "sliced Wasserstein", "Frechet")

    def row(name: str, calls: object, x: torch.Tensor) -> None:
        distance = sliced_wasserstein(x, held_out.samples), frechet(x, held_out.samples)
        table.add_row(name, str(calls), f"{distance[0]:.4f}", f"{distance[1]:.4f}")

    row("training data", "-", train_data.samples)
    method = runs.sampling_method(run)
    two_times = method == "flow-map"
    few = method if two_times else "multistep"
    for method, numbers in ((few, steps), ("ode", [] if two_times else ode)):
        for number in numbers:
            sampler = Sampler.from_run(run, steps=number, method=method, ema=ema)
            options = runs.condition(sampler, runs.labels(sampler, count), None, count)
            x = sampler(count, seed=seed, **options)
            row(method, number, x)
    console.print(table)
    if two_times:  # it has no consistency function
        return
    sampler = Sampler.from_run(run, ema=ema)
    cond = runs.condition(sampler, held_out.labels, None, len(held_out))["cond"]
    gap = consistency_gap(
        sampler.net, sampler.parameterization, held_out.samples, seed=seed, cond=cond
    )
    console.print(
        f"consistency gap over {len(gap.times)} intervals: mean {gap.mean:.4f}, sum {gap.sum:.3f}",
        highlight=False,
    )
