"""What a step moves around the network on a GPU, counted at the launchers of the kernels.

The least that it can move, in bytes for each element of x, F32 or BF16 the dtype of the network and
uint8 the data: flow reads x0 and writes x_t, reads F and x0 and writes dF; consistency training has
two of the first and reads two F; distillation has the teacher's step between them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcm import EasyConsistency, FlowMatching, Parameterization, Stepwise, losses
from fastcm.objectives import Batch, ConsistencyDistillation, ConsistencyTraining, base
from fastcm.ops import registered
from fastcm.paths import TrigFlow, VariancePreserving
from fastcm.rng import NoiseKey
from fastcm.training import gradients

B, SHAPE = 4, (3, 8, 8)
ELEMENTS = B * 3 * 8 * 8
F32, BF16 = torch.float32, torch.bfloat16


class Net(nn.Module):
    """Answers in the dtype that it is asked in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return (self.weight * x).to(x.dtype)


class Counted:
    """A kernel that tells which tensors of the size of the batch it is launched with."""

    moved: dict[str, float]

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            tensors = {t.data_ptr(): t for t in args if isinstance(t, Tensor)}
            size = sum(t.numel() * t.element_size() for t in tensors.values() if t.dim() > 1)
            name = self._kernel.__name__
            Counted.moved[name] = Counted.moved.get(name, 0) + size / ELEMENTS
            self._kernel[grid](*args, **options)

        return launch


@pytest.mark.parametrize(
    ("method", "dtype", "budget"),
    [
        ("flow", F32, {"noising_kernel": 1 + 4, "loss_kernel": 4 + 1 + 4}),
        ("flow", BF16, {"noising_kernel": 1 + 2, "loss_kernel": 2 + 1 + 2}),
        ("ct", F32, {"noising_kernel": 1 + 8, "loss_kernel": 8 + 1 + 4}),
        ("ct", BF16, {"noising_kernel": 1 + 4, "loss_kernel": 4 + 1 + 2}),
        (
            "cd",
            F32,
            {"noising_kernel": 1 + 4, "euler_kernel": 1 + 4 + 4 + 4, "loss_kernel": 9 + 4 + 4},
        ),
        (
            "cd",
            BF16,
            {"noising_kernel": 1 + 2, "euler_kernel": 1 + 2 + 4 + 2, "loss_kernel": 5 + 4 + 2},
        ),
    ],
)
def test_a_step_moves_no_byte_too_many(
    method: str,
    dtype: torch.dtype,
    budget: dict[str, float],
    kernels: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective: Any = {
        "flow": FlowMatching(),
        "ct": ConsistencyTraining(metric=losses.PseudoHuber()),
        "cd": ConsistencyDistillation(Net()),
    }[method]
    net = Net()
    batch = Batch(
        torch.randint(256, (B, *SHAPE), dtype=torch.uint8), NoiseKey(0), input_dtype=dtype
    )
    Counted.moved = {}
    monkeypatch.setattr(registered, "wrap_triton", Counted)
    loss = objective.loss(net, batch, Net())
    loss.backward()
    assert net.weight.grad is not None
    Counted.moved.pop("uniform_kernel")
    # coefficients, of which there are a few for each sample, are rounded away
    assert {name: round(size) for name, size in Counted.moved.items()} == budget


METHODS: dict[str, Any] = {
    "flow": FlowMatching(),
    "flow, eps": FlowMatching(Parameterization(VariancePreserving(), "eps")),
    "ct": ConsistencyTraining(),
    "ict": ConsistencyTraining.improved(8, s0=2, s1=16),
    "ect": EasyConsistency(double_every=2),
    "stepwise": Stepwise(2, phases=3),
    "cd": ConsistencyDistillation(Net(), guidance=2.0, null_condition=3),
    "cd, ddim": ConsistencyDistillation(
        Net(), guidance=(1.0, 3.0), null_condition=3, solver="ddim", skip=2
    ),
    "cd, heun": ConsistencyDistillation(Net(), Parameterization(TrigFlow()), solver="heun"),
}


@pytest.mark.parametrize("method", METHODS)
def test_times_and_coefficients_are_one_graph_for_all_steps(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()  # it keeps a few compilations of one function, for a few methods
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def fuser() -> Any:
        return torch.compile(lambda make, *rest: make(*rest), backend=backend, fullgraph=True)

    monkeypatch.setattr(base, "_fuser", functools.cache(fuser))
    for step in range(4):
        batch = Batch(torch.randn(B, *SHAPE), NoiseKey(1, step), torch.arange(B) % 3)
        expected = METHODS[method].loss(Net(), batch, Net()).per_sample
        found = METHODS[method].loss(Net(), replace(batch, fuse=True), Net()).per_sample
        torch.testing.assert_close(found, expected)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("compile", "remaining", "fused"),
    [
        ("auto", 10_000, True),
        ("regional", 10_000, True),
        ("auto", 100, False),
        (False, 10_000, False),
    ],
)
def test_times_and_coefficients_are_compiled_where_that_pays(
    compile: Any, remaining: int, fused: bool, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def fuser() -> Any:
        return lambda make, *rest: calls.append(make) or make(*rest)

    monkeypatch.setattr(base, "_fuser", fuser)
    monkeypatch.setattr(gradients, "door", base.door)
    monkeypatch.setattr(gradients, "_WORTH_COMPILING_S", math.inf)
    g = gradients.Gradients(Net(), ConsistencyTraining(), Net(), compile=compile)
    g(torch.randn(B, *SHAPE), None, NoiseKey(0), remaining=remaining)
    assert bool(calls) is fused


def test_nothing_is_compiled_beside_what_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_fuser", lambda: pytest.fail("compiled"))
    g = gradients.Gradients(Net(), ConsistencyTraining(), Net(), compile="regional")
    g(torch.randn(B, *SHAPE), None, NoiseKey(0), remaining=10**6)
