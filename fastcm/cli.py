"""The command line: train, sample, evaluate, plot, demo, info."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from fastcm import __version__, cli_plot, demo, recipes, runs
from fastcm.cli_sample import sample
from fastcm.evaluation import consistency_gap, frechet, sliced_wasserstein
from fastcm.recipes import Recipe, open_run, sample_pictures
from fastcm.sampler import Sampler
from fastcm.training import NonFiniteError

app = typer.Typer(
    help="Train, distil and sample few-step generative models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_plot.app, name="plot")
console = Console()


def _names(table: Any) -> str:
    return ", ".join(table)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="directory of the run: checkpoints and metrics")],
    data: Annotated[
        str, typer.Option(help='"digits", a folder of images, .npy or .npz')
    ] = "digits",
    method: Annotated[
        str, typer.Option(help="flow (ReFlow), ct (consistency training), cd")
    ] = "ct",
    net: Annotated[str, typer.Option(help="mlp, unet or dit")] = "mlp",
    width: Annotated[int | None, typer.Option(help="of the network; its default if absent")] = None,
    steps: Annotated[int, typer.Option(help="training steps in all")] = 1000,
    batch: Annotated[int, typer.Option(help="samples a step")] = 256,
    size: Annotated[int | None, typer.Option(help="resize and crop a folder's images")] = None,
    channels: Annotated[int | None, typer.Option(help="of a folder's images: 1, 3 or 4")] = None,
    held_out: Annotated[float, typer.Option(help="share of the data kept for evaluation")] = 0.2,
    conditional: Annotated[bool, typer.Option(help="train on the labels of the data")] = False,
    condition_dropout: Annotated[
        float | None, typer.Option(help="flow: share of rows without label, for guidance")
    ] = None,
    path: Annotated[str, typer.Option(help=_names(recipes.PATHS))] = "linear",
    prediction: Annotated[
        str | None, typer.Option(help="v, eps, x0, edm or cm; the path's own if absent")
    ] = None,
    times: Annotated[
        str | None, typer.Option(help=f"density of t: {_names(recipes.TIMES)}")
    ] = None,
    metric: Annotated[str | None, typer.Option(help=_names(recipes.METRICS))] = None,
    weight: Annotated[str | None, typer.Option(help=_names(recipes.WEIGHTS))] = None,
    grid: Annotated[str | None, typer.Option(help=f"ct, cd: {_names(recipes.GRIDS)}")] = None,
    intervals: Annotated[
        str | None, typer.Option(help="ct, cd: number of intervals [40], or curriculum cm, ict")
    ] = None,
    target_ema: Annotated[
        float | None, typer.Option(help="ct, cd: decay of the target network [0.9]")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="cd: directory of the teacher's run")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="cd: weight of the teacher's guidance")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate [0.001]")] = None,
    warmup: Annotated[int, typer.Option(help="steps of linear warm-up")] = 50,
    lr_floor: Annotated[float, typer.Option(help="share of lr at the end of the cosine")] = 0.1,
    ema: Annotated[list[float], typer.Option(help="decay of the weight average; may repeat")] = [  # noqa: B006
        0.995
    ],
    clip: Annotated[float, typer.Option(help="largest gradient norm; 0 does not clip")] = 1.0,
    seed: Annotated[int, typer.Option(help="of weights, noise and data order")] = 0,
    precision: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    compile: Annotated[str, typer.Option(help="auto (the faster), on or off")] = "auto",
    device: Annotated[str | None, typer.Option(help="cuda or cpu; a GPU if there is one")] = None,
    save_every: Annotated[int, typer.Option(help="steps between checkpoints; 0: at the end")] = 500,
    keep: Annotated[int, typer.Option(help="checkpoints to keep")] = 3,
    keep_every: Annotated[
        int, typer.Option(help="steps between checkpoints to keep for ever; 0: none")
    ] = 0,
    sample_every: Annotated[int, typer.Option(help="steps between pictures of samples")] = 0,
    log_every: Annotated[int, typer.Option(help="steps between lines of metrics.jsonl")] = 50,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="write the metrics for TensorBoard, too")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in --out")] = False,
) -> None:
    """Train a network; the run can be interrupted at any time and continued with --resume."""
    given: dict[str, Any] = dict(locals())
    fields = {field.name for field in dataclasses.fields(Recipe)}
    options: dict[str, Any] = {k: v for k, v in given.items() if k in fields}
    recipe = Recipe(**{**options, "ema": tuple(ema)})
    settings = dataclasses.asdict(recipe)
    callbacks = [sample_pictures(out, sample_every)] if sample_every else []
    # everything that can be refused is refused before the directory is made
    trainer = recipe.trainer(
        out,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        save_every=save_every,
        keep=keep,
        keep_every=keep_every,
        tensorboard=tensorboard,
        log_every=log_every,
        callbacks=callbacks,
    )
    if open_run(out, settings, resume=resume):
        trainer.load()
        console.print(f"resumed {out} at step {trainer.step}", highlight=False)
    trainer.fit(max(steps - trainer.step, 0))
    if trainer.interrupted is not None and trainer.step < steps:
        name, step = trainer.interrupted.name, trainer.step
        print(f"{out}: stopped by {name} at step {step}, continue with: {_resuming(sys.argv)}")
        return
    console.print(f"{out}: {trainer.step} steps, {trainer.metrics or 'nothing left to do'}")


def _resuming(command: list[str]) -> str:
    """The command line that continues the one given."""
    program, *arguments = command
    if Path(program).name == "__main__.py":
        start = [sys.executable, "-m", "fastcm"]
    else:
        start = [program]
    more = [] if "--resume" in arguments else ["--resume"]
    return shlex.join([*start, *arguments, *more])


app.command()(sample)


@app.command()
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
        distance = sliced_wasserstein(x, held_out.x), frechet(x, held_out.x)
        table.add_row(name, str(calls), f"{distance[0]:.4f}", f"{distance[1]:.4f}")

    row("training data", "-", train_data.x)
    for method, numbers in (("multistep", steps), ("ode", ode)):
        for number in numbers:
            sampler = Sampler.from_run(run, steps=number, method=method, ema=ema)
            x = sampler(count, seed=seed, cond=runs.labels(sampler, count))
            row(method, number, x)
    console.print(table)
    sampler = Sampler.from_run(run, ema=ema)
    gap = consistency_gap(
        sampler.net, sampler.parameterization, held_out.x, seed=seed, cond=held_out.labels
    )
    console.print(
        f"consistency gap over {len(gap.times)} intervals: mean {gap.mean:.4f}, sum {gap.sum:.3f}",
        highlight=False,
    )


@app.command(name="demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="directory for runs, picture and table")] = Path("demo"),
) -> None:
    """ReFlow on digits, distilled to one step; about a minute or two on two CPU cores."""
    demo.run(out, console)


@app.command()
def info() -> None:
    """Versions and devices, for a bug report."""
    table = Table("what", "value", show_header=False)
    table.add_row("fastcm", __version__)
    table.add_row("python", platform.python_version())
    table.add_row("platform", platform.platform())
    for package in ("torch", "triton", "numpy", "safetensors"):
        try:
            table.add_row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(package, "not installed")
    table.add_row("CPU threads", str(torch.get_num_threads()))
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        table.add_row(f"GPU {i}", f"{properties.name}, {memory}")
    if not torch.cuda.is_available():
        table.add_row("GPU", "none: everything runs on the CPU")
    console.print(table)


def main() -> None:
    """Run the command line; errors of the user end in one line and exit code 2."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, NonFiniteError) as error:
        print(f"fastcm: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "fastcm: interrupted; train --resume or sample again continues from what is saved",
            file=sys.stderr,
        )
        sys.exit(130)
