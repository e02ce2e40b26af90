"""Scalars for TensorBoard, by torch's writer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Scalars:
    """Writes the numbers of a report to the event files in a directory.

    Args:
        directory: made at the first report.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, directory: Path) -> None:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "tensorboard=True needs the package tensorboard: pip install tensorboard"
            ) from error
        self._directory = directory
        self._writer: Any = None
        self._purge_step: int | None = None

    def drop_after(self, step: int) -> None:
        """Hide later steps, which a resumed run repeats."""
        self.close()
        self._purge_step = step + 1

    def write(self, metrics: Mapping[str, Any]) -> None:
        """One point of every metric at its step."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._directory), purge_step=self._purge_step)
            self._purge_step = None
        for name, value in metrics.items():
            if name != "step":
                self._writer.add_scalar(name, value, metrics["step"])
        self._writer.flush()

    def close(self) -> None:
        """End the event file; a later report begins another."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
