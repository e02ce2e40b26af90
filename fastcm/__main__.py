"""Entry of the command line: says what to install where its extra is missing."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the ``fastcm`` command."""
    try:
        from fastcm.cli import main as command
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f'fastcm: the command line needs {error.name}: pip install "fastcm[demo]"')
    command()


if __name__ == "__main__":
    main()
