"""FLOPs against sums by hand, calls of networks by method, activations against a real step's."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastcm import (
    ConsistencyDistillation,
    ConsistencyTraining,
    ContinuousConsistency,
    EasyConsistency,
    FlowMatching,
    MeanFlow,
    PairDistillation,
    Shortcut,
)
from fastcm.cli.recipes import Recipe
from fastcm.cli.tables import DISTILLATIONS, METHODS, TWO_TIMES
from fastcm.networks import MLP, DiT, UNet
from fastcm.networks.blocks import repeated_blocks
from fastcm.objectives.base import Objective
from fastcm.planning import count
from fastcm.planning.counting import Counts
from fastcm.planning.ledger import AROUND

ROOT = Path(__file__).resolve().parents[2]
B = 8


def of(net: nn.Module, shape: tuple[int, ...], objective: Objective, **options: Any) -> Counts:
    return count(net, objective, torch.zeros(B, *shape), **options)


def test_flops_of_an_mlp_are_those_of_its_matrices() -> None:
    D, W, C = 64, 32, 4
    found = of(MLP((1, 8, 8), W, 2), (1, 8, 8), FlowMatching())
    first = D * W + 256 * C  # their inputs need no gradient
    rest = C * C + 2 * (C * 2 * W + W * W) + W * D
    assert found.flops("forward") == 2 * B * (first + rest)
    assert found.flops("backward") == 2 * B * (first + 2 * rest)


def test_flops_of_a_dit_are_those_of_its_blocks() -> None:
    N, W, depth = 16, 32, 3
    found = of(DiT(4, 8, width=W, depth=depth, num_heads=4), (4, 8, 8), FlowMatching())
    linear = N * (3 + 1 + 4 + 4) * W * W + 6 * W * W  # of a block: tokens, and modulation
    attention = 2 * N * N * W  # scores and values
    first = N * 16 * W + 256 * W
    rest = W * W + 2 * W * W + N * W * 16
    blocks = depth * (linear + attention)
    assert found.flops("forward") == 2 * B * (first + rest + blocks)
    # the kernel of attention computes the scores again: five products for two
    backward = first + 2 * (rest + depth * linear) + depth * attention * 5 / 2
    assert found.flops("backward") == 2 * B * backward
    assert sum(flops for flops, _ in found.work["blocks"]) == 2 * B * blocks


def test_flops_of_a_unet_are_those_that_torch_counts_in_a_real_pass() -> None:
    net = UNet(3, 16, (1, 2), num_res_blocks=1)
    found = of(net, (3, 8, 8), FlowMatching())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(torch.randn(B, 3, 8, 8), torch.rand(B))
    assert found.flops("forward") == counter.get_total_flops()


def calls(found: Counts) -> list[tuple[str, int, bool]]:
    return [(e.network, e.rows, e.differentiated) for e in found.evaluations]


def mlp(**options: Any) -> MLP:
    return MLP((4,), 16, 2, **options)


def test_methods_call_their_networks_as_often_as_they_say() -> None:
    student = ("student", B, True)
    assert calls(of(mlp(), (4,), FlowMatching())) == [student]
    assert calls(of(mlp(), (4,), ConsistencyTraining())) == [("target", B, False), student]
    own = ConsistencyTraining(target_average=None)
    assert calls(of(mlp(), (4,), own)) == [("target", B, False), student]
    cd = of(mlp(), (4,), ConsistencyDistillation(mlp()))
    assert calls(cd) == [("teacher", B, False), ("target", B, False), student]
    assert cd.flops("teacher") == cd.flops("target") == cd.flops("forward")
    heun = ConsistencyDistillation(
        mlp(num_classes=3), guidance=2.0, null_condition=3, solver="heun"
    )
    labels = torch.zeros(B, dtype=torch.int64)
    found = of(mlp(num_classes=3), (4,), heun, cond=labels)
    assert calls(found) == [("teacher", 2 * B, False)] * 2 + [("target", B, False), student]
    halves = of(mlp(two_times=True), (4,), Shortcut(every=4))
    assert calls(halves) == [("target", B // 4, False)] * 2 + [student]
    mean = of(mlp(two_times=True), (4,), MeanFlow(instant=0.75))
    assert calls(mean) == [("student", 6, True), ("student", 2, True)]
    # a derivative along the way: each matrix once more, in the rows that have one
    per_row = of(mlp(two_times=True), (4,), FlowMatching()).flops("forward") / B
    assert 7 * per_row < mean.flops("forward") <= 10 * per_row
    assert mean.flops("backward") <= of(mlp(two_times=True), (4,), FlowMatching()).flops("backward")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_derivative_along_the_way_takes_its_products_and_keeps_nothing(precision: Any) -> None:
    N, W, depth = 16, 32, 3
    options: dict[str, Any] = {"width": W, "depth": depth, "num_heads": 4}
    shape = (4, 8, 8)
    plain = of(DiT(4, 8, **options), shape, FlowMatching(), precision=precision)
    net = DiT(4, 8, log_variance=True, **options)
    found = of(net, shape, ContinuousConsistency(), precision=precision)
    product = depth * 2 * B * N * N * W  # of queries and keys, or of weights and values
    linear = plain.flops("forward") - 2 * product
    # the kernel computes all six at once; without one the scores are computed again
    attention = 6 * product if precision == "bf16" else 7 * product
    levels = 2 * B * 64  # of the log-variance
    assert found.flops("forward") == 2 * linear + attention + levels
    first = 2 * B * (N * 16 * W + 256 * W)  # whose inputs need no gradient, but have a tangent
    assert plain.flops("backward") == 2 * linear - first + 5 * product
    assert found.flops("backward") == plain.flops("backward") + levels
    assert found.activations == plain.activations
    assert found.checkpointed == plain.checkpointed
    kept = of(net, shape, ContinuousConsistency(), precision=precision, memory_only=True)
    assert (kept.activations, kept.checkpointed) == (plain.activations, plain.checkpointed)


def teach(**more: Any) -> ConsistencyDistillation:
    return ConsistencyDistillation(mlp(num_classes=3), **more)


GUIDED: dict[str, Any] = {"guidance": 2.0, "null_condition": 3}
AROUND_BY_HAND: dict[str, tuple[Callable[[], Objective], tuple[int, int, int]]] = {
    # how often an element is read or written in the size of the data, of a network's input, float32
    "flow": (FlowMatching, (2, 3, 0)),
    "ct": (ConsistencyTraining, (2, 5, 0)),
    "ect": (EasyConsistency, (2, 5, 0)),
    # x_t again for the step to x_s and to the input there
    "cd": (teach, (3, 6, 2)),
    # twice the rows out of inputs that are read twice, and the second output
    "cd, guided": (lambda: teach(**GUIDED), (3, 11, 2)),
    "cd, heun": (lambda: teach(solver="heun"), (4, 8, 6)),
    # the guided output of the second step is float32, and is read again
    "cd, heun, guided": (lambda: teach(solver="heun", **GUIDED), (4, 18, 8)),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", AROUND_BY_HAND)
def test_bytes_around_the_networks_are_those_of_the_kernels(name: str, precision: Any) -> None:
    make, (data, network, float32) = AROUND_BY_HAND[name]
    for dtype in (torch.uint8, torch.float32):
        cond = torch.zeros(B, dtype=torch.int64) if "guided" in name else None
        net = mlp(num_classes=3)
        found = count(net, make(), torch.zeros(B, 4, dtype=dtype), cond, precision=precision)
        size = 2 if precision == "bf16" else 4
        each = data * dtype.itemsize + network * size + 4 * float32
        assert found.bytes(AROUND) == B * 4 * each


def test_bytes_around_the_networks_are_the_least_that_was_recorded() -> None:
    text = (ROOT / "benchmarks/results/gpu_static.json").read_text()
    recorded = json.loads(text)["least, bytes per element outside the networks of UNet-S"]
    objectives: dict[str, Callable[[], Objective]] = {
        "flow": FlowMatching,
        "ct": ConsistencyTraining,
        "cd": lambda: ConsistencyDistillation(mlp()),
    }
    assert {name.split()[0] for name in recorded} == set(objectives)
    for name, least in recorded.items():
        method, precision = name.split()
        x0 = torch.zeros(B, 4, dtype=torch.uint8)
        found = count(mlp(), objectives[method](), x0, precision=precision)
        assert found.bytes(AROUND) == least * x0.numel()


def test_a_pair_is_mixed_in_a_pass_of_its_own() -> None:
    """The input out of data and noise; then input, output and data to the output's gradient."""
    found = of(mlp(), (2, 4), PairDistillation(), paired=True)
    assert found.work[AROUND] == [(0, passes * B * 4 * 4) for passes in (3, 4)]


class Distance(nn.Module):
    """A metric that is a network."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5), requires_grad=False)

    def forward(self, f: Tensor, target: Tensor) -> Tensor:
        return ((f - target) @ self.weight).square().sum(1)


def test_a_metric_that_is_a_network_is_counted() -> None:
    found = of(mlp(), (4,), FlowMatching(metric=Distance()))
    assert calls(found) == [("student", B, True), ("metric", B, True)]
    assert found.flops("metric") == found.flops("metric backward") == 2 * B * 4 * 5
    assert found.flops("backward") == of(mlp(), (4,), FlowMatching()).flops("backward")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_counted(method: str, precision: Any) -> None:
    options: dict[str, Any] = {"num_classes": 3, "two_times": method in TWO_TIMES}
    options |= {"guided": method == "lcm", "log_variance": method in ("sct", "scd")}
    distils = method in DISTILLATIONS
    recipe = Recipe(method=method, conditional=True, teacher="-" if distils else None)
    teacher = SimpleNamespace(net=mlp(num_classes=3), parameterization=recipe.parameterization)
    objective = recipe.objective(cast(Any, SimpleNamespace(num_classes=3)), cast(Any, teacher))
    paired = method == "pairs"
    shape = (2, 4) if paired else (4,)
    cond = torch.zeros(B, dtype=torch.int64)
    found = of(mlp(**options), shape, objective, cond=cond, paired=paired, precision=precision)
    assert any(e.differentiated for e in found.evaluations)
    assert found.flops("forward") > 0 and found.flops("backward") > 0 and found.activations > 0
    assert ("teacher" in found.work) == distils
    # at the least the data, the input, the output and its gradient
    assert found.bytes(AROUND) >= B * 4 * (4 + 3 * (2 if precision == "bf16" else 4))
    assert found.flops(AROUND) == 0


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: MLP((4,), 16, 3), (4,)),
    "unet": (lambda: UNet(3, 16, (1, 2), num_res_blocks=2), (3, 8, 8)),
    "dit": (lambda: DiT(4, 8, width=32, depth=3, num_heads=4), (4, 8, 8)),
}


def kept(net: nn.Module, call: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps of a call, but for the parameters."""
    skip = {p.untyped_storage()._cdata for p in net.parameters()}
    alive: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    found = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in alive}
    return sum(size for key, size in found.items() if key not in skip)


@pytest.mark.parametrize("name", NETWORKS)
def test_activations_are_the_bytes_that_a_real_step_keeps(name: str) -> None:
    make, shape = NETWORKS[name]
    net = make()
    found = of(net, shape, FlowMatching())
    real = kept(net, lambda: net(torch.randn(B, *shape), torch.rand(B)))
    assert found.activations == pytest.approx(real, rel=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_activations_in_bfloat16_are_those_of_autocast(name: str) -> None:
    make, shape = NETWORKS[name]
    # wide: the embedding of time, float32 under autocast, is counted in bfloat16
    net = MLP((4,), 512, 3) if name == "mlp" else make()
    found = of(net, shape, FlowMatching(), precision="bf16")

    def call() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = net(torch.randn(B, *shape, dtype=torch.bfloat16), torch.rand(B))
        return out

    assert found.activations == pytest.approx(kept(net, call), rel=0.03)
    if name != "mlp":  # where the copies of the weights weigh more than the few rows
        assert found.activations < of(net, shape, FlowMatching()).activations
    on_gpu = of(net, shape, FlowMatching(), precision="bf16", device_type="cuda")
    assert on_gpu.activations >= found.activations


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_checkpointed_activations_are_those_of_checkpointed_blocks(name: str) -> None:
    make, shape = NETWORKS[name]
    net = make()
    found = of(net, shape, FlowMatching())
    inner = []
    for block in repeated_blocks(net):
        forward = block.forward
        block.forward = lambda *a, f=forward: checkpoint(f, *a, use_reentrant=False)
        block.register_forward_pre_hook(lambda m, a: inner.append((m, a)))
    outer = kept(net, lambda: net(torch.randn(B, *shape), torch.rand(B)))
    largest = max(kept(net, lambda m=m, a=a: type(m).forward(m, *a)) for m, a in inner)
    assert outer < found.checkpointed < found.activations
    # of what a block keeps, its inputs are outside already
    assert outer + 0.5 * largest < found.checkpointed <= 1.001 * (outer + largest)


class Caching(nn.Module):
    """Makes a table at its first call, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.table: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        if self.table is None:
            self.table = torch.arange(4, device=x.device).to(x.dtype)
        out: Tensor = self.fc(x + self.table)
        return F.dropout(out, 0.1, self.training)


def test_counting_leaves_the_network_and_the_random_state_alone() -> None:
    net = Caching().eval()
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    found = of(net, (4,), ConsistencyTraining())
    assert found.flops("forward") == 2 * B * 16
    assert net.table is None and not net.training
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert net(torch.randn(B, 4), torch.rand(B)).isfinite().all()


def test_blocks_that_are_checkpointed_in_place_are_counted_so() -> None:
    make, shape = NETWORKS["dit"]
    net = make()
    plain = of(net, shape, FlowMatching())
    for block in repeated_blocks(net):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    again = of(net, shape, FlowMatching(), memory_only=True)
    # without what the last block holds while it is computed again
    assert again.activations < plain.checkpointed < plain.activations
    assert not again.work and calls(again) == calls(plain)
