"""Rows a second out of shards: ``python -m pytest -s benchmarks/test_data.py``.

Columns draw the same uint8 images: `memory` by `DeviceData`; `shards` of .npz files, whose pages
the system may hold in memory; `rows` of a data set of torch that indexes a tensor, row by row.
Before any clock starts each draws the rows that the others do. What a batch costs is then compared
with a step of the step benchmark's UNet. Rows go to results/data_{cpu,gpu}.json.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import fastcm
from benchmarks.harness import Report, interleaved, median_ratio
from benchmarks.step_cases import CUDA, DEVICE, IMAGES, SUBJECTS
from fastcm.data import Rows, as_source, write_shards
from fastcm.data.shards import shards

ROUNDS = 15
ROWS = 50_000
"""As many as CIFAR-10's."""
SHARD = 2_048
WINDOW = 4
BATCHES = (16, 256)
STEP_ROUNDS = 7


class Indexed(Dataset[Tensor]):
    """Its rows are views of one tensor."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> Tensor:
        return self.x[row]


def timer(source: Any, batch: int) -> Callable[[], float]:
    """Seconds of one batch, the mean over as many rows as a window has: one is read meanwhile."""
    steps, count = itertools.count(), WINDOW * SHARD // batch

    def seconds() -> float:
        start = time.perf_counter()
        for step in itertools.islice(steps, count):
            source.draw(step, batch)
        if CUDA:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    seconds()
    return seconds


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(256, (ROWS, *IMAGES), dtype=torch.uint8)


@pytest.fixture(scope="module")
def folder(images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shards")
    write_shards(made, [images], rows=SHARD)
    return made


@pytest.mark.parametrize("batch", BATCHES)
def test_data(batch: int, images: Tensor, folder: Path, report: Report) -> None:
    given = {
        "memory": images,
        "shards": shards(folder, window=WINDOW),
        "rows": Rows(Indexed(images)),
    }
    sources = {name: as_source(data, seed=0, device=DEVICE) for name, data in given.items()}
    whole = as_source(shards(folder, window=ROWS), seed=0, device=DEVICE)
    for step in (0, 7, ROWS // batch):
        expected, _ = sources["memory"].draw(step, batch)
        for source in (whole, sources["rows"]):
            assert torch.equal(source.draw(step, batch)[0], expected)
    samples = interleaved({name: timer(s, batch) for name, s in sources.items()}, ROUNDS)
    ms = {name: 1e3 * statistics.median(times) for name, times in samples.items()}
    row = {
        "shape": list(IMAGES),
        "rows": ROWS,
        "shard": SHARD,
        "window": WINDOW,
        "batch": batch,
        "ms": ms,
        "rows_s": {name: 1e3 * batch / each for name, each in ms.items()},
        "shards/memory": median_ratio(samples, "shards", "memory"),
        "rows/memory": median_ratio(samples, "rows", "memory"),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
    print(f"\nbatch {batch}: {row['rows_s']}")
    report.add(row)


def test_step_on_shards(images: Tensor, folder: Path, report: Report) -> None:
    """A step of consistency training of the small UNet, from memory and from shards."""
    batch = SUBJECTS["UNet-S"].batches[0]

    def trainer(data: Any) -> fastcm.Trainer:
        torch.manual_seed(0)
        return fastcm.Trainer(
            SUBJECTS["UNet-S"].make().to(DEVICE),
            fastcm.ConsistencyTraining(),
            data=data,
            batch_size=batch,
            compile=False,
            progress=False,
        )

    whole = trainer(shards(folder, window=ROWS)).fit(2)
    trainers = {"memory": trainer(images), "shards": trainer(shards(folder, window=WINDOW))}
    trainers["memory"].fit(2)
    for a, b in zip(whole.net.parameters(), trainers["memory"].net.parameters(), strict=True):
        assert torch.equal(a, b)
    trainers["shards"].fit(2)

    def seconds(name: str) -> float:
        start = time.perf_counter()
        trainers[name].fit(2)
        return (time.perf_counter() - start) / 2

    drawn = timer(as_source(shards(folder, window=WINDOW), seed=1, device=DEVICE), batch)
    timers = {name: (lambda name=name: seconds(name)) for name in trainers} | {"draw": drawn}
    samples = interleaved(timers, STEP_ROUNDS)
    row = {
        "network": "UNet-S",
        "batch": batch,
        "ms": {name: 1e3 * statistics.median(times) for name, times in samples.items()},
        "shards/memory": median_ratio(samples, "shards", "memory"),
        "draw/step": median_ratio(samples, "draw", "memory"),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
    print(f"\nstep: {row['ms']}  draw/step {row['draw/step']:.4f}")
    report.add(row)
