"""A whole training step: ``python -m pytest -s benchmarks/test_step.py``.

Consistency training and distillation, ECT, a flow and MeanFlow, on the same network, data, batch
and precision. Columns: `eager`, a plain PyTorch loop as public code has it (foreach AdamW, a Python
loop over each average); `best`, the faster of that loop compiled, where torch can, and not, with
fused AdamW and foreach averages; `fastcm`, a
Trainer, compiled or not as ``compile="auto"`` decides in a long run: by the clock; `fastcm eager`,
one that is not. Before any clock starts, the first steps of each are compared with the same loop in
float64, on the same data, times and noise. Rows go to results/step_{cpu,gpu}.json as they come.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcm
from benchmarks.harness import Report, interleaved, ratios
from benchmarks.reference_loop import Variant
from benchmarks.step_cases import (
    CUDA,
    LAUNCH_BOUND,
    Case,
    Column,
    Setting,
    build,
    forget_failure,
    settings,
)

ROUNDS = 15 if CUDA else 7
CHOOSING = 5
"""Rounds that decide whether a column is compiled."""
BLOCK_SECONDS = 0.2
WARM_STEPS = 35 if CUDA else 1
"""A Trainer captures its step and decides about the graph within some thirty steps."""
ALLOWED = {
    "loss": 1e-4 if CUDA else 1e-5,
    "later losses": 2e-3 if CUDA else 5e-4,
    "parameters": 2e-3 if CUDA else 5e-4,
    "average": 2e-3 if CUDA else 5e-4,
}
"""Relative, beyond twice the error of the eager loop. Adam turns gradients that are rounding errors
into steps of full length, so that all but the first loss are those of other parameters; on a GPU
fastcm makes the noise to 4e-6 only, see the noise contract."""

BEST = {
    "eager": Variant(compile=False, optimizer="fused", foreach_ema=True),
    "compiled": Variant(compile=True, optimizer="fused", foreach_ema=True),
}


def errors(outcome: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative distances: the largest of the losses, the norms of the others."""
    found = {k: ((outcome[k] - v).norm() / v.norm()).item() for k, v in exact.items()}
    first, *later = (outcome["loss"] / exact["loss"] - 1).abs().tolist()
    return found | {"loss": first, "later losses": max(later)}


def free() -> None:
    """Give back what columns held that nobody has any more."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def made(
    case: Case,
    make: Callable[[], Column],
    exact: dict[str, Tensor],
    eager: dict[str, float] | None,
) -> Column:
    """A column that has passed the check; raises AssertionError where it computes something else.

    The peak of its memory is that of its first steps, since what a CUDA graph takes is counted
    when it is captured, not when it is replayed.
    """
    free()
    held = 0
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    column = make()
    column.errors = errors(case.outcome(column), exact)
    for name, error in column.errors.items():
        limit = 2 * (eager or column.errors)[name] + ALLOWED[name]
        assert error <= limit, (
            f"{case.setting.id}: {name} is off by {error:.3g}, allowed are {limit:.3g}"
        )
    column.fit(WARM_STEPS)
    if CUDA:
        column.peak_bytes = torch.cuda.max_memory_allocated() - held
    return column


def fastest(
    case: Case,
    makes: Mapping[str, Callable[[], Column]],
    exact: dict[str, Tensor],
    eager: Column,
    steps: int,
    *,
    may_fail: bool = False,
) -> tuple[str, Column, dict[str, float | str]]:
    """Its name, the column, and milliseconds of all; the others' memory is free again.

    By the best of a few rounds: what disturbs a run only ever makes it slower. If `may_fail`, what
    torch cannot compile has the name of its error instead.
    """
    columns: dict[str, Column] = {}
    failed: dict[str, float | str] = {}
    for name, make in makes.items():
        try:
            columns[name] = made(case, make, exact, eager.errors)
        except Exception as error:
            if isinstance(error, AssertionError) or name == "eager" or not may_fail:
                raise
            failed[name] = type(error).__name__
        if name in failed:
            forget_failure()
    samples = interleaved({n: partial(c.seconds, steps) for n, c in columns.items()}, CHOOSING)
    ms = {name: 1e3 * min(times) for name, times in samples.items()}
    name = min(ms, key=lambda each: ms[each])
    column = columns[name]
    columns.clear()
    free()
    return name, column, {**ms, **failed}


def measure(setting: Setting) -> tuple[dict[str, Any], Column]:
    """Check a setting, time its columns; the row of the report, and fastcm's column."""
    case = build(setting)
    # float64 takes twice the memory, and rows of a batch are independent
    exact = case.outcome(case.loop(Variant(), dtype=torch.float64, micro_batch=16))
    eager = made(case, partial(case.loop, Variant()), exact, None)
    assert eager.errors["loss"] < (1e-2 if setting.precision == "fp32" else 0.1)
    steps = max(1, round(BLOCK_SECONDS / eager.seconds(2)))
    references = {name: partial(case.loop, variant) for name, variant in BEST.items()}
    ours = {
        "eager": partial(case.fastcm, compile=False),
        "compiled": partial(case.fastcm, compile=True),
    }
    # forward derivatives within a loss
    hard = setting.method == "MeanFlow"
    best_is, best, best_ms = fastest(case, references, exact, eager, steps, may_fail=hard)
    ours_is, ours_column, ours_ms = fastest(case, ours, exact, eager, steps)
    columns = {"eager": eager, "best": best, "fastcm": ours_column}
    columns["fastcm eager"] = (
        ours_column if ours_is == "eager" else made(case, ours["eager"], exact, eager.errors)
    )
    timers = {n: partial(c.seconds, steps) for n, c in columns.items()}
    samples = interleaved(timers, ROUNDS)
    ms = {n: 1e3 * statistics.median(times) for n, times in samples.items()}
    row: dict[str, Any] = {
        "network": setting.network,
        "parameters": sum(p.numel() for p in case.net.parameters()),
        "method": setting.method,
        "batch": setting.batch,
        "precision": setting.precision,
        "shape": list(case.data.shape[1:]),
        "chosen": {"best": best_is, "fastcm": ours_is},
        "candidates_ms": {"best": best_ms, "fastcm": ours_ms},
        "ms": ms,
        "img_s": {n: 1e3 * setting.batch / t for n, t in ms.items()},
        "steps": steps,
        "errors": {n: c.errors for n, c in columns.items()},
        **ratios(samples, ("eager", "fastcm"), ("best", "fastcm"), ("eager", "fastcm eager")),
    }
    if CUDA:
        host = interleaved({n: c.host_seconds for n, c in columns.items()}, ROUNDS)
        row["host_ms"] = {n: 1e3 * statistics.median(times) for n, times in host.items()}
        row["peak_mib"] = {n: c.peak_bytes / 2**20 for n, c in columns.items()}
    return row, ours_column


@pytest.mark.parametrize("setting", settings(), ids=lambda s: s.id)
def test_step(setting: Setting, report: Report, benchmark: Any) -> None:
    torch._dynamo.reset()
    row, column = measure(setting)
    benchmark.pedantic(column.fit, args=(row["steps"],), rounds=1)
    report.add(row)
    shown = "  ".join(f"{k} {v:.2f}" for k, v in row.items() if k.endswith("/fastcm"))
    print(f"\n{setting.id}: {row['ms']['fastcm']:.2f} ms  {shown}  {row['chosen']}")


@pytest.mark.skipif(not CUDA, reason="only a GPU can be waited for")
@pytest.mark.parametrize("method", ["CT", "CD"])
def test_no_step_waits_for_the_gpu(method: str) -> None:
    """Between what `fit` reads: the losses it reports, and every 20 steps whether all is finite."""
    watched = range(42, 58)  # after WARM_STEPS, between two of the checks

    def watch(trainer: fastcm.Trainer, event: str) -> None:
        if event == "step":
            mode = "error" if trainer.step in watched else "default"
            torch.cuda.set_sync_debug_mode(mode)

    case = build(Setting("UNet-S", method, LAUNCH_BOUND, "bf16"))
    try:
        case.trainer(compile=False, callbacks=[watch]).fit(watched.stop + 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
