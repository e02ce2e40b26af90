"""The optimizers against torch's in float64, and whatever may be strange about tensors."""

from __future__ import annotations

import copy
import gc
import io
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcm import EMA, AdamW, DelayedEMA, HalfLifeEMA, PowerEMA, RAdam, WarmupEMA

pytestmark = pytest.mark.usefixtures("poisoned_memory")

PAIRS = [(AdamW, torch.optim.AdamW), (RAdam, torch.optim.RAdam)]
AVERAGES = (EMA(0.99), PowerEMA(0.1))
LIMIT = 0.5


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 128), nn.GELU(), nn.Linear(128, 3))
    return net.to(dtype)


def groups(net: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.0, "betas": (0.8, 0.99), "lr": 3e-3},
    ]


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1, (k + 1) / 50) * (1 + math.cos(math.pi * k / 1000)) / 2
    )


def distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Relative to the norm over all tensors."""
    flat = torch.cat([t.detach().double().flatten() for t in expected])
    other = torch.cat([t.detach().double().flatten() for t in actual])
    return ((other - flat).norm() / flat.norm()).item()


class Oracle:
    """torch's optimizer in float64, fed the gradients of another network; averages by hand."""

    def __init__(self, net: nn.Module, make: type[torch.optim.Optimizer], **options: Any) -> None:
        self.net = copy.deepcopy(net).double()
        self.optimizer = make(groups(self.net), lr=1e-3, **options)
        self.scheduler = schedule(self.optimizer)
        self.averages = [copy.deepcopy(list(self.net.parameters())) for _ in AVERAGES]
        self.k = 0
        self.clipped = 0

    @torch.no_grad()
    def step(self, net: nn.Module) -> None:
        parameters = list(self.net.parameters())
        for mine, theirs in zip(parameters, net.parameters()):
            mine.grad = None if theirs.grad is None else theirs.grad.double()
        norm = nn.utils.clip_grad_norm_(parameters, LIMIT)
        if norm.isfinite():
            self.clipped += int(norm > LIMIT)
            self.optimizer.step()
            for average, tensors in zip(AVERAGES, self.averages):
                decay = average.decay(torch.tensor(self.k))
                for e, p in zip(tensors, parameters):
                    e += (1 - decay) * (p - e)
        self.k += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_a_thousand_steps_are_torchs_in_float64(
    ours: Any, torchs: Any, dtype: torch.dtype, backend: str
) -> None:
    """With a schedule, groups, clipping, a lost step, and a passage through torch's optimizer."""
    torch.manual_seed(0)  # a thousand roundings of float32 leave 6e-7 to 9e-7 at any seed
    net = network(dtype)
    oracle = Oracle(net, torchs)
    make = lambda: ours(groups(net), lr=1e-3, max_grad_norm=LIMIT, ema=AVERAGES)  # noqa: E731
    optimizer = make()
    scheduler = schedule(optimizer)
    steps = 1000 if backend != "triton" else 40  # interpreted
    for i in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 5, dtype=dtype)
        loss = (net(x) - x[:, :3].sin()).square().mean()
        ((0.5 + i % 7) * loss).backward()
        if i == steps * 3 // 10:
            net[0].weight.grad[2, 1] = math.inf
        if i == steps // 2:
            file = io.BytesIO()
            stock = torchs(groups(net))
            stock.load_state_dict(optimizer.state_dict())
            torch.save(stock.state_dict(), file)
            file.seek(0)
            optimizer = make()
            optimizer.load_state_dict(torch.load(file))
            scheduler.optimizer = optimizer
            oracle.k -= 1  # torch does not count the step that was lost
        optimizer.step()
        oracle.step(net)
        scheduler.step()
        oracle.scheduler.step()
    assert 0 < oracle.clipped < steps
    bound = 1e-6 if dtype == torch.float32 else 1e-12
    assert distance(list(net.parameters()), list(oracle.net.parameters())) <= bound
    for j, expected in enumerate(oracle.averages):
        found = [optimizer.state[p][f"ema_{j}"] for p in net.parameters()]
        assert distance(found, expected) <= bound
    assert optimizer.counts.tolist() == [steps - 1, 0, 0]
    assert optimizer.param_groups[0]["lr"] == oracle.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(
    "average",
    [WarmupEMA(0.99), HalfLifeEMA(40, 4, 0.5), DelayedEMA(EMA(0.9), 4)],
    ids=lambda a: type(a).__name__,
)
def test_an_average_that_changes_its_decay_is_swept_as_by_hand(average: Any, backend: str) -> None:
    net = network()
    optimizer = AdamW(net.parameters(), lr=0.01, max_grad_norm=1.0, ema=average)
    expected = [p.detach().double() for p in net.parameters()]
    for k in range(9):
        optimizer.zero_grad()
        net(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        beta = average.decay(torch.tensor(k))
        for e, p in zip(expected, net.parameters()):
            e += (1 - beta) * (p.detach().double() - e)
        found = [optimizer.state[p]["ema_0"] for p in net.parameters()]
        assert distance(found, expected) <= 1e-6
    assert distance([p.detach() for p in net.parameters()], expected) > 1e-4


def everything(optimizer: Any) -> list[Tensor]:
    """Parameters, state, averages, low-precision copies."""
    layout = optimizer._layout
    shadows = [slot.view(flat) for flat in layout.shadows for slot in layout.slots]
    state = [t for entries in optimizer.state.values() for t in entries.values()]
    return [*optimizer.state, *state, *shadows]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("limit", [1.0, math.inf])
def test_a_norm_that_is_not_finite_changes_no_bit(bad: float, limit: float, backend: str) -> None:
    half = nn.Parameter(torch.randn(7).bfloat16())
    whole, strided = nn.Parameter(torch.randn(4100)), nn.Parameter(torch.randn(6, 2)[:, 0])
    parameters = [whole, half, strided]
    optimizer = AdamW(
        parameters, max_grad_norm=limit, ema=AVERAGES, shadow_dtype=torch.bfloat16, shadow_ema=[1]
    )
    gradients = [torch.randn_like(p) for p in parameters]
    for p, g in zip(parameters, gradients):
        p.grad = g.clone()
    optimizer.step()
    before = [t.detach().clone() for t in everything(optimizer)]
    for p in parameters:
        p.grad.view(-1)[-1] = bad
        optimizer.step()
        p.grad.view(-1)[-1] = 0
        assert not optimizer.grad_norm.isfinite()
    assert all(map(torch.equal, everything(optimizer), before))
    assert optimizer.counts.tolist() == [4, 3, 3]
    optimizer.step()
    assert optimizer.counts.tolist() == [5, 3, 0]
    assert not torch.equal(whole, before[0])


def test_a_step_has_the_same_bits_at_any_number_of_threads(backend: str) -> None:
    start = [torch.randn(n) for n in (1, 63, 4097, 70_001)]
    gradients = [torch.randn_like(t) * 10 for t in start]
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 3):
            torch.set_num_threads(n)
            parameters = [nn.Parameter(t.clone()) for t in start]
            optimizer = AdamW(parameters, lr=0.1, max_grad_norm=1.0, ema=AVERAGES)
            for p, g in zip(parameters, gradients):
                p.grad = g
            optimizer.step()
            found.append([*everything(optimizer), optimizer.grad_norm])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))
    exact = torch.cat([g.flatten() for g in gradients]).double().norm().item()
    assert found[0][-1].item() == pytest.approx(exact, rel=1e-6)


def _misaligned(g: Tensor) -> Tensor:
    return torch.cat([g.new_zeros(1), g.flatten()])[1:].view(g.shape)


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
    "channels last": lambda g: g.contiguous(memory_format=torch.channels_last),
    "expanded": lambda g: torch.tensor(3.0).expand_as(g),
    "strided": lambda g: torch.stack([g, g], -1)[..., 0],
    "misaligned": _misaligned,
    "strides of sizes 1": lambda g: g.as_strided(g.shape, (60, 12, 77, 3, 1)[: g.ndim]),
    "negative bit": lambda g: torch._neg_view(-g),
    "without memory": lambda g: torch._efficientzerotensor(g.shape),
}


@pytest.mark.parametrize("form", GRADIENTS)
def test_gradients_of_any_form_are_those_of_a_plain_one(form: str, backend: str) -> None:
    shape = (2, 5, 1, 4, 3) if form == "strides of sizes 1" else (2, 5, 4, 3)
    p = nn.Parameter(torch.randn(shape))
    q = nn.Parameter(p.detach().clone())
    ours, plain = AdamW([p], max_grad_norm=1.0), AdamW([q], max_grad_norm=1.0)
    for _ in range(3):
        p.grad = GRADIENTS[form](torch.randn(shape))
        q.grad = torch.zeros(shape).copy_(p.grad)
        ours.step()
        plain.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.grad_norm, plain.grad_norm, rtol=1e-6, atol=0)


def test_gradients_of_another_dtype_are_taken_as_they_are(backend: str) -> None:
    p, q = (nn.Parameter(torch.ones(70)) for _ in range(2))
    p.grad_dtype = torch.bfloat16
    p.grad = torch.randn(70).bfloat16()
    q.grad = p.grad.float()
    AdamW([p]).step()
    AdamW([q]).step()
    assert torch.equal(p, q)


PARAMETERS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3),
    "columns": lambda x: x[..., 1:],
    "a single number": lambda x: x[0, 0, 0, 0],
    "one row of a matrix": lambda x: x[1, 2],
    "no elements": lambda x: x[:, :0],
    "misaligned": lambda x: x.flatten()[1:],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", PARAMETERS)
def test_parameters_of_any_form_are_updated_in_place(
    form: str, dtype: torch.dtype, backend: str
) -> None:
    memory = torch.randn(4, 6, 3, 5, dtype=dtype)
    p, other = nn.Parameter(PARAMETERS[form](memory)), nn.Parameter(torch.randn(3, dtype=dtype))
    q, same = (nn.Parameter(t.detach().double().clone()) for t in (p, other))
    kept, marks = memory.clone(), torch.zeros_like(memory, dtype=torch.bool)
    if form != "channels last":  # a copy of the memory
        PARAMETERS[form](marks)[...] = True
    address = p.data_ptr()
    ours = AdamW([p, other], lr=0.1, max_grad_norm=1.0, ema=EMA(0.5))
    stock = torch.optim.AdamW([q, same], lr=0.1)
    expected = q.detach().clone()
    for _ in range(3):
        for mine, theirs in ((p, q), (other, same)):
            mine.grad = torch.randn_like(mine)
            theirs.grad = mine.grad.double().clone()
        nn.utils.clip_grad_norm_([q, same], 1.0)
        ours.step()
        stock.step()
        expected += 0.5 * (q.detach() - expected)
    tolerance = torch.finfo(dtype).eps * 2
    torch.testing.assert_close(p.double(), q, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(ours.state[p]["ema_0"].double(), expected, rtol=1e-5, atol=1e-6)
    assert p.data_ptr() == address
    assert torch.equal(memory[~marks], kept[~marks])


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_parameters_without_a_gradient_wait_and_keep_a_step_of_their_own(
    ours: Any, torchs: Any, backend: str
) -> None:
    p = [nn.Parameter(torch.randn(5, dtype=torch.float64)) for _ in range(3)]
    q = [nn.Parameter(t.detach().clone()) for t in p]
    a, b = ours(p, lr=0.1, weight_decay=0.1, ema=EMA(0.9)), torchs(q, lr=0.1, weight_decay=0.1)
    average = p[2].detach().clone()
    for i in range(12):
        for j, (mine, theirs) in enumerate(zip(p, q)):
            mine.grad = torch.randn_like(mine) if i % (j + 1) == 0 else None
            theirs.grad = None if mine.grad is None else mine.grad.clone()
        a.step()
        b.step()
        average += 0.1 * (p[2].detach() - average)
    assert distance(p, q) < 1e-13
    assert [a.state[t]["step"].item() for t in p] == [12, 6, 4]
    assert torch.allclose(a.state[p[2]]["ema_0"], average, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_roundings_of_float32_masters(
    dtype: torch.dtype, backend: str
) -> None:
    if backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("the interpreter truncates bfloat16")
    start = torch.randn(70).to(dtype)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.float())
    options: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.0, "ema": EMA(0.9)}
    ours, single = AdamW([p], **options), AdamW([q], **options)
    for _ in range(50):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.float()
        ours.step()
        single.step()
    assert torch.equal(p, q.to(dtype)) and not torch.equal(p, start)
    assert torch.equal(ours.state[p]["master"], q)
    assert torch.equal(ours.state[p]["ema_0"], single.state[q]["ema_0"])
    with torch.no_grad():  # from outside: that wins, but only where it changed something
        p[:3] = q[:3] = 7.0
    q.grad = p.grad.float()
    ours.step()
    single.step()
    assert torch.equal(ours.state[p]["master"], q) and torch.equal(p, q.to(dtype))


def test_gradients_are_not_kept_after_a_step(backend: str) -> None:
    parameters = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5, 2).t())]
    optimizer = AdamW(parameters, max_grad_norm=1.0)
    for p in parameters:
        p.grad = torch.ones(p.shape)
    references = [weakref.ref(p.grad) for p in parameters]
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_gradients_that_outlived_a_change_of_shape_are_refused(backend: str) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamW([p])
    p.grad = torch.ones(3)
    p.data = torch.ones(6000)
    with pytest.raises(
        ValueError, match=r"gradient of parameter 0 is \[3\], the parameter \[6000\]"
    ):
        optimizer.step()
    assert torch.equal(p, torch.ones(6000))
    p.grad = torch.ones(6000)
    optimizer.step()
    p.data, p.grad = p.data[:2], None
    with pytest.raises(ValueError, match=r"parameter 0 is \[2\], its exp_avg \[6000\]"):
        optimizer.step()
