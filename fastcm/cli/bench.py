"""The command ``fastcm bench``: the benchmarks of a source checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

import fastcm

CHECKOUT = Path(fastcm.__file__).resolve().parent.parent


def bench(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            help="ops, optimizer, step, sampling, jvp, attention, parallel, data, plan, lora, "
            "codegen, or all; a quick look at all if absent; or: report; compare BEFORE.json "
            "AFTER.json"
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="few rounds of few rows")] = False,
    out: Annotated[Path | None, typer.Option(help="folder of the JSON")] = None,
) -> None:
    """Measure this machine: fastcm beside plain and compiled PyTorch, checked first.

    Needs the sources, of which the benchmarks are a part: in a checkout, `pip install -e .`.
    """
    if not (CHECKOUT / "benchmarks" / "harness.py").is_file():
        raise ValueError(
            f"the benchmarks are not in the wheel, and {CHECKOUT} is no checkout: clone the "
            "repository and run `make bench` there, or `pip install -e '.[demo,bench]'`"
        )
    arguments = [*(what or []), *(["--quick"] if quick else [])]
    if out is not None:
        arguments += ["--out", str(out)]
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks", *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path})
    raise typer.Exit(done.returncode)
