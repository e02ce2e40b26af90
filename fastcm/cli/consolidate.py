"""The command ``fastcm consolidate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastcm.runs.consolidate import consolidate as consolidated


def consolidate(
    run: Annotated[Path, typer.Argument(help="directory of a run")],
) -> None:
    """Write the newest checkpoint of a sharded run in its plain form, in the place of the other.

    Everything reads either form; the plain one is what other programs read as safetensors.
    """
    path, was_sharded = consolidated(run)
    print(f"{path}: {'consolidated' if was_sharded else 'plain already'}")
