"""What parallel="ddp" costs one process: ``python -m pytest -s benchmarks/test_parallel.py``.

Columns: `alone`, a Trainer; `ddp`, the same in a process group of one, which waits for nobody.
Before any clock starts both must have the same bits. Rows go to results/parallel_{cpu,gpu}.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist

import fastcm
from benchmarks.harness import Report, interleaved, ratios
from benchmarks.step_cases import DEVICE, SUBJECTS, Subject

ROUNDS = 15
BLOCK_SECONDS = 0.3
WARM_STEPS = 3


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
        **ratios(samples, ("ddp", "alone")),
    }
    print(row)
    report.add(row)
