"""The command ``fastcm export``: a run as a folder to hand on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastcm import hub


def export(
    run: Annotated[Path, typer.Argument(help="directory of a run")],
    to: Annotated[Path, typer.Option(help="folder for weights, config.json and model card")],
    ema: Annotated[int, typer.Option(help="which weight average; -1: the raw weights")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="evaluations of its sampler; 1, or 50 of an ODE, if absent")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="multistep, ode or flow-map; what suits the run if absent"),
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="OWNER/NAME on the Hugging Face Hub to upload it to")
    ] = None,
) -> None:
    """Write a trained run as a folder that fastcm.from_pretrained loads."""
    if method not in (None, "multistep", "ode", "flow-map"):
        raise ValueError(f"--method must be multistep, ode or flow-map, got {method!r}")
    options: dict[str, Any] = {"ema": ema, "steps": steps, "method": method}
    folder = hub.save_pretrained(run, to, **options)
    print(f'{run} in {folder}: fastcm.from_pretrained("{folder}")')
    if push is not None:
        print(hub.push_to_hub(folder, push))
