"""What only a GPU can show: the operators there, captured graphs, steps without a host sync."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from operator_cases import NAMES, cases, flat
from tolerances import assert_close, rounding_slack
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastcm
from fastcm import ContinuousConsistency, MeanFlow, jvp, ops, rng
from fastcm.networks import MLP, DiT, UNet
from fastcm.ops import Denoised, Noised

pytestmark = pytest.mark.gpu


def moved(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(v.detach().cuda() if isinstance(v, Tensor) else v for v in arguments)


@pytest.mark.parametrize("name", NAMES)
def test_an_operator_gives_on_the_gpu_what_it_gives_on_the_cpu(name: str) -> None:
    operator, arguments = cases()[name]
    on_cpu = flat(operator(*arguments))
    for one, other in zip(flat(operator(*moved(arguments))), on_cpu):
        assert one.is_cuda and one.shape == other.shape and one.dtype == other.dtype
        other = other.detach()
        slack = 5e-5 * (1 + other.double().abs()) + rounding_slack(other, one.dtype)
        assert_close(one.cpu(), other.double(), other, slack=slack)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_on_the_gpu(name: str) -> None:
    operator, arguments = cases()[name]
    torch.library.opcheck(operator.default, moved(arguments))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [16, 64, 72, 80, 96, 128])
def test_attention_and_its_tangent_on_the_gpu(D: int, dtype: torch.dtype, causal: bool) -> None:
    def operands(length: int) -> Tensor:
        return torch.randn(2, length, 3, D, device="cuda", dtype=dtype).transpose(1, 2)

    q, k, v, tq, tk, tv = (operands(n) for n in (200, 177, 177) * 2)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o, to = jvp.attention_dual(*leaves, tq, tk, tv, is_causal=causal)
    with sdpa_kernel(SDPBackend.MATH):
        wide = [x.double().requires_grad_() for x in (q, k, v)]
        plain = functools.partial(F.scaled_dot_product_attention, is_causal=causal)
        exact, tangent = torch.func.jvp(plain, tuple(wide), (tq.double(), tk.double(), tv.double()))
        same = torch.func.jvp(plain, (q, k, v), (tq, tk, tv))
    assert_close(o.detach(), exact.detach(), same[0])
    assert_close(to, tangent.detach(), same[1])
    g = torch.randn_like(o)
    o.backward(g)
    exact.backward(g.double())
    for mine, theirs in zip(leaves, wide, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        error = (mine.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("given", ["qkv", "q"])
def test_opcheck_of_attention_on_the_gpu(given: str) -> None:
    q, k, v = (torch.randn(2, 3, 50, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    tangents = [torch.randn_like(x) if n in given else None for n, x in zip("qkv", (q, k, v))]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.fastcm.attention_dual.default, (*leaves, *tangents, True, 0.1))


@pytest.mark.parametrize("method", [MeanFlow(), ContinuousConsistency()], ids=["meanflow", "sct"])
def test_derivatives_of_a_transformer_compile_on_the_gpu(method: Any) -> None:
    two = isinstance(method, MeanFlow)
    losses = []
    for compile in (False, True):
        torch.manual_seed(0)
        net = DiT(4, 16, width=128, depth=2, num_heads=2, two_times=two).cuda()
        data = torch.randn(256, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        trainer = fastcm.Trainer(
            net, method, data=data.cuda(), batch_size=32, precision="bf16", compile=compile,
            progress=False, log=lambda line: None,
        )  # fmt: skip
        losses.append([float(trainer.train_step()) for _ in range(4)])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0.05, atol=0)


def loss_of(F: Tensor, x0: Tensor, key: Tensor, a: Tensor, b: Tensor) -> Tensor:
    k = fastcm.NoiseKey.wrap(key)
    target = Denoised(Noised(x0, b, a, k), F.detach() * 0.5, a, b)
    return ops.consistency_loss(F, Noised(x0, a, b, k), a, b, target)[0]


@pytest.mark.parametrize("elements", [3072, 40_000])
def test_compiled_loss_and_gradient_are_the_eager_ones(elements: int) -> None:
    x0 = torch.randint(256, (4, elements), dtype=torch.uint8, device="cuda")
    F = torch.randn(4, elements, device="cuda")
    a, b = torch.rand(2, 4, device="cuda")
    key = fastcm.NoiseKey(3, device="cuda").tensor
    results = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True)):
        leaf = F.clone().requires_grad_()
        loss = function(leaf, x0, key, a, b)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_captured_graph_reads_the_key_of_each_replay() -> None:
    x0 = torch.randn(8, 100, device="cuda")
    a, s = torch.rand(2, 8, device="cuda")
    key = fastcm.NoiseKey(5, device="cuda")
    ops.noising(x0, a, s, key)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.noising(x0, a, s, key)
        key.advance_()
    assert isinstance(out, Tensor)
    key.tensor.copy_(fastcm.NoiseKey(5, 7, device="cuda").tensor)
    for step in (7, 8, 9):
        graph.replay()
        expected = ops.noising(x0, a, s, fastcm.NoiseKey(5, step, device="cuda"))
        assert torch.equal(out, expected)


def objectives() -> dict[str, Any]:
    teacher = MLP(shape=(3, 4, 4), width=16, depth=1)
    torch.nn.init.normal_(list(teacher.parameters())[-1])
    return {
        "flow": fastcm.FlowMatching(),
        "ct": fastcm.ConsistencyTraining(discretization=fastcm.schedules.ICTCurriculum(100)),
        "cd": fastcm.ConsistencyDistillation(teacher),
    }


def trainer(objective: Any, device: str, **options: Any) -> fastcm.Trainer:
    torch.manual_seed(0)
    net = MLP(shape=(3, 4, 4), width=16, depth=1)
    data = torch.arange(64 * 48, dtype=torch.uint8).reshape(64, 3, 4, 4)
    defaults = {"batch_size": 24, "compile": False, "graph": "off", "progress": False}
    options = {"data": data, **defaults, **options}
    return fastcm.Trainer(net, objective, device=device, **options)


@pytest.mark.parametrize("method", ["flow", "ct", "cd"])
def test_training_on_the_gpu_follows_the_cpu(method: str) -> None:
    runs = [
        torch.cat(
            [p.cpu().flatten() for p in trainer(_copy(method), device).fit(5).net.parameters()]
        )
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(*runs, rtol=1e-3, atol=2e-4)


def _copy(method: str) -> Any:
    torch.manual_seed(1)
    return objectives()[method]


@pytest.mark.parametrize("graph", ["off", "step"])
@pytest.mark.parametrize("method", ["flow", "ct", "cd"])
def test_a_step_never_waits_for_the_device(method: str, graph: str) -> None:
    t = trainer(objectives()[method], "cuda", graph=graph).fit(30)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):  # across an epoch, 64 rows in batches of 24
            t.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert t.step == 34


def weights(t: fastcm.Trainer) -> list[Tensor]:
    nets = [t.net, *t.update.networks]
    return [p.detach().clone() for net in nets for p in net.parameters()]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("method", ["flow", "ct", "cd"])
def test_a_captured_run_is_bitwise_the_launched_one(method: str, compile: bool) -> None:
    """Across epochs, under a learning rate that changes in every step."""
    schedule = fastcm.warmup_cosine(5, 50)
    runs = [
        trainer(_copy(method), "cuda", graph=graph, compile=compile, lr_schedule=schedule).fit(40)
        for graph in ("off", "step")
    ]
    for p, q in zip(*map(weights, runs)):
        assert torch.equal(p, q)


@pytest.mark.parametrize("graph", ["off", "step"])
def test_batches_that_come_from_the_host_train_like_those_of_the_device(graph: str) -> None:
    """Copied on a stream of their own, while the step before is computed."""
    data = torch.randint(256, (480, 3, 4, 4), dtype=torch.uint8)
    runs = [
        trainer(_copy("ct"), "cuda", graph=graph, data=[part.to(device) for part in data.split(24)])
        for device in ("cpu", "cuda")
    ]
    for p, q in zip(*(weights(t.fit(60)) for t in runs)):
        assert torch.equal(p, q)


def test_a_captured_run_resumes_bitwise(tmp_path: Path) -> None:
    straight = trainer(_copy("ct"), "cuda", graph="step").fit(60)
    trainer(_copy("ct"), "cuda", graph="step", directory=tmp_path).fit(35)
    resumed = trainer(_copy("ct"), "cuda", graph="step", directory=tmp_path).load().fit(25)
    for p, q in zip(weights(straight), weights(resumed)):
        assert torch.equal(p, q)


def test_a_graph_survives_a_load_and_is_captured_again_when_memory_moved(tmp_path: Path) -> None:
    runs = []
    for graph in ("off", "step"):
        t = trainer(_copy("ct"), "cuda", graph=graph, directory=tmp_path / graph).fit(30)
        t.fit(10)
        t.load(tmp_path / graph)  # back to step 40, in place
        for p in t.net.parameters():
            p.data = p.data.clone()
        runs.append(t.fit(10))
    for p, q in zip(*map(weights, runs)):
        assert torch.equal(p, q)


def test_a_captured_step_skips_a_gradient_that_is_not_finite() -> None:
    t = trainer(_copy("flow"), "cuda", graph="step").fit(30)
    before = weights(t)
    first = next(t.net.parameters()).detach()
    held = first.clone()
    first.fill_(float("inf"))
    t.train_step()
    assert t.update.counts.tolist() == [31, 1, 1]
    first.copy_(held)
    assert all(torch.equal(p, q) for p, q in zip(before, weights(t)))
    t.train_step()
    assert t.update.counts.tolist() == [32, 1, 0]


def test_micro_batches_train_alike_in_a_graph() -> None:
    runs = [trainer(_copy("ct"), "cuda", graph="step", accumulate=k).fit(30) for k in (1, 3)]
    for p, q in zip(*map(weights, runs)):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_gradients_that_nccl_averages_are_in_the_graph() -> None:
    """In a group of one, which NCCL reduces like any other."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        runs = [
            trainer(_copy("ct"), "cuda", graph=graph, parallel="ddp").fit(40)
            for graph in ("off", "step")
        ]
    finally:
        dist.destroy_process_group()
    for p, q in zip(*map(weights, runs)):
        assert torch.equal(p, q)


def test_the_optimizer_on_the_gpu_is_that_on_the_cpu() -> None:
    torch.manual_seed(2)
    shapes = [(64, 33), (5,), (7, 3, 3, 3), (), (4097,)]
    results = []
    for device in ("cpu", "cuda"):
        g = torch.Generator().manual_seed(1)
        params = [
            torch.nn.Parameter(torch.randn(s, generator=g).to(device, dtype))
            for s in shapes
            for dtype in (torch.float32, torch.bfloat16)
        ]
        o = fastcm.AdamW(
            params,
            max_grad_norm=1.0,
            ema=[fastcm.EMA(0.9), fastcm.PowerEMA(0.1)],
            shadow_dtype=torch.bfloat16,
            shadow_ema=[1],
        )
        for _ in range(20):
            for p in params:
                p.grad = torch.randn(p.shape, generator=g).to(device, p.dtype)
            o.step()
        found = [t.cpu().float() for p in params for t in (p.detach(), *o.state[p].values())]
        results.append([*found, *(s.cpu().float() for s in o._layout.shadows), o.grad_norm.cpu()])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)


def test_samples_do_not_depend_on_the_device() -> None:
    net = MLP(shape=(2,), width=16, depth=1)
    torch.nn.init.normal_(list(net.parameters())[-1])
    for steps in (1, 3):
        sampler = fastcm.Sampler(net.cpu(), fastcm.Linear(), steps=steps, shape=(2,))
        on_cpu = sampler(100, seed=4)
        sampler = fastcm.Sampler(net.cuda(), fastcm.Linear(), steps=steps, shape=(2,))
        on_gpu = sampler(100, seed=4).cpu()
        torch.testing.assert_close(on_cpu, on_gpu, rtol=1e-3, atol=1e-4)


def test_noise_of_a_large_batch_agrees_with_the_cpu() -> None:
    key = fastcm.NoiseKey(11, 2**33 + 1)
    shape = (64, 3, 32, 32)
    on_cpu = ops.noise(shape, key, stream=rng.NOISE, dtype=torch.float64)
    x0, one = torch.zeros(shape, device="cuda"), torch.ones(64, device="cuda")
    z = ops.noising(x0, one, one, key.to("cuda"))
    assert isinstance(z, Tensor)
    error = (z.cpu().double() - on_cpu).abs()
    assert error.max() <= 1e-3 and (error > 4e-6).double().mean() < 2e-3


LOOPS: dict[str, dict[str, Any]] = {
    "one step": {"steps": 1},
    "four steps": {"steps": 4},
    "ten steps": {"steps": 10},
    "heun": {"method": "ode", "solver": "heun", "steps": 4},
    "dpmpp_2m, long": {"method": "ode", "solver": "dpmpp_2m", "steps": 12},
}


def unet() -> torch.nn.Module:
    torch.manual_seed(0)
    net = UNet(3, 32, (1, 2), num_res_blocks=1, num_classes=4).cuda()
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return net


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("loop", LOOPS)
def test_replayed_samples_are_the_launched_ones(loop: str, precision: Any, compile: bool) -> None:
    net = unet()
    launched, replayed = (
        fastcm.Sampler(
            net,
            fastcm.Linear(),
            shape=(3, 16, 16),
            null_condition=4,
            precision=precision,
            compile=compile,
            graph=graph,
            **LOOPS[loop],
        )
        for graph in ("off", "on")
    )
    launched.engine.has_few_shapes = True  # the same batch shapes: the same sums
    for i in range(12):
        cond = (torch.arange(11) + i) % 4
        call: dict[str, Any] = {"seed": i, "first_sample": 5 * i, "cond": cond, "guidance": 1.5}
        assert torch.equal(launched(11, **call), replayed(11, **call))


def test_a_replay_sees_weights_that_change_in_place_or_move() -> None:
    net = unet()
    options: dict[str, Any] = {"shape": (3, 16, 16), "steps": 2}
    replayed = fastcm.Sampler(net, fastcm.Linear(), graph="on", **options).prepare(8)
    launched = fastcm.Sampler(net, fastcm.Linear(), graph="off", **options)
    for change in (lambda p: p.data.mul_(0.9), lambda p: setattr(p, "data", p.data.clone() * 0.9)):
        for p in net.parameters():
            change(p)
        assert torch.equal(replayed(8, seed=1), launched(8, seed=1))


def test_a_replayed_batch_never_waits_for_the_device() -> None:
    replayed = fastcm.Sampler(unet(), fastcm.Linear(), graph="on", shape=(3, 16, 16)).prepare(8)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = [replayed(8, seed=i) for i in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.equal(drawn[0], drawn[1]) and torch.isfinite(torch.stack(drawn)).all()


def test_threads_share_a_sampler_with_graphs() -> None:
    net = unet()
    options: dict[str, Any] = {"shape": (3, 16, 16), "steps": 2, "batch_size": 8}
    replayed = fastcm.Sampler(net, fastcm.Linear(), graph="on", **options).prepare(8)
    expected = [replayed(8, seed=i) for i in range(16)]
    with ThreadPoolExecutor(4) as pool:

        def draw(i: int) -> Tensor:
            with torch.cuda.stream(torch.cuda.Stream()):
                x = replayed(8, seed=i)
                torch.cuda.current_stream().synchronize()
            return x

        for x, y in zip(pool.map(draw, range(16)), expected):
            assert torch.equal(x, y)
