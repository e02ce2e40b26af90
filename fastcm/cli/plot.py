"""The command line's pictures: plot trajectories, steps, gap."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from fastcm.cli import runs
from fastcm.evaluation import consistency_gap, plots
from fastcm.evaluation.pictures import save_rows
from fastcm.networks import GaussianMixture
from fastcm.paths import Linear
from fastcm.rng import check_key
from fastcm.sampling import Sampler

_ODE_STEPS = 100

app = typer.Typer(
    help="Pictures: paths from noise to samples, samples by evaluations, the consistency gap.",
    no_args_is_help=True,
)
console = Console()


@app.command()
def trajectories(
    out: Annotated[Path, typer.Option(help="the picture, .png")],
    flow: Annotated[
        Path | None, typer.Option(help="run of --method flow on points [2]; an exact one if absent")
    ] = None,
    distilled: Annotated[
        Path | None, typer.Option(help="run of --method cd; trained here if absent")
    ] = None,
    samples: Annotated[int, typer.Option(help="lines in each panel")] = 64,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
) -> None:
    """From the same noise: training pairs cross, the flow's paths bend, one step is straight."""
    _check_out(out)
    if (flow is None) != (distilled is None):
        raise ValueError("give both --flow and --distilled, or neither for an exact flow")
    check_key(seed)  # before the training
    if flow is None or distilled is None:
        mixture = plots.crescent()
        x, _ = mixture.sample(24_000)
        data, held_out = x[:20_000], x[20_000:]
        _check_samples(samples, data)
        ode = Sampler(mixture, Linear(), steps=_ODE_STEPS, method="ode", shape=(2,))
        one_step = Sampler(_distilled(mixture, data), Linear(), steps=1, shape=(2,))
    else:
        ode = Sampler.from_run(flow, steps=_ODE_STEPS, method="ode")
        one_step = Sampler.from_run(distilled, steps=1)
        _check_plane("--flow", flow, "flow", ode)
        _check_plane("--distilled", distilled, "cd", one_step)
        data, held_out = (part.samples for part in runs.datasets(flow))
        if not torch.equal(data, runs.datasets(distilled)[0].samples):
            raise ValueError(f"--distilled {distilled} was trained on other data than {flow}")
        _check_samples(samples, data)
    panels = plots.couplings(ode, one_step, data, held_out, n=samples, seed=seed)
    plots.save_trajectories(panels, data, out)
    console.print(f"picture: {out}", highlight=False)


def _distilled(mixture: GaussianMixture, data: Tensor) -> nn.Module:
    torch.set_num_threads(1)  # layers this small gain nothing by more, and lose on shared cores
    start = time.perf_counter()
    net = plots.distil(mixture, data)
    console.print(f"distilled in {time.perf_counter() - start:.0f} s", highlight=False)
    return net


def _check_samples(samples: int, data: Tensor) -> None:
    if not 1 <= samples <= len(data):
        raise ValueError(
            f"--samples must be in [1, {len(data)}], the number of training data, got {samples}"
        )


def _check_plane(option: str, run: Path, method: str, sampler: Sampler) -> None:
    trained = runs.of_run(run).method
    if trained != method:
        raise ValueError(f"{option} needs a run of --method {method}, {run} is one of {trained}")
    if sampler.shape != (2,):
        raise ValueError(
            f"{option} needs a run on points [2], {run} makes {list(sampler.shape or ())}"
        )
    if sampler.parameterization.path != Linear():
        raise ValueError(
            f"{option} needs a run on the linear path, whose training pairs are straight lines, "
            f"{run} is on {sampler.parameterization.path}"
        )
    if runs.labels(sampler, 1) is not None:
        raise ValueError(f"{option} needs a run without --conditional, {run} has a flow per label")


@app.command()
def steps(
    run: Annotated[Path, typer.Argument(help="directory of a run on images")],
    out: Annotated[Path, typer.Option(help="the picture, .png")],
    steps: Annotated[list[int], typer.Option(help="numbers of evaluations; may repeat")] = [  # noqa: B006
        1,
        2,
        4,
    ],
    ode: Annotated[list[int], typer.Option(help="numbers of Euler steps; may repeat")] = [50],  # noqa: B006
    n: Annotated[int, typer.Option(help="images in a row")] = 16,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
) -> None:
    """A row of samples of the same noise for each number of evaluations."""
    _check_out(out)
    if n < 1:
        raise ValueError(f"--n must be >= 1, got {n}")
    samplers = {
        f"{prefix}{plots.evaluations(k)}": Sampler.from_run(run, steps=k, method=method)
        for method, prefix, numbers in (("multistep", "", steps), ("ode", "ODE, ", ode))
        for k in numbers
    }
    for sampler in samplers.values():
        shape = sampler.shape or ()
        if len(shape) != 3 or shape[0] not in (1, 3, 4):
            raise ValueError(f"plot steps needs a run on images, {run} makes {list(shape)}")
    rows = {
        name: sampler(n, seed=seed, cond=runs.labels(sampler, n))
        for name, sampler in samplers.items()
    }
    save_rows(rows, out, columns=n)
    console.print(f"picture: {out}", highlight=False)


@app.command()
def gap(
    run: Annotated[list[Path], typer.Argument(help="directories of runs of `fastcm train`")],
    out: Annotated[Path, typer.Option(help="the picture, .png")],
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
) -> None:
    """The consistency gap along t on held-out data, a line per run: how far f is from constant."""
    _check_out(out)
    names = [directory.resolve().name for directory in run]
    if len(set(names)) < len(names):
        names = [str(directory) for directory in run]
    found = {
        name: (Sampler.from_run(directory), runs.datasets(directory)[1])
        for name, directory in zip(names, run)
    }
    gaps = {
        name: consistency_gap(
            sampler.net,
            sampler.parameterization,
            held_out.samples,
            seed=seed,
            cond=runs.condition(sampler, held_out.labels, None, len(held_out))["cond"],
        )
        for name, (sampler, held_out) in found.items()
    }
    plots.save_gaps(gaps, out)
    console.print(f"picture: {out}", highlight=False)


def _check_out(out: Path) -> None:
    if out.suffix != ".png":
        raise ValueError(f"--out must end in .png, got {out}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}")
