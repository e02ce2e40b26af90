"""Shared by the benchmarks: check first, then time the columns of a case interleaved in one run.

A case is refused, not timed, if one of its columns is not as close to the float64 reference as
plain torch in the same dtype (twice its error, plus what the noise contract allows). Times are
medians over rounds in which every column runs once; ratios are medians of the rounds' own ratios,
so that a drifting clock does not count, and come with their spread over the rounds. On a GPU a
column is a captured CUDA graph of several calls, timed by events, next to a copy of as many bytes
as the case must move.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastcm
from benchmarks import nvml
from benchmarks.machine import machine
from fastcm import rng

RESULTS = Path(__file__).resolve().parent / "results"
ATOL = 2e-5
"""On outputs of order 1: normals agree to 4e-6 in general, MATH of the noise contract."""

QUICK = os.environ.get("QUICK") == "1"
"""A look: few rounds, to see that all runs and about how fast; `python -m benchmarks --quick`."""
QUICK_ROUNDS = 3

Function = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One operation at one shape and dtype.

    Args:
        name: of the operation.
        shape, dtype: of its samples.
        columns: what is timed, by name; "fastcm" among them.
        check: arguments-free functions that return what each column computes, on the same noise.
        reference: the float64 result, one tensor for each output.
        bytes: what the operation must move at least.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    columns: Mapping[str, Function]
    check: Mapping[str, Function]
    reference: tuple[Tensor, ...]
    bytes: int
    slack: tuple[Tensor | float, ...] = ()
    """Of each output, an allowance on top: where the noise contract is wider, see `near_zero`."""

    @property
    def id(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{self.name} {size} {str(self.dtype).removeprefix('torch.')}"


def folder() -> Path:
    """Where reports are written: $OUT, or benchmarks/results."""
    return Path(os.environ.get("OUT") or RESULTS)


class Report:
    """The rows of one benchmark file, written as JSON with the machine they were measured on.

    Args:
        name: of the file.
        resume: begin with the rows of this commit that were written before.

    Attributes:
        expected: names of the tests that measure.
    """

    def __init__(self, name: str, *, resume: bool = False) -> None:
        self.name, self.rows = name, []  # type: tuple[str, list[dict[str, Any]]]
        self.expected: list[str] = []
        self._current, self._began = "", time.monotonic()
        self._machine, self._before = machine(), nvml.snapshot()
        device = "gpu" if torch.cuda.is_available() else "cpu"
        self.path = folder() / f"{name}_{device}.json"
        if resume and self.path.exists():
            held = json.loads(self.path.read_text())
            if held["machine"].get("commit") == self._machine["commit"]:
                self.rows = held["rows"]

    @property
    def done(self) -> set[str]:
        """The tests whose rows are there."""
        return {row["id"] for row in self.rows}

    def begin(self, test: str) -> None:
        """The rows of this test come next."""
        self._current, self._began = test, time.monotonic()

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, with the seconds that its test took until now, and write all."""
        seconds = round(time.monotonic() - self._began, 1)
        self.rows.append({"id": self._current, "seconds": seconds, **row})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        body = {
            "machine": self._machine,
            "gpu_state": nvml.difference(self._before),
            "expected": self.expected,
            "rows": self.rows,
        }
        self.path.write_text(json.dumps(body, indent=1) + "\n")


def flat(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def near_zero(shape: tuple[int, ...], key: fastcm.NoiseKey, stream: int) -> Tensor:
    """How far normals of an approximate logarithm may be off where it is next to 0."""
    D = math.prod(shape[1:])
    quad = rng.blocks(shape[0], (D + 3) // 4, key.tensor, stream)
    near = torch.stack([quad[0] > 2**32 - 2**22] * 2 + [quad[2] > 2**32 - 2**22] * 2, dim=-1)
    return 1e-3 * near.flatten(1)[:, :D].reshape(shape).double()


def verify(case: Case) -> dict[str, float]:
    """The largest error of each column against float64; raises AssertionError where it is wrong."""
    slack = case.slack or (0.0,) * len(case.reference)
    errors = {
        name: max(
            ((out.double() - ref).abs() - more).max().item()
            for out, ref, more in zip(flat(compute()), case.reference, slack, strict=True)
        )
        for name, compute in case.check.items()
    }
    scale = max(1.0, *(ref.abs().max().item() for ref in case.reference))
    for name, error in errors.items():
        limit = 2 * errors["eager"] + ATOL * scale
        assert error <= limit, f"{case.id}: {name} is off by {error:.3g}, allowed are {limit:.3g}"
    return errors


def measure(case: Case, *, rounds: int = 15, seconds: float = 0.03) -> dict[str, Any]:
    """Check a case, time its columns, and return its row of the report."""
    errors = verify(case)
    cuda = case.reference[0].is_cuda
    columns = dict(case.columns)
    if cuda:
        source = torch.empty(case.bytes // 2, dtype=torch.uint8, device="cuda")
        sink = torch.empty_like(source)
        columns["copy"] = lambda: sink.copy_(source)
    timers = {n: (_graph_timer if cuda else _host_timer)(f, seconds) for n, f in columns.items()}
    samples = interleaved(timers, rounds)
    row: dict[str, Any] = {
        "case": case.name,
        "shape": list(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "bytes": case.bytes,
        "ms": {name: 1e3 * statistics.median(times) for name, times in samples.items()},
        "max_error": errors,
    }
    baselines = [name for name in ("eager", "compiled", "stock", "copy") if name in samples]
    return row | ratios(samples, *((name, "fastcm") for name in baselines))


def interleaved(timers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each timer returned in each round; every round begins with another one."""
    samples: dict[str, list[float]] = {name: [] for name in timers}
    names = list(timers)
    for i in range(min(rounds, QUICK_ROUNDS) if QUICK else rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(timers[name]())
    return samples


def ratios(samples: Mapping[str, list[float]], *pairs: tuple[str, str]) -> dict[str, Any]:
    """Of each pair (a, b) the rounds' ratios a / b: their median, and what lies between the tenths.

    Returns:
        ``{"a/b": median, ..., "spread": {"a/b": [10 %, 90 %], ...}, "rounds": number}``.
    """
    found: dict[str, Any] = {}
    spread: dict[str, list[float]] = {}
    for a, b in pairs:
        values = [x / y for x, y in zip(samples[a], samples[b], strict=True)]
        found[f"{a}/{b}"] = statistics.median(values)
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        spread[f"{a}/{b}"] = [tenths[0], tenths[-1]]
    return {**found, "spread": spread, "rounds": len(next(iter(samples.values())))}


def _host_timer(function: Function, seconds: float) -> Callable[[], float]:
    function()
    start = time.perf_counter()
    function()
    calls = max(1, round(seconds / max(time.perf_counter() - start, 1e-6)))

    def timer() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls

    return timer


def captured(function: Function, calls: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of so many calls, after three to warm up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph


def _graph_timer(function: Function, seconds: float, calls: int = 10) -> Callable[[], float]:
    graph = captured(function, calls)
    edges = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def replay(times: int) -> float:
        edges[0].record()
        for _ in range(times):
            graph.replay()
        edges[1].record()
        edges[1].synchronize()
        return edges[0].elapsed_time(edges[1]) / 1e3 / times / calls

    replay(1)
    times = max(1, round(seconds / max(replay(1) * calls, 1e-6)))
    return lambda: replay(times)
