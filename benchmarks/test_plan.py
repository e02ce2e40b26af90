"""What is planned beside what is measured: ``python -m pytest -s benchmarks/test_plan.py``.

A step of CT on a CPU, in 1, 2 and 4 processes of one thread each. The same processes measure the
ceilings between blocks of steps; of both the best round counts, which others on the machine disturb
least. Parameters, optimizer state and averages must have the predicted sizes to the byte, or there
is no row. Rows go to results/plan_cpu.json, the poor predictions too; NOTE in the environment is
written into each.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastcm
from benchmarks.harness import Report
from benchmarks.memory import forget, memory, state_bytes
from benchmarks.processes import together
from benchmarks.step_cases import LATENTS, SUBJECTS, Subject
from fastcm import planning
from fastcm.networks import MLP, DiT

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="it is of CPU processes")

ROUNDS = 5
BLOCK_SECONDS = 0.5
CASES: dict[str, Subject] = {
    **SUBJECTS,
    "MLP 1024x8": Subject(lambda: MLP((1, 8, 8), 1024, 8), (1, 8, 8), 1797, (256,)),
    "DiT 256x4": Subject(
        lambda: DiT(4, 32, width=256, depth=4, num_heads=4), LATENTS, 256, (16,), pixels=False
    ),
    "DiT 384x12": Subject(lambda: DiT(4, 32), LATENTS, 64, (8,), pixels=False),
}
SETTINGS = [
    *((name, 1) for name in CASES),
    *((name, 2) for name in ("MLP", "UNet-S", "DiT-tiny", "DiT 256x4")),
    ("DiT-tiny", 4),
]


class Timed:
    """A function and the seconds of its calls."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function, self.taken = function, []  # type: ignore[var-annotated]

    def __call__(self) -> None:
        start = time.perf_counter()
        self.function()
        self.taken.append(time.perf_counter() - start)


def work(rank: int, world: int, name: str) -> dict[str, Any]:
    """One row, in each of its processes."""
    subject = CASES[name]
    batch = subject.batches[0]
    parallel: Any = "ddp" if world > 1 else None
    quiet: dict[str, Any] = {"compile": False, "progress": False, "log": lambda line: None}
    torch.manual_seed(0)
    small = MLP((4,), 8, 1)  # what a first step loads is nobody's prediction
    fastcm.Trainer(
        small,
        fastcm.ConsistencyTraining(),
        data=torch.randn(8, 4),
        batch_size=8,
        parallel=parallel,
        **quiet,
    ).fit(1)
    before = memory("VmRSS")
    torch.manual_seed(0)
    net: nn.Module = subject.make()
    objective = fastcm.ConsistencyTraining()
    trainer = fastcm.Trainer(
        net,
        objective,
        data=subject.data(),
        batch_size=batch,
        log_every=2**31,
        parallel=parallel,
        **quiet,
    )
    forget()
    trainer.fit(3)
    most = memory("VmHWM") - before - trainer.source.dataset.x.nbytes  # type: ignore[attr-defined]
    sweep = Timed(trainer.update.step)
    trainer.update.step = sweep  # type: ignore[method-assign]
    start = time.perf_counter()
    trainer.fit(2)
    steps = torch.tensor(max(2, round(BLOCK_SECONDS / ((time.perf_counter() - start) / 2))))
    dist.broadcast(steps, 0)
    rates, blocks, sweeps = [], [], []
    for _ in range(ROUNDS):
        dist.barrier()
        rates.append(planning.measure("cpu"))
        sweep.taken.clear()
        dist.barrier()
        start = time.perf_counter()
        trainer.fit(int(steps))
        blocks.append((time.perf_counter() - start) / int(steps))
        sweeps.append(statistics.median(sweep.taken))
    best = {
        name: max((getattr(rate, name) or 0.0) for rate in rates) or None
        for name in ("tflops", "bandwidth", "interconnect")
    }
    made = planning.plan(
        net,
        objective,
        shape=subject.shape,
        batch=batch,
        gpus=world,
        parallel=parallel,
        data_dtype=torch.uint8 if subject.pixels else torch.float32,
        # the host and the device are one: what is gathered is copied within its memory
        ceilings=planning.Ceilings(**best, upload=best["bandwidth"]),
        device_type="cpu",
    )
    wanted = made.memory["whole"][False]
    assert state_bytes(trainer) == {
        k: wanted[k] for k in ("parameters", "moments", "averages", "teacher")
    }
    predicted = {part.name: 1e3 * (part.seconds or 0.0) for part in made.parts}
    return {
        "parameters": made.parameters,
        "batch": batch,
        "ceilings": best,
        "predicted parts ms": predicted,
        "predicted ms": 1e3 * made.seconds,
        "measured ms": 1e3 * min(blocks),
        "measured ms, median": 1e3 * statistics.median(blocks),
        "predicted sweep ms": predicted["clip, Adam, averages"],
        "measured sweep ms": 1e3 * min(sweeps),
        "predicted bytes": made.peak,
        "measured bytes": most,
    }


@pytest.mark.parametrize("network, processes", SETTINGS)
def test_plan(network: str, processes: int, report: Report) -> None:
    load = os.getloadavg()[0]
    found = together(work, processes, network)
    row = {"network": network, "processes": processes, **found, "load before": load}
    for what in ("ms", "sweep ms", "bytes"):
        row[f"predicted/measured {what}"] = row[f"predicted {what}"] / row[f"measured {what}"]
    if "NOTE" in os.environ:
        row["note"] = os.environ["NOTE"]
    print(row)
    report.add(row)
