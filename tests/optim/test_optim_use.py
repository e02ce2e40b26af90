"""The optimizers in training loops that others write, and under modules that change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcm import EMA, AdamW, PowerEMA
from fastcm.optim import backends, one_sweep

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OPTIONS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1}
X = torch.linspace(-1, 1, 24).view(8, 3)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))


def loss(net: Any, x: Tensor = X) -> Tensor:
    value: Tensor = (net(x) - x[:, :2].sin()).square().mean()
    return value


def expected(net: nn.Module, steps: int) -> nn.Module:
    """A copy that torch's optimizer trained in the plainest loop."""
    other = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(other.parameters(), **OPTIONS)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(other).backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        optimizer.step()
    return other


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p.double(), q.double(), rtol=1e-4, atol=1e-5)


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned(backend: str) -> None:
    net = network()
    reference = expected(net, 5)
    optimizer = AdamW(net.parameters(), max_grad_norm=0.1, **OPTIONS)

    first = loss(net).item()

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(net)
        value.backward()
        return value

    with torch.no_grad():
        losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[0] == first and len(set(losses)) == 5
    assert_same(net, reference)


def test_hooks_and_profilers_see_a_step(backend: str) -> None:
    seen = []
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamW([p])
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    p.grad = torch.ones(3)
    optimizer.step()
    assert seen == ["before", "after"]


def test_compiled_code_can_call_step(backend: str) -> None:
    net = network()
    reference = expected(net, 5)
    optimizer = AdamW(net.parameters(), max_grad_norm=0.1, ema=EMA(0.9), **OPTIONS)

    @torch.compile(backend="eager")
    def train(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        value = loss(net, x)
        value.backward()
        optimizer.step()
        return value.detach()

    for _ in range(5):
        train(X)
    assert optimizer.counts.tolist() == [5, 0, 0]
    assert_same(net, reference)


def test_the_scaler_of_mixed_precision_unscales_and_skips(backend: str) -> None:
    net = network()
    reference = expected(net, 4)
    optimizer = AdamW(net.parameters(), max_grad_norm=0.1, **OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(5):
        optimizer.zero_grad()
        scaler.scale(loss(net)).backward()
        if i == 2:
            net[0].weight.grad[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.counts.tolist() == [4, 0, 0] and scaler.get_scale() == 512.0
    assert_same(net, reference)


def test_accelerate_prepares_saves_and_resumes(tmp_path: Any, backend: str) -> None:
    accelerate = pytest.importorskip("accelerate")

    def start(net: nn.Module) -> tuple[Any, ...]:
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = AdamW(net.parameters(), max_grad_norm=0.1, ema=EMA(0.9), **OPTIONS)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        return (accelerator, optimizer, *accelerator.prepare(net, optimizer, scheduler))

    def train(accelerator: Any, net: Any, optimizer: Any, scheduler: Any) -> None:
        for _ in range(3):
            with accelerator.accumulate(net):
                accelerator.backward(loss(net))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    net = network()
    reference = expected(net, 6)
    accelerator, bare, *parts = start(net)
    train(accelerator, *parts)
    accelerator.save_state(str(tmp_path))
    train(accelerator, *parts)
    assert_same(net, reference)
    other = network()
    accelerator, resumed, *parts = start(other)
    accelerator.load_state(str(tmp_path))
    train(accelerator, *parts)
    for a, b in ((other, net), (resumed.ema_module(0, other), bare.ema_module(0, net))):
        assert all(map(torch.equal, a.parameters(), b.parameters()))
    assert resumed.counts.tolist() == [6, 0, 0]


def _replace(net: nn.Module) -> None:
    for p in net.parameters():
        p.data = p.data.clone()


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "data replaced": _replace,
    "channels last": lambda net: net.to(memory_format=torch.channels_last),
    "float64": lambda net: net.double(),
    "float64 and back": lambda net: (net.double(), net.float()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_state_goes_along_when_a_module_moves(change: str, backend: str) -> None:
    moved = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 1))
    kept = copy.deepcopy(moved)
    pairs = [
        (n, AdamW(n.parameters(), lr=0.1, max_grad_norm=1.0, ema=EMA(0.9))) for n in (moved, kept)
    ]
    average = pairs[0][1].ema_module(0, moved)
    for i in range(6):
        if i == 3:
            CHANGES[change](moved)
        x = torch.randn(2, 2, 5, 5)
        for net, optimizer in pairs:
            optimizer.zero_grad()
            net(x.to(net[0].weight.dtype)).square().mean().backward()
            optimizer.step()
    assert_same(moved, kept)
    assert_same(average, pairs[1][1].ema_module(0, kept))


def test_tied_parameters_are_updated_once(backend: str) -> None:
    net = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).double()
    net[1].weight = net[0].weight
    stock = copy.deepcopy(net)
    ours, theirs = (
        AdamW(net.parameters(), lr=0.1, ema=EMA(0.5)),
        torch.optim.AdamW(stock.parameters(), lr=0.1),
    )
    x = torch.randn(3, 4, dtype=torch.float64)
    for n, optimizer in ((net, ours), (stock, theirs)):
        n[1](n[0](x).sin()).square().mean().backward()
        optimizer.step()
    assert_same(net, stock)
    average = ours.ema_module(0, net)
    assert average[0].weight is average[1].weight


def test_parameter_groups_may_be_edited_between_steps(backend: str) -> None:
    """accelerate puts sharded parameters in the place of others; people freeze and regroup."""
    start = [torch.randn(3) for _ in range(4)]
    pairs = []
    for make in (AdamW, torch.optim.AdamW):
        p = [nn.Parameter(t.clone()) for t in start]
        optimizer: Any = make([{"params": p[:2]}, {"params": p[2:3], "weight_decay": 0.5}], lr=0.1)
        groups = optimizer.param_groups
        generator = torch.Generator().manual_seed(0)
        for i in range(10):
            if i == 2:
                groups[1]["params"][0] = p[3]  # in the place of p[2]
            elif i == 4:
                groups[1]["params"].append(groups[0]["params"].pop())
            elif i == 6:
                del groups[0]
            elif i == 8:
                groups[0].update(lr=0.2, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.1)
            for t in p:
                t.grad = torch.randn(3, generator=generator)
            optimizer.step()
        pairs.append(p)
    for ours, torchs in zip(*pairs):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)


def test_schedulers_may_change_the_betas_and_a_learning_rate_that_is_a_tensor(backend: str) -> None:
    nets = [network()]
    nets.append(copy.deepcopy(nets[0]))
    for net, make in zip(nets, (AdamW, torch.optim.AdamW)):
        flags = {"foreach": True, "capturable": True} if make is AdamW else {"foreach": False}
        optimizer = make(net.parameters(), lr=torch.tensor(0.1), **flags)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
        for _ in range(10):
            optimizer.zero_grad()
            loss(net).backward()
            optimizer.step()
            scheduler.step()
    assert_same(*nets)


def test_a_warmed_average_costs_a_step_of_the_kernels_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(one_sweep, "choose", lambda *_: backends.Triton())
    net = nn.Linear(3, 2)
    pytest.importorskip("triton")
    optimizer = AdamW(net.parameters(), ema=(EMA(0.9, warmup=True), PowerEMA(0.1), EMA(0.5)))
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    monkeypatch.setattr(EMA, "decay", lambda *_: pytest.fail("launched"))
    monkeypatch.setattr(PowerEMA, "decay", lambda *_: pytest.fail("launched"))
    optimizer.step()
