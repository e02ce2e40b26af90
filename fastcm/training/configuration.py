"""What must agree for a run to be resumed."""

from __future__ import annotations

import math
from typing import Any

from fastcm.data import Source
from fastcm.runs.description import describe
from fastcm.training.lr import Schedule
from fastcm.training.settings import Settings
from fastcm.training.state import State


def configuration(
    settings: Settings, state: State, source: Source, lr_schedule: Schedule
) -> dict[str, Any]:
    """A JSON-able description of everything that the numbers of a run depend on."""
    net, gradients = state.net, state.gradients
    return {
        "objective": describe(gradients.objective),
        "network": getattr(net, "description", None) or type(net).__name__,
        "averages": describe(state.update.averages),
        "optimizer": type(state.optimizer).__name__,
        "param_groups": [
            {k: describe(v) for k, v in group.items() if k not in ("params", "lr")}
            for group in state.optimizer.param_groups
        ],
        "lr": state.base_lr,
        "lr_schedule": describe(lr_schedule),
        "max_grad_norm": _number(state.update.max_grad_norm),
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "precision": gradients.precision,
        "accumulate": gradients.accumulate,
        "data": source.describe(),
    }


def _number(value: float | None) -> float | None:
    """None for infinity, which JSON does not have."""
    return None if value is None or math.isinf(value) else value
