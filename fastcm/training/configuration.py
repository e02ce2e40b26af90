"""What must agree for a run to be resumed, and what a sampler must know of it."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from fastcm.data import Source
from fastcm.objectives.base import Objective
from fastcm.runs.checkpoint import plain
from fastcm.runs.description import describe
from fastcm.sharding.spread import type_of
from fastcm.training.lr import Schedule
from fastcm.training.settings import Settings
from fastcm.training.state import State


def configuration(
    settings: Settings, state: State, source: Source, lr_schedule: Schedule
) -> dict[str, Any]:
    """A JSON-able description of everything that the numbers of a run depend on.

    Not of how many processes share it, and whether each holds the whole.
    """
    net, gradients, spread = state.net, state.gradients, state.gradients.spread
    return {
        "objective": describe(gradients.objective) if spread is None else spread.objective,
        "network": getattr(net, "description", None) or type_of(plain(net)),
        "frozen": state.left_out.fingerprint,
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


def metadata_of(net: nn.Module, objective: Objective) -> dict[str, Any]:
    """What a sampler must know of a network; "shape" is that of a sample, once it is seen."""
    null = getattr(objective, "null_condition", None)
    return {
        "network": getattr(net, "description", None),
        "parameterization": describe(objective.parameterization),
        "null_condition": null if isinstance(null, int) else None,
        "shape": None,
    }


def _number(value: float | None) -> float | None:
    """None for infinity, which JSON does not have."""
    return None if value is None or math.isinf(value) else value
