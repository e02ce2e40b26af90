"""The command ``fastcm sample``: one file of samples, or a folder of many."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

from fastcm.cli.runs import condition, labels, read_condition, sampling_method
from fastcm.cli.sample_folder import check_range, sample_folder, share
from fastcm.runs.checkpoint import CHECKPOINTS, RUN_STATE, load_newest, replace_file
from fastcm.sampling import Churn, Sampler
from fastcm.training.parallel import joined, launched, local_device
from fastcm.training.sharded import mesh_of


def sample(
    run: Annotated[Path, typer.Argument(help="directory of a run")],
    out: Annotated[Path, typer.Option(help=".png (one grid), .npy, or a folder for many")],
    n: Annotated[int, typer.Option(help="how many")] = 64,
    steps: Annotated[int, typer.Option(help="network evaluations")] = 1,
    method: Annotated[
        str | None,
        typer.Option(help="multistep, ode or flow-map; what suits the run if absent"),
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(help="ode: euler (the default), heun, midpoint, rk4, ddim or dpmpp_2m"),
    ] = None,
    churn: Annotated[
        str | None, typer.Option(help="ode: fresh noise, S_CHURN[,S_MIN,S_MAX[,S_NOISE]]")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    first: Annotated[int, typer.Option(help="index of the first sample")] = 0,
    ema: Annotated[int, typer.Option(help="which weight average; -1: the raw weights")] = 0,
    label: Annotated[int | None, typer.Option(help="class; all in turn if absent")] = None,
    cond: Annotated[
        Path | None,
        typer.Option(help=".npz, .npy or .safetensors: row i conditions sample i, all in turn"),
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="weight of guidance")] = None,
    guide: Annotated[
        Path | None,
        typer.Option(help="run of a worse network: guidance away from it (autoguidance)"),
    ] = None,
    batch: Annotated[
        int, typer.Option(help="samples computed at once; for a folder only whole batches")
    ] = 512,
    precision: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    compile: Annotated[
        bool, typer.Option("--compile", help="compile the network: for many samples")
    ] = False,
    format: Annotated[
        str | None, typer.Option(help="of a folder: png (images' default) or npz (others')")
    ] = None,
    parallel: Annotated[
        str | None,
        typer.Option(help="fsdp: each process of torchrun holds a part of the network only"),
    ] = None,
) -> None:
    """Draw samples from a trained run.

    A folder is filled batch by batch: the same command continues where it was stopped, and
    processes with ranges of their own (--first, --n) work on it side by side. Those of torchrun
    divide the range among them.
    """
    if (out / CHECKPOINTS).exists():
        raise ValueError(f"--out {out} is the directory of a run, choose another")
    if out.suffix not in (".npy", ".png", ""):
        raise ValueError(f"--out must end in .png or .npy, or name a folder, got {out}")
    if format is not None and out.suffix:
        raise ValueError(f"--format is that of the files in a folder, and --out {out} is one file")
    if out.suffix and launched()[1] > 1:
        raise ValueError(f"processes of torchrun fill a folder together, and --out {out} is a file")
    check_range(n, first)
    if parallel not in (None, "fsdp"):
        raise ValueError(f"--parallel of samples is fsdp or left out, got {parallel!r}")
    if parallel is not None and (out.suffix or guide is not None):
        what = "a guide is held whole" if guide is not None else f"--out {out} is a file"
        raise ValueError(f"--parallel fsdp fills a folder by the network of a run alone: {what}")
    if method is None:
        method = sampling_method(run)
    if method != "ode" and solver is not None:
        raise ValueError(f"--solver has a meaning only with --method ode, not {method}")
    if method != "ode" and churn is not None:
        raise ValueError(f"--churn has a meaning only with --method ode, not {method}")
    if guide is not None and guidance is None:
        raise ValueError("--guide needs --guidance, the weight of it")
    settings: dict[str, Any] = {
        "steps": steps,
        "method": method,
        "solver": solver,
        "churn": None if churn is None else churn_of(churn),
        "ema": ema,
        "device": local_device(),
        "batch_size": batch,
        "precision": precision,
        "compile": compile,
    }
    rows = None if cond is None else read_condition(cond)
    filling: dict[str, Any] = {
        "guidance": guidance,
        "format": format,
        "first": first,
        "label": label,
    }
    filling |= {"ema": ema, "precision": precision, "cond": rows, "seed": seed}
    if parallel is not None:
        with joined("fsdp") as processes:
            settings["mesh"] = mesh_of("fsdp", processes.count, torch.device(settings["device"]))
            sampler = Sampler.from_run(run, **settings)
            _check_guidance(guidance, guide, rows, sampler)
            fill(run, out, n, sampler, together=processes, **filling)
        return
    if guide is not None:
        settings["guide"] = guide_of(guide, run, ema)
    sampler = Sampler.from_run(run, **settings)
    _check_guidance(guidance, guide, rows, sampler)
    if not out.suffix:
        fill(run, out, n, sampler, **filling)
        return
    options = condition(sampler, labels(sampler, n, label, first=first, cond=rows), guidance, n)
    x = sampler(n, first_sample=first, seed=seed, **options).cpu()
    if out.suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, x.numpy())
        replace_file(out, buffer.getvalue())
    else:
        from fastcm.evaluation.pictures import save_grid

        save_grid(x, out)
    print(f"{n} samples of {list(x.shape[1:])} in {out}")


def _check_guidance(
    guidance: float | None, guide: Path | None, rows: Any, sampler: Sampler
) -> None:
    if guidance is not None and guide is None and rows is None and labels(sampler, 0) is None:
        raise ValueError("--guidance needs a run that was trained with --conditional")


def churn_of(text: str) -> Churn:
    """The value of --churn: S_CHURN[,S_MIN,S_MAX[,S_NOISE]]."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 3, 4):
        raise ValueError(f"--churn must be S_CHURN[,S_MIN,S_MAX[,S_NOISE]], got {text!r}")
    return Churn(*numbers)


def guide_of(guide: Path, run: Path, ema: int) -> nn.Module:
    """The network of another run, to guide that of `run`: of the same samples and path."""
    theirs, ours = (Sampler.from_run(directory, ema=ema) for directory in (guide, run))
    for what, a, b in (
        ("samples", theirs.shape, ours.shape),
        ("parameterization", theirs.parameterization, ours.parameterization),
        ("classes", *(classes_of(s) for s in (theirs, ours))),
    ):
        if a != b:
            raise ValueError(f"--guide {guide} has {what} {a}, and {run} has {b}: they must agree")
    if any(getattr(s.net, "description", {}).get("guided") for s in (theirs, ours)):
        raise ValueError("--guide has no meaning for networks that take the weight as an input")
    return theirs.net


def classes_of(sampler: Sampler) -> object:
    return getattr(sampler.net, "description", {}).get("num_classes")


def fill(
    run: Path,
    out: Path,
    n: int,
    sampler: Sampler,
    *,
    ema: int,
    precision: str,
    first: int,
    **options: Any,
) -> None:
    """Draw from a run into a folder, this process's share, and say what was done."""
    check_range(n, first)
    mine = share(range(first, first + n), sampler.batch_size, *launched())
    found, _ = load_newest(run, only=set(), requires=RUN_STATE)
    source = {"step": found.state["step"], "ema": ema, "precision": precision}
    done = sample_folder(sampler, out, len(mine), first=mine.start, source=source, **options)
    name = str(out) if len(mine) == n else f"{out} from {mine.start} on"
    if not mine:
        print(f"{out}: {'--n 0, ' if n == 0 else ''}nothing to draw, nothing written")
        return
    rate = f" at {done.drawn / done.seconds:.1f} img/s" if done.drawn else ""
    said = f"{done.drawn} drawn{rate}, {done.present} there before"
    if done.interrupted is None:
        print(f"{name}: {said}")
        return
    left = len(mine) - done.drawn - done.present
    print(f"{name}: stopped by {done.interrupted.name}: {said}, {left} left for the same command")
    raise typer.Exit(128 + done.interrupted)
