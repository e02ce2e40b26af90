"""What a person sees of a training: lines, the bar, and metrics as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastcm.progress import Progress
from fastcm.training.logging import MetricsFile, Reading


class Reports:
    """Tells of a training; of several processes, the first alone does.

    Args:
        directory: of the run, for the metrics; None keeps none.
        tensorboard: whether they are written for TensorBoard, too.
        bar: show one where there is a terminal and no `log`.
        log: receives lines of text; default standard error.
        silent: whether another process tells.

    Attributes:
        file: the metrics on the disk.

    Raises:
        ValueError, ImportError: see `MetricsFile`.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        tensorboard: bool,
        bar: bool,
        log: Callable[[str], None] | None,
        silent: bool = False,
    ) -> None:
        self.file = MetricsFile(
            None if silent else directory, tensorboard=tensorboard and not silent
        )
        self._show, self._log, self._silent = bar and log is None and not silent, log, silent
        self._bar: Progress | None = None
        self._reading: Reading | None = None

    def log(self, line: str) -> None:
        """One line of text."""
        if self._silent:
            return
        if self._log is not None:
            self._log(line)
        else:
            (self._bar or Progress("", 0, show=False)).print(line)

    @contextmanager
    def bar(self, title: str, steps: int) -> Iterator[None]:
        """Inside, a bar shows how far the steps are."""
        with Progress(title, steps, show=self._show) as self._bar:
            yield
        self._bar = None

    def advance(self) -> None:
        """One more step was taken."""
        if self._bar is not None:
            self._bar.advance()

    def read(self, reading: Reading) -> None:
        """Have these metrics published when they have arrived."""
        self._reading = reading

    def publish(self, *, wait: bool = False) -> dict[str, Any] | None:
        """Publish the metrics that are being read, and return them, if they have arrived."""
        if self._reading is None or not (wait or self._reading.arrived):
            return None
        metrics, self._reading = self._reading.values(), None
        self.file.write(metrics)
        if self._bar is not None:
            m = metrics
            self._bar.note(f"loss {m['loss']:.4f}  {m['it_s']:.1f} it/s  {m['img_s']:.0f} img/s")
        return metrics
