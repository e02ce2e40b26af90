"""What the options of the command line may be, and which methods have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastcm import losses, paths, schedules
from fastcm.ema import EMA

METHODS = (
    "flow", "stepwise", "ct", "ict", "ect", "sct", "shortcut", "meanflow", "cfm", "cd", "lcm",
    "scd", "pairs",
)  # fmt: skip
TWO_TIMES = ("shortcut", "meanflow")
DISTILLATIONS = ("cd", "lcm", "scd")
"""They need a teacher."""
PATHS: dict[str, paths.Path] = {
    "linear": paths.Linear(),
    "ve": paths.VarianceExploding(),
    "trig": paths.TrigFlow(),
    "vp": paths.VariancePreserving(),
}
METRICS: dict[str, losses.Metric] = {
    "squared-l2": losses.SquaredL2(),
    "l2": losses.L2(),
    "l1": losses.L1(),
    "pseudo-huber": losses.PseudoHuber(),
    "elementwise-huber": losses.ElementwiseHuber(),
    "elementwise-l2": losses.ElementwiseL2(),
}
METRIC_NAMES = (*METRICS, "lpips")
"""With the one that is read from files."""
WEIGHTS: dict[str, losses.Weight] = {
    "uniform": losses.uniform,
    "inverse-gap": losses.inverse_gap,
    "inverse-square": losses.inverse_square,
    "snr": losses.snr,
    "snr-plus-one": losses.snr_plus_one,
    "truncated-snr": losses.truncated_snr,
    "min-snr": losses.MinSNR(),
    "karras": losses.Karras(),
    "learned": losses.Learned(),
}
GRIDS: dict[str, schedules.Grid] = {
    "uniform": schedules.UniformGrid(),
    "karras": schedules.KarrasGrid(),
}
TIMES: dict[str, schedules.TimeSampler] = {
    "uniform": schedules.UniformTime(),
    "logit-normal": schedules.LogitNormal(),
    "log-normal": schedules.LogNormal(),
}
CURRICULA: dict[str, Callable[[int], schedules.Curriculum]] = {
    "cm": schedules.CMCurriculum,
    "ict": schedules.ICTCurriculum,
}

MORE_INPUTS = ("two_times", "guided", "log_variance")
"""What a network may have that the one it starts from does not."""

LCM: dict[str, Any] = {
    "discretization": 1000,
    "skip": 20,
    "solver": "ddim",
    "weight": losses.uniform,
    "target_average": EMA(0.95),
}
"""Of Luo et al. 2023, table 3 of the appendix; for the range of guidance see `Recipe.weights`."""

METHODS_WITH: dict[str, tuple[str, ...]] = {
    "condition_dropout": ("flow", "meanflow"),
    "times": ("flow", "ct", "ict", "shortcut", "meanflow", "cfm", "cd", "lcm"),
    "weight": ("flow", "stepwise", "ct", "ict", "ect", "sct", "cd", "lcm", "scd"),
    "segments": ("cfm",),
    "grid": ("stepwise", "ct", "ict", "cd", "lcm"),
    "shift": ("flow", "stepwise", "ct", "cd", "lcm"),
    "intervals": ("stepwise", "ct", "cd", "lcm"),
    "target_ema": ("ct", "shortcut", "cfm", "cd", "lcm"),
    "init": (
        *("flow", "stepwise", "ct", "ict", "ect", "sct", "shortcut", "meanflow", "cfm", "pairs"),
    ),
    "teacher": DISTILLATIONS,
    "guidance": ("cd", "scd", "meanflow"),
    "guidance_range": ("lcm",),
    "solver": ("cd", "lcm"),
    "skip": ("cd", "lcm"),
}
"""The options that not every method has."""


def discretization(value: str, steps: int) -> int | schedules.Curriculum:
    """What --intervals says for a training of so many steps."""
    if value in CURRICULA:
        return CURRICULA[value](steps)
    try:
        return int(value)
    except ValueError:
        raise ValueError(
            f"--intervals must be a number or one of {', '.join(CURRICULA)}, got {value!r}"
        ) from None
