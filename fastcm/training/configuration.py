"""What must agree for a run to be resumed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fastcm.runs.description import describe

if TYPE_CHECKING:
    from fastcm.training.trainer import Trainer


def configuration(trainer: Trainer) -> dict[str, Any]:
    """A JSON-able description of everything that the numbers of a run depend on."""
    return {
        "objective": describe(trainer.objective),
        "network": trainer.metadata["network"] or type(trainer.net).__name__,
        "averages": describe(trainer.averages),
        "optimizer": type(trainer.optimizer).__name__,
        "param_groups": [
            {k: describe(v) for k, v in group.items() if k not in ("params", "lr")}
            for group in trainer.optimizer.param_groups
        ],
        "lr": trainer.base_lr,
        "lr_schedule": describe(trainer.lr_schedule),
        "max_grad_norm": _number(trainer.update.max_grad_norm),
        "batch_size": trainer.batch_size,
        "seed": trainer.seed,
        "precision": trainer.gradients.precision,
        "accumulate": trainer.gradients.accumulate,
        "data": trainer.source.describe(),
    }


def _number(value: float | None) -> float | None:
    """None for infinity, which JSON does not have."""
    return None if value is None or math.isinf(value) else value
