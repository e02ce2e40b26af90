"""What a trace of torch's profiler says of a step, part by part."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastcm.tracing import PREFIX

Event = Mapping[str, Any]

STEP, COMPILED = "step", "compiled"
DATA, FORWARD, BACKWARD = "data", "network, forward", "network, backward"
NOISING, MAPS, AROUND = "noising", "boundary and loss", "around them"
CLIP, ADAM, OTHER, HOST = "norm to clip", "Adam and averages", "other", "host"
PARTS = {
    DATA: "rows drawn, and sent to the device",
    FORWARD: "of student, target and teacher",
    BACKWARD: "",
    NOISING: "",
    MAPS: "",
    AROUND: "times, coefficients, what else the objective computes",
    CLIP: "",
    ADAM: "",
    OTHER: "on the device, of no part that is known",
    HOST: "",
}
"""The rows of the table in their order, and what is in them."""

_MARKS = {
    **{"data": DATA, "network": FORWARD, COMPILED: FORWARD, "backward": BACKWARD},
    **{"loss": AROUND, "norm": CLIP, "sweep": ADAM},
    **dict.fromkeys(("noise", "uniform", "noising", "sampler_update"), NOISING),
    **dict.fromkeys(("boundary", "scale", "euler_step", "consistency_loss"), MAPS),
}
"""The part of each range that `fastcm.tracing.part` names."""
KERNELS = {
    **dict.fromkeys(("noising_kernel", "uniform_kernel"), NOISING),
    **dict.fromkeys(("boundary_kernel", "scale_kernel", "euler_kernel"), MAPS),
    **dict.fromkeys(("loss_kernel", "loss_partial_kernel", "loss_finish_kernel"), MAPS),
    **dict.fromkeys(("grad_norm_kernel", "grad_norm_finish_kernel"), CLIP),
    **dict.fromkeys(("tick_kernel", "sweep_kernel"), ADAM),
}
"""The part of each kernel of this package, by its name."""
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")


@dataclass(frozen=True)
class Shares:
    """Where the time of a step goes.

    Args:
        ms: milliseconds of a step by part, in the order of the table; their sum is its wall time.
        steps: that were traced; `ms` are their mean.
        notes: what could not be told apart.
        head: a line above the table.
    """

    ms: Mapping[str, float]
    steps: int
    notes: tuple[str, ...] = ()
    head: str = ""

    @property
    def total(self) -> float:
        """Milliseconds of a step."""
        return sum(self.ms.values())

    def __str__(self) -> str:
        lines = [self.head] if self.head else []
        lines.append(f"{'part':<20}{'ms':>9}{'share':>9}")
        for name, ms in [*self.ms.items(), ("the step", self.total)]:
            text = PARTS.get(name, "")
            line = f"{name:<20}{ms:9.3f}{100 * ms / self.total:7.1f} %"
            lines.append(f"{line}  {text}" if text else line)
        return "\n".join([*lines, *self.notes])


def shares(events: Sequence[Event]) -> Shares:
    """The parts of the steps in a trace.

    Where nothing ran on a GPU, a part is what the host spent in its ranges, and `HOST` what it
    spent in none. With a GPU a part is what the device spent in the kernels that the host launched
    in its ranges, and `HOST` the time in which the device did nothing. Kernels of a CUDA graph were
    launched by none of them: there ours are known by their names, and others by their place.

    Args:
        events: ``traceEvents`` of the JSON that torch's profiler writes, of a run with the ranges
            of `fastcm.tracing.part`, all in ranges named "step".

    Raises:
        ValueError: no such ranges.
    """
    complete = [e for e in events if e.get("ph") == "X"]
    host = [e for e in complete if not str(e.get("cat", "")).startswith("gpu_")]
    marks = [e for e in host if str(e["name"]).startswith(PREFIX)]
    steps = [e for e in marks if e["name"] == PREFIX + STEP]
    if not steps:
        raise ValueError("the trace has no step of a fastcm training in it")
    thread = steps[0]["tid"]
    segments = _innermost([e for e in marks if e["tid"] == thread])
    begin, end = steps[0]["ts"], max(e["ts"] + e["dur"] for e in steps)
    kernels = [e for e in complete if e.get("cat") in _DEVICE]
    compiled = any(name == COMPILED for _, _, name in segments)
    notes = []
    spent: defaultdict[str, float] = defaultdict(float)
    if kernels:
        if _add_device(spent, kernels, host, segments, (begin, end)):
            notes.append(
                "The step is a CUDA graph: its kernels are told apart by their names and order, "
                "and rows, times and coefficients are in 'other'."
            )
    else:
        for start, stop, name in segments:
            if name != STEP:
                spent[_MARKS.get(name, OTHER)] += stop - start
    spent[HOST] = end - begin - sum(spent.values())
    if compiled:
        notes.append(
            "The loss is compiled: 'network' holds what the compiler fused with it, such as times, "
            "boundary and loss."
        )
    ms = {name: spent[name] / 1e3 / len(steps) for name in PARTS if name in spent}
    return Shares(ms, len(steps), tuple(notes))


def _innermost(marks: Sequence[Event]) -> list[tuple[float, float, str]]:
    """The time that the ranges of one thread cover, cut where another becomes the innermost."""
    cuts: list[tuple[float, float, str]] = []
    open_: list[tuple[float, str]] = []  # the end and name of each
    at = 0.0

    def until(time: float) -> None:
        """Close what has ended by then, and cover the time up to it."""
        nonlocal at
        while open_ and open_[-1][0] <= time:
            stop, name = open_.pop()
            if stop > at:
                cuts.append((at, stop, name))
                at = stop
        if open_ and time > at:
            cuts.append((at, time, open_[-1][1]))
        at = max(at, time)

    for event in sorted(marks, key=lambda e: (e["ts"], -e["dur"])):
        until(event["ts"])
        open_.append((event["ts"] + event["dur"], str(event["name"]).removeprefix(PREFIX)))
    until(float("inf"))
    return cuts


def _add_device(
    spent: dict[str, float],
    kernels: Sequence[Event],
    host: Sequence[Event],
    segments: Sequence[tuple[float, float, str]],
    window: tuple[float, float],
) -> bool:
    """Add the microseconds that a GPU spent in each part; whether it replayed a graph."""
    launches = {
        e["args"]["correlation"]: e
        for e in host
        if e.get("cat") in _LAUNCHES and "correlation" in e.get("args", {})
    }
    starts = [start for start, _, _ in segments]
    order, (at, end) = _Order(), window
    for kernel in sorted(kernels, key=lambda e: e["ts"]):
        launch = launches.get(kernel["args"].get("correlation"))
        name = re.sub(r"_\d+$", "", str(kernel["name"]))  # compiled code numbers them
        if launch is not None and "GraphLaunch" in launch["name"]:
            part = order.part(name, launch["args"]["correlation"])
        else:
            i = -1 if launch is None else bisect_right(starts, launch["ts"]) - 1
            inside = i >= 0 and launch is not None and launch["ts"] < segments[i][1]
            mark = segments[i][2] if inside else STEP
            part = OTHER if mark == STEP else KERNELS.get(name, _MARKS.get(mark, OTHER))
        start = max(kernel["ts"], at)  # what runs beside another counts once
        stop = min(kernel["ts"] + kernel["dur"], end)
        if stop > start:
            spent[part] += stop - start
            at = stop
    return order.graphs > 0


class _Order:
    """Parts of the kernels of captured steps, in their order.

    After the noise comes the network, after the loss its backward pass, after the sweep nothing
    that is known; what is before the noise is not known either. A loss of no kernel of ours has no
    order: what is not ours is `OTHER` then.

    Attributes:
        graphs: replays that were seen.
    """

    def __init__(self) -> None:
        self.graphs = 0
        self._replay: object = None
        self._others = OTHER

    def part(self, name: str, replay: object) -> str:
        """Of the next kernel; `replay` tells one step from another."""
        if replay != self._replay:
            self._replay, self._others = replay, OTHER
            self.graphs += 1
        ours = KERNELS.get(name)
        if ours is None:
            return self._others
        if ours == NOISING and name == "noising_kernel":
            self._others = FORWARD
        elif name in ("loss_kernel", "loss_finish_kernel"):
            self._others = BACKWARD
        elif ours in (CLIP, ADAM):
            self._others = OTHER
        return ours
