"""The command ``fastcm pairs``: noise and the samples that a teacher makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastcm.cli.sample import check_embedded, fill
from fastcm.data.loading import PAIRS
from fastcm.runs.checkpoint import CHECKPOINTS
from fastcm.sampling import Sampler
from fastcm.training.parallel import local_device


def pairs(
    teacher: Annotated[Path, typer.Option(help="directory of a run, such as a flow")],
    out: Annotated[Path, typer.Option(help="folder for the shards")],
    n: Annotated[int, typer.Option(help="how many")] = 10_000,
    steps: Annotated[int, typer.Option(help="of the solver")] = 50,
    solver: Annotated[
        str, typer.Option(help="euler, heun, midpoint, rk4, ddim or dpmpp_2m")
    ] = "euler",
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    first: Annotated[int, typer.Option(help="index of the first")] = 0,
    ema: Annotated[int, typer.Option(help="which weight average; -1: the raw weights")] = 0,
    label: Annotated[int | None, typer.Option(help="class; all in turn if absent")] = None,
    guidance: Annotated[float | None, typer.Option(help="weight of guidance")] = None,
    guidance_rescale: Annotated[
        float | None,
        typer.Option(help="share of the unguided deviation that is restored, 0 to 1"),
    ] = None,
    batch: Annotated[int, typer.Option(help="pairs in a shard, and computed at once")] = 512,
) -> None:
    """Solve a teacher's ODE from noise: pairs to train `--method pairs` or `--method flow` on.

    A shard holds samples and the range of their indices; the noise follows from the seed. The
    folder is filled batch by batch: the same command continues where it was stopped, and processes
    with ranges of their own (--first, --n) work on it side by side. Those of torchrun divide the
    range among them.
    """
    if (out / CHECKPOINTS).exists():
        raise ValueError(f"--out {out} is the directory of a run, choose another")
    if guidance_rescale is not None and guidance is None:
        raise ValueError("--guidance-rescale needs --guidance, the weight of it")
    sampler = Sampler.from_run(
        teacher,
        steps=steps,
        method="ode",
        solver=solver,
        guidance_rescale=guidance_rescale,
        ema=ema,
        device=local_device(),
        batch_size=batch,
    )
    check_embedded(sampler, None, guidance_rescale)
    fill(
        teacher,
        out,
        n,
        sampler,
        ema=ema,
        precision="fp32",
        format=PAIRS,
        first=first,
        seed=seed,
        label=label,
        guidance=guidance,
    )
