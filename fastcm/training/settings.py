"""What a run was asked to do, and what it refuses to begin with."""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, SupportsIndex


@dataclass(frozen=True)
class Settings:
    """The numbers of a run that never change; see `Trainer` for what they mean.

    Raises:
        TypeError, ValueError: one is no int, or out of range.
    """

    batch_size: int = 256
    seed: int = 0
    directory: Path | None = None
    save_every: int = 0
    keep: int = 3
    keep_every: int = 0
    log_every: int = 50

    def __post_init__(self) -> None:
        for name, least in (
            ("batch_size", 1),
            ("save_every", 0),
            ("keep", 1),
            ("keep_every", 0),
            ("log_every", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, SupportsIndex):
                raise TypeError(f"{name} must be an int, got {value!r:.80}")
            if operator.index(value) < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint of this step is wanted in passing."""
        every = (self.save_every, self.keep_every)
        return self.directory is not None and any(n and step % n == 0 for n in every)

    def numbers(self) -> dict[str, Any]:
        """All but the directory, which may have another name on another host."""
        return {name: value for name, value in asdict(self).items() if name != "directory"}

    def run(self, verb: str, directory: str | Path | None) -> Path:
        """The directory to save to or load from, default that of the run."""
        run = self.directory if directory is None else Path(directory)
        if run is None:
            raise ValueError(
                f"{verb} needs a directory: Trainer(directory=...) or {verb}(directory)"
            )
        return run
