"""When a run is stopped because its gradients are no numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastcm.training.logging import Reading
from fastcm.training.state import State

NON_FINITE_LIMIT = 20


class NonFiniteError(RuntimeError):
    """The loss or its gradient was not finite for many steps in a row."""


class Watch:
    """Stops a fit whose gradients are no numbers.

    What fails is not saved, so that a checkpoint from before it stays.

    Args:
        state: of the training.
        steps: that it is to take.
        newest: waits for what is being written and gives the newest checkpoint, or None.
    """

    def __init__(self, state: State, steps: int, newest: Callable[[], Path | None]) -> None:
        self._state, self._steps, self._newest = state, steps, newest
        self._reading: Reading | None = None

    def in_passing(self) -> None:
        """Look at the counts of every 20th step once they have arrived; does not wait."""
        if self._state.step % NON_FINITE_LIMIT == 0:
            self._reading = self._read()
        if self._reading is not None and self._reading.arrived:
            reading, self._reading = self._reading, None
            self._judge(reading)

    def now(self) -> bool:
        """Whether the last gradient was finite; waits for the device."""
        return self._judge(self._read())

    def _read(self) -> Reading:
        counts = {"in_a_row": self._state.update.counts[2]}
        return Reading({"step": self._state.step}, counts)

    def _judge(self, reading: Reading) -> bool:
        values = reading.values()
        step, in_a_row = values["step"], int(values["in_a_row"])
        if in_a_row >= NON_FINITE_LIMIT or 1 < self._steps <= in_a_row:
            saved = self._newest()
            raise NonFiniteError(
                f"the gradient was not finite for {in_a_row} steps in a row, up to step {step}; "
                "those steps changed nothing"
                + (f"; the last good checkpoint is {saved}" if saved else "")
                + ". Lower the learning rate, or look for NaN in data and network output"
            )
        return in_a_row == 0
