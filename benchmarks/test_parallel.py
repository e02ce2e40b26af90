"""What parallel="ddp" costs and gains: ``python -m pytest -s benchmarks/test_parallel.py``.

Columns: `alone`, a Trainer; `ddp`, the same in a process group of one, which waits for nobody.
Before any clock starts both must have the same bits. The scaling rows are of two processes of one
thread each on a CPU, on the same whole batch: `one`, a Trainer in the first while the second waits,
and `two`, both; the weights must agree to rounding, and the best of the rounds counts. Rows go to
results/parallel_{cpu,gpu}.json.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fastcm
from benchmarks.harness import Report, interleaved, median_ratio
from benchmarks.processes import together
from benchmarks.step_cases import DEVICE, LATENTS, SUBJECTS, Subject
from fastcm.networks import DiT

ROUNDS = 15
BLOCK_SECONDS = 0.3
WARM_STEPS = 3
SCALING_ROUNDS = 7
SCALED: dict[str, Subject] = {
    **SUBJECTS,
    "DiT 256x4": Subject(
        lambda: DiT(4, 32, width=256, depth=4, num_heads=4), LATENTS, 256, (8,), pixels=False
    ),
}
"""Among them compute-bound ones, whose products take nearly all of a step."""


@pytest.fixture(scope="module")
def group_of_one() -> Iterator[None]:
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo",
        store=dist.HashStore(),
        rank=0,
        world_size=1,
    )
    yield
    dist.destroy_process_group()


def trainer(subject: Subject, batch: int, parallel: str | None) -> fastcm.Trainer:
    """A training of CT as in test_step.py, launched, in a long run as far as it knows."""
    torch.manual_seed(0)
    net, data = subject.make().to(DEVICE), subject.data()
    return fastcm.Trainer(
        net,
        fastcm.ConsistencyTraining(),
        data=data,
        batch_size=batch,
        compile=False,
        graph="off",
        progress=False,
        parallel=parallel,  # type: ignore[arg-type]
    )


def seconds(trainer: fastcm.Trainer, steps: int) -> float:
    """A step of `fit`, with what it asks the other processes."""
    start = time.perf_counter()
    trainer.fit(steps)
    return (time.perf_counter() - start) / steps


@pytest.mark.parametrize("network", SUBJECTS)
def test_parallel(network: str, report: Report, group_of_one: None) -> None:
    subject = SUBJECTS[network]
    batch = subject.batches[0]
    alone, ddp = (trainer(subject, batch, parallel).fit(WARM_STEPS) for parallel in (None, "ddp"))
    for a, b in zip(alone.net.parameters(), ddp.net.parameters(), strict=True):
        assert torch.equal(a, b)
    steps = max(2, round(BLOCK_SECONDS / seconds(alone, 2)))
    timers = {"alone": partial(seconds, alone, steps), "ddp": partial(seconds, ddp, steps)}
    samples = interleaved(timers, ROUNDS)
    row = {
        "network": network,
        "parameters": sum(p.numel() for p in alone.net.parameters()),
        "batch": batch,
        "ms": {name: 1e3 * statistics.median(times) for name, times in samples.items()},
        "ddp/alone": median_ratio(samples, "ddp", "alone"),
    }
    print(row)
    report.add(row)


def scaled(rank: int, world: int, network: str) -> dict[str, Any]:
    """Times of a step in one process and in all, in turns."""
    subject = SCALED[network]
    batch = subject.batches[0]
    shared = trainer(subject, batch, "ddp").fit(WARM_STEPS)
    steps = max(2, round(2 * BLOCK_SECONDS / seconds(shared, 2)))
    told = torch.tensor(steps)
    dist.broadcast(told, 0)
    steps, timers = int(told), {"two": partial(_after_barrier, shared, steps)}
    if rank == 0:
        alone = trainer(subject, batch, None).fit(WARM_STEPS + 2)
        pairs = list(zip(alone.net.parameters(), shared.net.parameters(), strict=True))
        off = sum((a - b).double().square().sum() for a, b in pairs) ** 0.5
        assert off <= 1e-5 * sum(a.double().square().sum() for a, _ in pairs) ** 0.5
        timers["one"] = partial(_after_barrier, alone, steps)
    else:
        timers["one"] = _waiting
    samples = interleaved(timers, SCALING_ROUNDS)
    best = {name: 1e3 * min(times) for name, times in samples.items()}
    return {
        "parameters": sum(p.numel() for p in shared.net.parameters()),
        "batch": batch,
        "ms": best,  # what else runs on the machine takes a core from two, and none from one
        "one/two": best["one"] / best["two"],
        "one/two, median of rounds": median_ratio(samples, "one", "two") if rank == 0 else None,
    }


def _after_barrier(trainer: fastcm.Trainer, steps: int) -> float:
    dist.barrier()
    return seconds(trainer, steps)


def _waiting() -> float:
    dist.barrier()
    return float("inf")


@pytest.mark.skipif(DEVICE.type == "cuda", reason="it is of CPU processes")
@pytest.mark.parametrize("network", SCALED)
def test_scaling(network: str, report: Report) -> None:
    row = {"network": network, "processes": 2, **together(scaled, 2, network)}
    if "NOTE" in os.environ:
        row["note"] = os.environ["NOTE"]
    print(row)
    report.add(row)
