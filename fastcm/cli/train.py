"""The command ``fastcm train``."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console

from fastcm import hub
from fastcm.cli import tables, toml
from fastcm.cli.recipes import Recipe
from fastcm.cli.runs import RUN_FILE, open_run
from fastcm.runs.files import replace_file
from fastcm.sampling import Sampler, append_weight
from fastcm.training import Trainer
from fastcm.training.parallel import joined, launched, local_device
from fastcm.training.processes import Processes
from fastcm.training.profiler import Profiler
from fastcm.training.trainer import Callback

console = Console()
_OF_ONE_START = ("out", "config", "resume", "parallel", "profile")
"""Options that say nothing about what a run is."""


def _names(table: Any) -> str:
    return ", ".join(table)


def _option(name: str, text: str) -> Any:
    """An option that only some methods have, in the help under their names."""
    methods = ", ".join(tables.METHODS_WITH[name])
    return typer.Option(help=text, rich_help_panel=f"Options of {methods}")


def train(
    out: Annotated[Path, typer.Option(help="directory of the run: checkpoints and metrics")],
    data: Annotated[
        str,
        typer.Option(
            help='"digits", "photographs", a folder of images, shards or pairs, .npy or .npz'
        ),
    ] = "digits",
    method: Annotated[
        str,
        typer.Option(
            help="flow (ReFlow), stepwise, ct (consistency training), ict (improved), "
            "ect (easy: tunes a flow, --init), sct (continuous time), shortcut, meanflow, "
            "cfm (consistency flow matching), cd (distillation), lcm (of guidance, as an "
            "input), scd (in continuous time), pairs (of fastcm pairs)"
        ),
    ] = "ct",
    net: Annotated[str, typer.Option(help="mlp, unet or dit")] = "mlp",
    width: Annotated[int | None, typer.Option(help="of the network; its default if absent")] = None,
    steps: Annotated[int, typer.Option(help="training steps in all")] = 1000,
    batch: Annotated[int, typer.Option(help="samples a step")] = 256,
    accumulate: Annotated[
        int, typer.Option(help="micro-batches that a batch is cut into, to save memory")
    ] = 1,
    size: Annotated[int | None, typer.Option(help="resize and crop a folder's images")] = None,
    channels: Annotated[int | None, typer.Option(help="of a folder's images: 1, 3 or 4")] = None,
    held_out: Annotated[float, typer.Option(help="share of the data kept for evaluation")] = 0.2,
    conditional: Annotated[bool, typer.Option(help="train on the labels of the data")] = False,
    condition_dropout: Annotated[
        float | None,
        _option("condition_dropout", "share of rows without label, for guidance"),
    ] = None,
    path: Annotated[
        str | None,
        typer.Option(
            help=f"{_names(tables.PATHS)}; of ict ve by default, of sct and scd trig, else linear"
        ),
    ] = None,
    prediction: Annotated[
        str | None, typer.Option(help="v, eps, x0, edm or cm; the path's own if absent")
    ] = None,
    times: Annotated[str | None, _option("times", f"density of t: {_names(tables.TIMES)}")] = None,
    metric: Annotated[str | None, typer.Option(help=_names(tables.METRIC_NAMES))] = None,
    lpips_weights: Annotated[
        str | None, typer.Option(help="FILE[,FILE] of VGG16 and the heads, for --metric lpips")
    ] = None,
    weight: Annotated[str | None, _option("weight", _names(tables.WEIGHTS))] = None,
    grid: Annotated[str | None, _option("grid", _names(tables.GRIDS))] = None,
    intervals: Annotated[
        str | None,
        _option("intervals", "how many [40], or a curriculum: cm, ict; of stepwise: phases [8]"),
    ] = None,
    target_ema: Annotated[
        float | None, _option("target_ema", "decay of the target network [0.9]")
    ] = None,
    segments: Annotated[int | None, _option("segments", "straight pieces [2]")] = None,
    init: Annotated[
        str | None, _option("init", "directory of a run to start from, such as a flow")
    ] = None,
    teacher: Annotated[str | None, _option("teacher", "directory of the teacher's run")] = None,
    guidance: Annotated[
        float | None, _option("guidance", "weight of guidance, the teacher's or in the target")
    ] = None,
    guidance_range: Annotated[
        str | None, _option("guidance_range", "LOW,HIGH of the weights that are distilled [1,4]")
    ] = None,
    solver: Annotated[
        str | None, _option("solver", "of the teacher: euler, heun or ddim [euler]")
    ] = None,
    skip: Annotated[int | None, _option("skip", "intervals in one step of the teacher [1]")] = None,
    shift: Annotated[
        float | None, _option("shift", "of times towards noise, as of large images: SD3 has 3")
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
    parallel: Annotated[
        str | None,
        typer.Option(
            help="ddp: the processes of torchrun share every batch; fsdp: and the weights, too"
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="blocks: compute those of the network again in backward, to save memory"),
    ] = None,
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
    profile: Annotated[
        bool,
        typer.Option("--profile", help="trace some steps: a table and OUT/profile/trace.json"),
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file of options by their names; what the command line says comes first",
            is_eager=True,
            callback=toml.defaults,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in --out")] = False,
) -> None:
    """Train a network; the run can be interrupted at any time and continued with --resume."""
    given: dict[str, Any] = dict(locals())
    if parallel is None and launched()[1] > 1:
        raise ValueError(f"{launched()[1]} processes of torchrun need --parallel ddp or fsdp")
    with joined(cast(Any, parallel)) as processes:
        _train(given, processes)


def _train(given: dict[str, Any], processes: Processes) -> None:
    """`train` by its options, in one of the processes that share it."""
    out: Path = given["out"]
    with processes.together():  # everything that can be refused is, before the directory is made
        fields = {field.name for field in dataclasses.fields(Recipe)}
        options: dict[str, Any] = {k: v for k, v in given.items() if k in fields}
        recipe = Recipe(**{**options, "ema": tuple(given["ema"])})
        settings = dataclasses.asdict(recipe)
        # a network that all hold together, all draw from
        profiler = Profiler(out / "profile") if given["profile"] else None
        _check_profile(profiler, recipe.steps)
        every = given["sample_every"] if processes.first or given["parallel"] == "fsdp" else 0
        callbacks: list[Callback] = [sample_pictures(out, every)] if every else []
        callbacks += [profiler] if profiler else []
        saved = ("save_every", "keep", "keep_every", "tensorboard", "log_every")
        passed = (*saved, "parallel", "checkpoint", "accumulate")
        trainer = recipe.trainer(
            out,
            device=given["device"] or local_device(),
            callbacks=callbacks,
            **{name: given[name] for name in passed},
        )
    used = (out / RUN_FILE).exists()
    if processes.from_first(lambda: open_run(out, settings, resume=given["resume"])):
        trainer.load()
        if processes.first:
            console.print(f"resumed {out} at step {trainer.step}", highlight=False)
    if processes.first and not used:
        repeat = {k: v for k, v in given.items() if k not in _OF_ONE_START}
        replace_file(out / toml.RUN_TOML, toml.dump({**repeat, **settings}).encode())
    steps = recipe.steps
    _check_profile(profiler, steps - trainer.step)
    trainer.fit(max(steps - trainer.step, 0))
    if not processes.first:
        return
    if trainer.interrupted is not None and trainer.step < steps:
        name, step = trainer.interrupted.name, trainer.step
        again = _resuming(sys.argv, processes)
        print(f"{out}: stopped by {name} at step {step}, continue with: {again}")
        return
    console.print(f"{out}: {trainer.step} steps, {trainer.metrics or 'nothing left to do'}")


def _check_profile(profiler: Profiler | None, steps: int) -> None:
    """Raise ValueError if there are too few steps to see what one takes."""
    if profiler is not None and steps < profiler.needed:
        raise ValueError(
            f"--profile needs {profiler.needed} steps, {profiler.after} of them until all is as in "
            f"a long run, but {steps} are to be taken: give more --steps"
        )


def _resuming(command: list[str], processes: Processes) -> str:
    """The command line that continues the one given."""
    program, *arguments = command
    if processes.joined:
        one_host = os.environ.get("LOCAL_WORLD_SIZE") == str(processes.count)
        how = ["--standalone", "--nproc-per-node", str(processes.count)] if one_host else ["..."]
        start = ["torchrun", *how, "-m", "fastcm"]
    elif Path(program).name == "__main__.py":
        start = [sys.executable, "-m", "fastcm"]
    else:
        start = [program]
    more = [] if "--resume" in arguments else ["--resume"]
    return shlex.join([*start, *arguments, *more])


def sample_pictures(directory: Path, every: int, *, seed: int = 0) -> Callback:
    """A callback that writes a grid of samples of the first average every so many steps."""
    from fastcm.evaluation.pictures import save_grid

    def callback(trainer: Trainer, event: str) -> None:
        if event != "step" or trainer.step % every:
            return
        p = trainer.objective.parameterization
        method = hub.sampling_method(type(trainer.objective).__name__)
        classes = (trainer.metadata["network"] or {}).get("num_classes")
        labels = torch.arange(64) % classes if classes else None
        if (trainer.metadata["network"] or {}).get("guided"):
            labels = append_weight(labels, 1.0, 64)
        sampler = Sampler(
            trainer.ema_network(0),
            p,
            steps=32 if method == "ode" else 1,
            method=method,
            shape=trainer.metadata["shape"],
            graph="off" if trainer.state.gradients.spread else "auto",
        )
        pictures = sampler(64, seed=seed, cond=labels)
        if not trainer.processes.first:
            return
        folder = directory / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        save_grid(pictures, folder / f"step_{trainer.step:09d}.png")

    return callback
