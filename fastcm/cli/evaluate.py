"""The command ``fastcm evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastcm.cli import runs
from fastcm.cli.features import Features, features_of
from fastcm.cli.recipes import IN_MEMORY
from fastcm.data.images import holds_images
from fastcm.evaluation import consistency_gap, frechet, sliced_wasserstein
from fastcm.sampling import Sampler
from fastcm.training.parallel import local_device

console = Console()


def evaluate(
    run: Annotated[
        Path,
        typer.Argument(
            help="directory of a run of `fastcm train`; or, with --features and --reference, a "
            "folder of images"
        ),
    ],
    steps: Annotated[list[int], typer.Option(help="numbers of evaluations; may repeat")] = [  # noqa: B006
        1,
        2,
        4,
    ],
    ode: Annotated[list[int], typer.Option(help="numbers of Euler steps; may repeat")] = [50],  # noqa: B006
    ema: Annotated[int, typer.Option(help="which weight average; -1: the raw weights")] = 0,
    n: Annotated[int, typer.Option(help="samples; 0: as many as training data, at most 5000")] = 0,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    features: Annotated[
        str | None,
        typer.Option(
            help="inception or dinov2: FID or FD-DINOv2, precision and recall, of the --weights"
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="file of the network of --features, or its folder")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="of --features: .npz with mu and sigma, or images in a folder or file; the "
            "held-out data if absent"
        ),
    ] = None,
    write_reference: Annotated[
        Path | None, typer.Option(help=".npz to write mu and sigma of the reference to")
    ] = None,
    batch: Annotated[int, typer.Option(help="images at once through --features")] = 64,
) -> None:
    """Distances of samples to held-out data, next to those of the training data as the floor.

    Of more than 10,000 samples the first two distances see the first 10,000, FID all.
    """
    if n < 0:
        raise ValueError(f"--n must be >= 0, got {n}")
    device = torch.device(local_device())
    space = features_of(features, weights, reference, write_reference, batch, device)
    if runs.holds_run(run) or not (run.is_dir() and holds_images(run)):
        _run(run, steps, ode, ema, n, seed, space, device)
    elif space is None or space.source is None:
        raise ValueError(f"{run} is a folder of images, which needs --features and --reference")
    elif n != 0:
        raise ValueError(f"--n has no meaning for {run}, a folder of images: all are read")
    else:
        table = Table("samples", *space.columns)
        table.add_row(str(run), *space.beside(run).cells(space.of(run)))
        console.print(table)


def _run(
    run: Path,
    steps: list[int],
    ode: list[int],
    ema: int,
    n: int,
    seed: int,
    space: Features | None,
    device: torch.device,
) -> None:
    train_data, held_out = runs.datasets(run)
    count = n or min(len(train_data), 5000)
    table = Table("samples", "evaluations", "sliced Wasserstein", "Frechet")
    if space is not None:
        if len(train_data.shape) != 3 or train_data.shape[0] not in (1, 3):
            raise ValueError(
                f"--features needs a run of images [1 | 3, H, W], its samples are "
                f"{list(train_data.shape)}"
            )
        space = space.beside(held_out.samples)
        for column in space.columns:
            table.add_column(column)

    def row(name: str, calls: object, x: Tensor, features: Tensor | None) -> None:
        distance = sliced_wasserstein(x, held_out.samples), frechet(x, held_out.samples)
        cells = [f"{distance[0]:.4f}", f"{distance[1]:.4f}"]
        if space is not None and features is not None:
            cells += space.cells(features)
        table.add_row(name, str(calls), *cells)

    # a Frechet distance depends on the number of images, and so does its floor
    floor = None if space is None else space.of(train_data.samples[:count])
    row("training data", "-", train_data.samples, floor)
    method = runs.sampling_method(run)
    two_times = method == "flow-map"
    few = method if two_times else "multistep"
    for method, numbers in ((few, steps), ("ode", [] if two_times else ode)):
        for number in numbers:
            sampler = Sampler.from_run(run, steps=number, method=method, ema=ema, device=device)
            row(method, number, *_drawn(sampler, count, seed, space))
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


def _drawn(
    sampler: Sampler, count: int, seed: int, space: Features | None
) -> tuple[Tensor, Tensor | None]:
    """The first `IN_MEMORY` of `count` samples, and the features of all, a batch at a time."""
    held: list[Tensor] = []
    features: list[Tensor] = []
    for first in range(0, count, sampler.batch_size):
        n = min(sampler.batch_size, count - first)
        options = runs.condition(sampler, runs.labels(sampler, n, first=first), None, n)
        x = sampler(n, seed=seed, first_sample=first, **options)
        held.append(x[: max(IN_MEMORY - first, 0)].cpu())
        if space is not None:
            features.append(space.of(x))
    return torch.cat(held), torch.cat(features) if features else None
