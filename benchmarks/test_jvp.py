"""Steps with a derivative along the trajectory: ``python -m pytest -s benchmarks/test_jvp.py``.

One Trainer, four ways to value and tangent: `two passes`, torch.func.jvp without gradient and a
second forward pass with it, as most public code does; `one jvp`, torch.func.jvp inside the loss;
`fastcm`, `fastcm.jvp.jvp`; and `flow`, a step of plain flow matching, for scale. Each compiled or
not, whichever is faster; what torch cannot compile is taken as it is. Rows of MeanFlow with s = t:
the others derive them, too, as public code does. The first steps of all must agree before a clock
starts. Rows go to results/jvp_{cpu,gpu}.json as they come.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastcm
from benchmarks.harness import Report, interleaved, ratios
from benchmarks.step_cases import CUDA, DEVICE, SUBJECTS, Subject, forget_failure
from fastcm import ContinuousConsistency, FlowMatching, MeanFlow, losses
from fastcm.networks import MLP, DiT, UNet
from fastcm.objectives import Batch, continuous_consistency, mean_flow

ROUNDS = 15 if CUDA else 7
CHOOSING = 5
CHECKED = 3
BLOCK_SECONDS = 0.3
MLP_PARAMETERS = {"width": 512, "depth": 4}


def two_passes(fn: Any, primals: Any, tangents: Any) -> tuple[Tensor, Tensor]:
    """As rCM, FastGen and Sana have it."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(fn, primals, tangents)[:2]
    return fn(*primals), tangent


def one_jvp(fn: Any, primals: Any, tangents: Any) -> tuple[Tensor, Tensor]:
    """As py-meanflow has it."""
    with sdpa_kernel(SDPBackend.MATH):
        out, tangent = torch.func.jvp(fn, primals, tangents)[:2]
    return out, tangent.detach()


WAYS = {"fastcm": fastcm.jvp.jvp, "two passes": two_passes, "one jvp": one_jvp}


@contextmanager
def way(name: str) -> Iterator[None]:
    """The objectives derive like this."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (mean_flow, continuous_consistency):
            patch.setattr(module, "jvp", WAYS.get(name, fastcm.jvp.jvp))
        yield


class EveryRow(MeanFlow):
    """Rows with s = t go through the derivative with all others; the loss is the same."""

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return MeanFlow().draw(batch)


METHODS: dict[str, Callable[[str], Any]] = {
    "MeanFlow": lambda name: MeanFlow() if name == "fastcm" else EveryRow(instant=0.0),
    "MeanFlow, no s = t": lambda name: MeanFlow(instant=0.0),
    "sCT": lambda name: ContinuousConsistency(warmup=100, weight=losses.uniform),
}
NETWORKS: dict[str, tuple[Callable[[], torch.nn.Module], str, int]] = {
    "MLP": (lambda: MLP((1, 8, 8), two_times=True, **MLP_PARAMETERS), "MLP", 256),
    "DiT-tiny": (
        lambda: DiT(4, 32, width=128, depth=4, num_heads=4, two_times=True),
        "DiT-tiny",
        16,
    ),
    "UNet-S": (lambda: UNet(3, 32, (1, 2), num_res_blocks=1, two_times=True), "UNet-S", 16),
}
if CUDA:
    NETWORKS = {
        "MLP": (NETWORKS["MLP"][0], "MLP", 256),
        "DiT-S/2": (lambda: DiT(4, 32, two_times=True), "DiT-S/2", 32),
        "DiT-B/2": (
            lambda: DiT(4, 32, width=768, num_heads=12, two_times=True),
            "DiT-B/2",
            64,
        ),
    }


@dataclass
class Column:
    """A trainer that derives in one way."""

    name: str
    trainer: fastcm.Trainer

    def losses(self, steps: int) -> list[float]:
        with way(self.name):
            return [float(self.trainer.train_step()) for _ in range(steps)]

    def seconds(self, steps: int) -> float:
        with way(self.name):
            start = time.perf_counter()
            for _ in range(steps):
                loss = self.trainer.train_step()
            float(loss)
            return (time.perf_counter() - start) / steps


def column(name: str, network: str, method: str, precision: str, compile: bool) -> Column:
    make, subject, batch = NETWORKS[network]
    known: Subject | None = SUBJECTS.get(subject)
    assert known is not None
    torch.manual_seed(0)
    net = make()
    for p in net.parameters():  # zeros would hide what a derivative of them costs to get wrong
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(1024, *known.shape, generator=generator)
    objective = FlowMatching() if name == "flow" else METHODS[method](name)
    trainer = fastcm.Trainer(
        net.to(DEVICE),
        objective,
        data=data,
        batch_size=batch,
        precision=precision,  # type: ignore[arg-type]
        compile=compile,
        progress=False,
        log=lambda line: None,
    )
    return Column(name, trainer)


def faster(
    name: str, network: str, method: str, precision: str, want: list[float] | None
) -> tuple[str, Column, dict[str, Any], list[float]]:
    """The column, compiled or not, with the time of both and its first losses."""
    found: dict[str, Column] = {}
    ms: dict[str, Any] = {}
    first: list[float] = []
    for kind in ("eager", "compiled"):
        try:
            made = column(name, network, method, precision, kind == "compiled")
            seen = made.losses(CHECKED)
        except Exception as error:
            if name == "fastcm" or kind == "eager":
                raise
            ms[kind] = f"{type(error).__name__}"
        if kind in ms:
            forget_failure()
            continue
        first = first or seen
        expected = want or first
        worst = max(abs(a / b - 1) for a, b in zip(seen, expected, strict=True))
        limit = 1e-3 if precision == "fp32" else 0.1
        assert name == "flow" or worst < limit, f"{name} {kind} is off by {worst:.3g}"
        found[kind] = made
    steps = max(1, round(BLOCK_SECONDS / found["eager"].seconds(2)))
    times = {k: [c.seconds(steps) for _ in range(CHOOSING)] for k, c in found.items()}
    ms |= {k: 1e3 * min(v) for k, v in times.items()}
    chosen = min(found, key=lambda k: ms[k])
    return chosen, found[chosen], ms, first


def cases() -> list[tuple[str, str, str]]:
    rows = [(n, m, "fp32") for n in NETWORKS for m in METHODS]
    return [*rows, ("DiT-B/2", "MeanFlow", "bf16")] if CUDA else rows


@pytest.mark.parametrize(("network", "method", "precision"), cases())
def test_step(network: str, method: str, precision: str, report: Report) -> None:
    torch._dynamo.reset()
    columns, chosen, candidates = {}, {}, {}
    want: list[float] | None = None
    for name in ("flow", *WAYS):
        kind, columns[name], candidates[name], first = faster(
            name, network, method, precision, want
        )
        chosen[name] = kind
        want = want or (first if name == "fastcm" else None)
    steps = max(1, round(BLOCK_SECONDS / columns["fastcm"].seconds(2)))
    timers = {n: (lambda c=c: c.seconds(steps)) for n, c in columns.items()}
    samples = interleaved(timers, ROUNDS)
    row = {
        "network": network,
        "parameters": sum(p.numel() for p in columns["fastcm"].trainer.net.parameters()),
        "method": method,
        "batch": NETWORKS[network][2],
        "precision": precision,
        "chosen": chosen,
        "candidates_ms": candidates,
        "ms": {n: 1e3 * statistics.median(times) for n, times in samples.items()},
        **ratios(samples, ("two passes", "fastcm"), ("one jvp", "fastcm"), ("fastcm", "flow")),
    }
    report.add(row)
    print(f"\n{row}")
