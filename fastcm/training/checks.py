"""What a trainer refuses before any work is done."""

from __future__ import annotations

from torch import nn

from fastcm.data import DeviceData
from fastcm.objectives.base import Objective


def check_teacher(teacher: nn.Module, net: nn.Module) -> None:
    """A teacher that shares parameters with the student would be trained along."""
    if {id(p) for p in teacher.parameters()} & {id(p) for p in net.parameters()}:
        raise ValueError(
            "the teacher shares parameters with net, and would be trained along: "
            "give it a copy, copy.deepcopy(net)"
        )


def check_classes(net: nn.Module, source: object, objective: Objective) -> None:
    """A label of num_classes would be the null label, one beyond it an index out of range."""
    classes = getattr(net, "description", {}).get("num_classes")
    data = source.dataset.num_classes if isinstance(source, DeviceData) else None
    null = getattr(objective, "null_condition", None)
    if classes is not None and data is not None and data > classes:
        raise ValueError(f"the data has {data} classes, the network num_classes={classes}")
    if classes is not None and isinstance(null, int) and not 0 <= null <= classes:
        raise ValueError(f"null_condition must be in [0, {classes}], got {null}")
