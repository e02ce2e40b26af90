"""Sampling: ``python -m pytest -s benchmarks/test_sampling.py``.

Columns, each with the network as it is and under torch.compile: `bare`, the network calls alone (on
a GPU replayed as a CUDA graph); `eager` and `compiled`, a plain PyTorch loop; `fastcm` and `fastcm
compiled`, a Sampler. Before any clock starts, loop and samplers are compared with the same loop in
float64 on the same noise. Rows go to results/sampling_{cpu,gpu}.json as they come.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcm
from benchmarks.harness import ATOL, QUICK, Report, captured, interleaved, ratios
from benchmarks.step_cases import CUDA, DEVICE, SUBJECTS, synchronize
from fastcm import rng
from fastcm.ops import reference

LATENCY, THROUGHPUT = (1, 8, 64), 512
SETTINGS = [(steps, batch) for steps in (1, 4) for batch in LATENCY] + [(1, THROUGHPUT)]
ROUNDS = 61
SECONDS = 0.2 if QUICK else 0.03
"""Of a block: as many calls of one column as fit. A round is over before the machine is another;
a quick look has few rounds, and longer ones."""
PATIENCE = 5.0
"""Seconds for the rounds of one column, of which there are three at least."""


def times_of(steps: int) -> list[float]:
    return [1 - k / steps for k in range(steps)]


@torch.no_grad()
def plain_loop(
    net: Callable[[Tensor, Tensor], Tensor],
    shape: Sequence[int],
    steps: int,
    noise: Sequence[Tensor] | None = None,
) -> Tensor:
    """Multi-step sampling on the rectified-flow path, as a good engineer writes it.

    Source: Song et al. 2023, algorithm 1, for x_t = (1 - t) x0 + t z and velocity v: f = x - t v.
    """
    x = torch.randn(shape, device=DEVICE) if noise is None else noise[0]
    times = times_of(steps)
    for k, t in enumerate(times):
        x0 = x - t * net(x, torch.full((len(x),), t, device=DEVICE, dtype=x.dtype))
        if k + 1 < steps:
            z = torch.randn_like(x) if noise is None else noise[k + 1]
            s = times[k + 1]
            x = (1 - s) * x0 + s * z
    return x0


@torch.no_grad()
def bare_calls(net: nn.Module, shape: Sequence[int], steps: int) -> Callable[[], object]:
    """`steps` calls of the network, which no sampler can do without."""
    x = torch.randn(*shape, device=DEVICE)
    times = [torch.full((len(x),), t, device=DEVICE) for t in times_of(steps)]

    @torch.no_grad()
    def calls() -> Tensor:
        for t in times:
            out: Tensor = net(x, t)
        return out

    return captured(calls).replay if CUDA else calls


def noise_of(shape: Sequence[int], steps: int, dtype: torch.dtype) -> list[Tensor]:
    """The sampler's noise of seed 0: what it starts from, and what it adds."""
    key = fastcm.NoiseKey(0, device=DEVICE)
    return [
        reference.noise(shape, key, stream=rng.SAMPLE + j, dtype=torch.float64).to(dtype)
        for j in range(steps)
    ]


def check(name: str, found: Tensor, plain: Tensor, exact: Tensor) -> float:
    """The relative error of samples; raises AssertionError if they are others."""
    scale = exact.abs().max()
    error, theirs = (((x - exact).abs().max() / scale).item() for x in (found, plain))
    limit = 2 * theirs + (1e-3 if CUDA else ATOL)  # fused matrix products of a GPU may be TF32
    assert error <= limit, f"{name} is off by {error:.3g}, allowed are {limit:.3g}"
    return error


def timer(call: Callable[[], object]) -> Callable[[], float]:
    """Seconds of one call, of a block of them that ends with the device idle."""

    def block(calls: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
            synchronize()
        return (time.perf_counter() - start) / calls

    block(1)
    calls = max(1, round(SECONDS / block(2)))
    return lambda: block(calls)


def measure(network: str, net: nn.Module, steps: int, batch: int) -> dict[str, Any]:
    shape = (batch, *SUBJECTS[network].shape)
    compiled = torch.compile(net)
    samplers = {
        name: fastcm.Sampler(
            net, fastcm.Linear(), steps=steps, shape=shape[1:], batch_size=batch, compile=compile
        )
        for name, compile in (("fastcm", False), ("fastcm compiled", True))
    }
    columns: dict[str, Callable[[], object]] = {
        "bare": bare_calls(net, shape, steps),
        "eager": lambda: plain_loop(net, shape, steps),
        "compiled": lambda: plain_loop(compiled, shape, steps),
        **{name: lambda s=s: s(batch) for name, s in samplers.items()},
    }
    noise = noise_of(shape, steps, torch.float32)
    plain = plain_loop(net, shape, steps, noise)
    exact = plain_loop(
        copy.deepcopy(net).double(), shape, steps, noise_of(shape, steps, torch.float64)
    )
    found = {"compiled": plain_loop(compiled, shape, steps, noise)}
    for name, s in samplers.items():
        found[name] = s.prepare(batch)(batch)
    where = f"{network}, {steps} steps, batch {batch}"
    errors = {k: check(f"{where}: {k}", x, plain, exact) for k, x in found.items()}
    timers = {n: timer(c) for n, c in columns.items()}
    rounds = min(ROUNDS, max(3, round(PATIENCE / timers["bare"]())))
    samples = interleaved(timers, rounds)
    ms = {n: 1e3 * statistics.median(times) for n, times in samples.items()}
    return {
        "network": network,
        "parameters": sum(p.numel() for p in net.parameters()),
        "shape": list(shape[1:]),
        "steps": steps,
        "batch": batch,
        "ms": ms,
        "img_s": {n: 1e3 * batch / t for n, t in ms.items()},
        "errors": errors,
        **ratios(samples, ("fastcm", "bare"), ("eager", "fastcm"), ("compiled", "fastcm compiled")),
    }


@pytest.mark.parametrize(("steps", "batch"), SETTINGS)
@pytest.mark.parametrize("network", SUBJECTS)
def test_sampling(network: str, steps: int, batch: int, report: Report, benchmark: Any) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = SUBJECTS[network].make().to(DEVICE).eval()
    for p in net.parameters():
        if not p.any():  # layers that start at zero would hide the others from the check
            nn.init.normal_(p, std=0.02)
    row = measure(network, net, steps, batch)
    report.add(row)
    shown = "  ".join(f"{k} {v:.3f}" for k, v in row.items() if "/" in k)
    print(f"\n{network} {steps} x {batch}: {row['ms']['fastcm']:.2f} ms  {shown}")
    sampler = fastcm.Sampler(net, fastcm.Linear(), shape=SUBJECTS[network].shape)
    benchmark.pedantic(sampler, args=(1,), rounds=1)
