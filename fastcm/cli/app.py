"""The program ``fastcm``: its commands, and how errors of the user end."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from fastcm import __version__
from fastcm.cli import demo, plot
from fastcm.cli.bench import bench
from fastcm.cli.consolidate import consolidate
from fastcm.cli.encode import encode
from fastcm.cli.evaluate import evaluate
from fastcm.cli.export import export
from fastcm.cli.pairs import pairs
from fastcm.cli.plan import plan
from fastcm.cli.sample import sample
from fastcm.cli.train import train
from fastcm.training import NonFiniteError
from fastcm.training.parallel import launched, meeting_place, shown_elsewhere
from fastcm.training.processes import Disagreement, PeerError

app = typer.Typer(
    help="Train, distil and sample few-step generative models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

app.command()(train)
app.command()(sample)
app.command()(pairs)
app.command()(encode)
app.command()(evaluate)
app.command()(bench)
app.command()(consolidate)
app.command()(export)
app.command(name="plan")(plan)
app.add_typer(plot.app, name="plot")


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
    table.add_row("torch", torch.__version__)  # with its build, which the metadata lack
    for package in ("triton", "numpy", "safetensors"):
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


def _said_by_first(error: BaseException) -> bool:
    """Whether the first of torchrun's processes ends by the same error, and shows it."""
    rank, count = launched()
    if count == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        store, text = meeting_place(), f"{type(error).__name__}: {error}"
        if rank == 0:
            store.set("error", text)
            return False
        store.wait(["error"], timedelta(seconds=3))
        return bool(store.get("error").decode() == text)
    except (RuntimeError, ValueError):  # no store, or nothing there in time
        return False


def main() -> None:
    """Run the command line; errors of the user end in one line and exit code 2."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, NonFiniteError, PeerError) as error:
        if not shown_elsewhere(error, (Disagreement, NonFiniteError)) and not _said_by_first(error):
            print(f"fastcm: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "fastcm: interrupted; train --resume or sample again continues from what is saved",
            file=sys.stderr,
        )
        sys.exit(130)
