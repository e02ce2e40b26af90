"""Options of a command from a TOML file, and the file that repeats a run."""

from __future__ import annotations

import json
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RUN_TOML = "run.toml"
_KINDS: dict[type, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,)}


def defaults(context: typer.Context, path: Path | None) -> Path | None:
    """Have the options in a file as the defaults of a command; for its option ``--config``.

    Raises:
        FileNotFoundError, ValueError: there is no such file; it is no TOML, or an option in it is
            unknown or of another type.
    """
    if path is not None:
        hints = typing.get_type_hints(context.command.callback)
        known = {k: v for k, v in hints.items() if k not in ("config", "return")}
        options = {name.replace("-", "_"): value for name, value in _read(path).items()}
        for name, value in options.items():
            if name not in known:
                raise ValueError(f"{path}: no option {name!r}, there are {', '.join(known)}")
            _check(path, name, value, known[name])
        context.default_map = {**(context.default_map or {}), **options}
    return path


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: no such file")
    try:
        return tomllib.loads(path.read_text())
    except ValueError as error:  # of TOML or of UTF-8
        raise ValueError(f"--config {path} is not TOML: {error}") from error


def _check(path: Path, name: str, value: Any, hint: Any) -> None:
    parts = typing.get_args(hint) or (hint,)  # T, T | None or list[T]
    kinds = _KINDS.get(parts[0], (str,))
    several = typing.get_origin(hint) is list and isinstance(value, list)
    for v in value if several else [value]:
        if not isinstance(v, kinds) or (isinstance(v, bool) and bool not in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{path}: {name} must be {wanted}, got {v!r}")


def dump(options: Mapping[str, Any]) -> str:
    """Options as TOML, a line each; those that are None are left out."""
    # strings, numbers, booleans and lists of these are written alike in JSON
    given = {name: value for name, value in options.items() if value is not None}
    return "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in given.items())
