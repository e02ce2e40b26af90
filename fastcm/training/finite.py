"""When a run is stopped because its gradients are no numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastcm import checkpoint

if TYPE_CHECKING:
    from fastcm.training.trainer import Trainer

NON_FINITE_LIMIT = 20


class NonFiniteError(RuntimeError):
    """The loss or its gradient was not finite for many steps in a row."""


def is_finite(trainer: Trainer, steps: int) -> bool:
    """Whether the last gradient was; raises where too many in a row, or all of a fit, were not.

    What fails is not saved, so that a checkpoint from before it stays.
    """
    in_a_row = int(trainer.update.counts[2].item())
    if in_a_row >= NON_FINITE_LIMIT or 1 < steps <= in_a_row:
        run = trainer.directory
        saved = checkpoint.list_checkpoints(run) if run is not None else []
        raise NonFiniteError(
            f"the gradient was not finite for {in_a_row} steps in a row, up to step "
            f"{trainer.step}; those steps changed nothing"
            + (f"; the last good checkpoint is {saved[0]}" if saved else "")
            + ". Lower the learning rate, or look for NaN in data and network output"
        )
    return in_a_row == 0
