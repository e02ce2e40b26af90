"""Learning-rate factors as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def warmup_cosine(warmup: int, total: int, floor: float = 0.0) -> Schedule:
    """Learning-rate factor: linear over `warmup` steps, then a cosine down to `floor` at `total`.

    Raises:
        ValueError: warmup < 0, total < 1 or floor outside [0, 1].
    """
    if warmup < 0 or total < 1 or not 0 <= floor <= 1:
        raise ValueError(
            f"need warmup >= 0, total >= 1, floor in [0, 1], got {warmup}, {total}, {floor}"
        )

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min((step - warmup) / max(total - warmup, 1), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    factor.__qualname__ = f"warmup_cosine({warmup}, {total}, {floor})"
    return factor


def restarted(schedule: Schedule, every: int) -> Schedule:
    """`schedule`, begun anew after every so many steps."""

    def factor(step: int) -> float:
        return schedule(step % every)

    factor.__qualname__ = f"restarted({getattr(schedule, '__qualname__', schedule)}, {every})"
    return factor


def constant(step: int) -> float:
    """Learning-rate factor 1."""
    return 1.0
