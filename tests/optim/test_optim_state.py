"""State, averages, low-precision copies and the options of the optimizers; and what they refuse."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastcm import EMA, AdamW, CurriculumEMA, PowerEMA, RAdam
from fastcm.schedules import CMCurriculum

pytestmark = pytest.mark.usefixtures("poisoned_memory")

PAIRS = [(AdamW, torch.optim.AdamW), (RAdam, torch.optim.RAdam)]


def network() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))


def train(net: nn.Module, optimizer: Any, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(net.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(6, 3, generator=generator).to(dtype)).square().mean().backward()
        optimizer.step()


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.parameters(), b.parameters()))


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_the_state_continues_in_torchs_optimizer_and_comes_back(
    ours: Any, torchs: Any, backend: str
) -> None:
    net = network().double()
    optimizer = ours(net.parameters(), lr=0.01, weight_decay=0.1)
    train(net, optimizer, 7)
    other = copy.deepcopy(net)
    stock = torchs(other.parameters())
    stock.load_state_dict(through_a_file(optimizer.state_dict()))
    train(net, optimizer, 3, seed=1)
    train(other, stock, 3, seed=1)
    for p, q in zip(net.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)
    back = ours(other.parameters())
    back.load_state_dict(through_a_file(stock.state_dict()))
    assert back.param_groups[0]["lr"] == 0.01 and back.counts.tolist() == [10, 0, 0]
    train(net, optimizer, 3, seed=2)
    train(other, back, 3, seed=2)
    for p, q in zip(net.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


def test_weight_decay_stays_decoupled_whatever_is_loaded(backend: str) -> None:
    net = network()
    optimizer = AdamW(net.parameters())
    for stock in (torch.optim.Adam(net.parameters()), torch.optim.AdamW(net.parameters())):
        train(net, stock, 1)
        state = stock.state_dict()
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["decoupled_weight_decay"] is True
        del state["param_groups"][0]["decoupled_weight_decay"]  # of an older torch
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["decoupled_weight_decay"] is True
    radam = RAdam(net.parameters())
    radam.load_state_dict(
        torch.optim.RAdam(net.parameters(), decoupled_weight_decay=True).state_dict()
    )
    assert radam.param_groups[0]["decoupled_weight_decay"] is True


def test_averages_start_at_the_first_step_though_an_empty_state_was_loaded(backend: str) -> None:
    net = network()
    optimizer = AdamW(net.parameters(), lr=0.0, ema=EMA(0.9))
    optimizer.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        net[1].weight.fill_(5.0)  # as by loading pretrained weights
    train(net, optimizer, 1)
    assert torch.equal(optimizer.state[net[1].weight]["ema_0"], torch.full((8, 3), 5.0))


def test_an_optimizer_can_load_its_own_live_state(backend: str) -> None:
    net = network().bfloat16()
    optimizer = AdamW(net.parameters(), lr=1e-4, ema=EMA(0.9))
    train(net, optimizer, 5)
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    after = optimizer.state_dict()
    for index, entries in before["state"].items():
        assert {"ema_0", "master"} < set(entries)
        for name, value in entries.items():
            assert torch.equal(after["state"][index][name], value), name


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_and_pickles_continue_bit_for_bit(copied: Any, backend: str) -> None:
    net = network().bfloat16()
    optimizer = RAdam(
        net.parameters(), lr=0.01, max_grad_norm=1.0, ema=(PowerEMA(0.1), EMA(0.9, warmup=True))
    )
    train(net, optimizer, 5)
    other, twin = copied((net, optimizer))
    kept = copy.deepcopy(twin.state_dict())
    train(net, optimizer, 5, seed=1)
    for index, entries in twin.state_dict()["state"].items():  # memory of its own
        assert all(torch.equal(kept["state"][index][name], t) for name, t in entries.items())
    train(other, twin, 5, seed=1)
    assert same(other, net) and same(twin.ema_module(1, other), optimizer.ema_module(1, net))
    assert twin.counts.tolist() == [10, 0, 0]


def test_a_saved_state_continues_bit_for_bit(backend: str) -> None:
    def make(net: nn.Module) -> AdamW:
        averages = (EMA(0.9), PowerEMA(0.1), CurriculumEMA(CMCurriculum(100)))
        return AdamW(net.parameters(), lr=0.01, max_grad_norm=1.0, ema=averages)

    net = network()
    optimizer = make(net)
    train(net, optimizer, 3)
    net[1].weight.grad.fill_(math.nan)
    optimizer.step()
    other = copy.deepcopy(net)
    resumed = make(other)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert resumed.counts.tolist() == [4, 1, 1]
    train(net, optimizer, 5, seed=1)
    train(other, resumed, 5, seed=1)
    assert same(net, other)
    for j in range(3):
        assert same(resumed.ema_module(j, other), optimizer.ema_module(j, net))


def test_averages_follow_their_definitions_and_take_buffers_along(backend: str) -> None:
    curriculum = CurriculumEMA(CMCurriculum(20), mu0=0.5)
    half_life = EMA.half_life(images=60, batch_size=6)
    averages = (EMA(0.9), EMA(0.99, warmup=True), curriculum, half_life, PowerEMA(0.1))
    net = network()
    optimizer = AdamW(net.parameters(), lr=0.1, ema=averages)
    live = [optimizer.ema_module(j, net) for j in range(len(averages))]
    expected = [copy.deepcopy(net).double() for _ in averages]
    for k in range(20):
        train(net, optimizer, 1, seed=k)
        for average, module in zip(averages, expected):
            for e, p in zip(module.parameters(), net.parameters()):
                e.data += (1 - average.decay(torch.tensor(k)).item()) * (p.data - e.data)
    x = torch.randn(4, 3)
    for j, (module, exact) in enumerate(zip(live, expected)):
        for e, found in zip(exact.parameters(), module.parameters()):
            torch.testing.assert_close(found.double(), e, rtol=1e-5, atol=1e-6)
        assert all(map(torch.equal, module.buffers(), net.buffers()))
        assert not module.training and not any(p.requires_grad for p in module.parameters())
        trained = [p.detach().clone() for p in net.parameters()]
        net.eval()
        with optimizer.averaged(j, net) as swapped:
            assert swapped is net and torch.equal(net(x), module(x))
            assert not torch.equal(net[1].weight, trained[2])
        net.train()
        assert all(map(torch.equal, net.parameters(), trained))


def test_averages_are_put_back_after_an_exception_and_never_trained(backend: str) -> None:
    net = network()
    optimizer = AdamW(net.parameters(), lr=0.1, ema=(EMA(0.9), EMA(0.5)))
    train(net, optimizer, 2)
    trained = copy.deepcopy(net)
    with pytest.raises(ZeroDivisionError), optimizer.averaged(0, net):
        with optimizer.averaged(1, net):
            assert same(net, optimizer.ema_module(1, net))
        assert same(net, optimizer.ema_module(0, net))
        with pytest.raises(RuntimeError, match="the averages would be trained"):
            optimizer.step()
        raise ZeroDivisionError
    assert same(net, trained)
    train(net, optimizer, 1)
    with pytest.raises(ValueError, match="there is no average 2: the optimizer has 2"):
        optimizer.ema_module(2, net)
    with pytest.raises(ValueError, match="has none of the optimizer's parameters"):
        optimizer.ema_module(0, network())
    with (
        pytest.raises(ValueError, match="has none of the optimizer's parameters"),
        optimizer.averaged(0, network()),
    ):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_copies_are_written_by_the_update(dtype: torch.dtype, backend: str) -> None:
    if backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("the interpreter truncates bfloat16")
    net = network()
    net[3].requires_grad_(False)
    trained = [p for p in net.parameters() if p.requires_grad]
    averages = (EMA(0.9), EMA(0.5))
    optimizer = AdamW(trained, lr=0.1, ema=averages, shadow_dtype=dtype, shadow_ema=[1])
    shadow, average = optimizer.shadow_module(net), optimizer.shadow_module(net, 1)
    train(net, optimizer, 3)
    for module, exact in ((shadow, net), (average, optimizer.ema_module(1, net))):
        for p, q in zip(module.parameters(), exact.parameters()):
            assert p.dtype == dtype and torch.equal(p, q.to(dtype))
        exact.eval()  # with the frozen parameters and the buffers in the same dtype
        x = torch.randn(4, 3)
        torch.testing.assert_close(module(x.to(dtype)).float(), exact(x), rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match="there is no low-precision copy of 0: give the optimizer"):
        optimizer.shadow_module(net, 0)


def test_live_modules_survive_new_groups_averages_and_loads(backend: str) -> None:
    net, extra = network(), nn.Parameter(torch.ones(2))
    optimizer = AdamW(net.parameters(), lr=0.1, ema=EMA(0.9))
    live = optimizer.ema_module(0, net)
    train(net, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.add_param_group({"params": [extra], "lr": 0.5, "betas": (0.5, 0.5)})
    assert optimizer.add_ema(EMA(0.5)) == 1
    second = optimizer.ema_module(1, net)
    assert same(second, net) and not same(live, net)
    train(net, optimizer, 2)
    extra.grad = torch.ones(2)
    optimizer.step()
    assert same(live, optimizer.ema_module(0, net)) and not same(second, net)
    assert [optimizer.state[p]["step"].item() for p in (net[1].weight, extra)] == [5, 1]
    torch.testing.assert_close(extra.data, torch.full((2,), 0.495))
    with pytest.raises(ValueError, match="the state has 1 parameter groups, the optimizer 2"):
        optimizer.load_state_dict(state)


def test_removed_state_starts_anew(backend: str) -> None:
    net = network()
    optimizer = AdamW(net.parameters(), lr=0.1, ema=EMA(0.9))
    train(net, optimizer, 3)
    fresh_net = copy.deepcopy(net)
    fresh = AdamW(fresh_net.parameters(), lr=0.1, ema=EMA(0.9))
    optimizer.state.clear()
    train(net, optimizer, 2)
    train(fresh_net, fresh, 2)
    assert same(net, fresh_net)
    assert same(optimizer.ema_module(0, net), fresh.ema_module(0, fresh_net))


P = nn.Parameter
ONE = [P(torch.ones(3))]
REFUSED: dict[str, Callable[[], Any]] = {
    "EMA decay must be in": lambda: EMA(1.0),
    "lr must be >= 0, got -1": lambda: AdamW(ONE, lr=-1),
    "lr must be >= 0, got nan": lambda: AdamW(ONE, lr=math.nan),
    "lr must have 1 element": lambda: AdamW(ONE, lr=torch.ones(2)),
    "eps must be >= 0": lambda: RAdam(ONE, eps=-1e-8),
    "weight_decay must be >= 0": lambda: AdamW(ONE, weight_decay=-0.1),
    "betas must be two numbers in": lambda: AdamW(ONE, betas=(0.9, 1.0)),
    "group 1: betas must be two": lambda: AdamW(
        [{"params": ONE}, {"params": [P(torch.ones(1))], "betas": (-0.1, 0.9)}]
    ),
    "amsgrad is not supported": lambda: AdamW(ONE, amsgrad=True),
    "maximize is not supported": lambda: RAdam(ONE, maximize=True),
    "max_grad_norm must be > 0": lambda: AdamW(ONE, max_grad_norm=0.0),
    "shadow_dtype must be": lambda: AdamW(ONE, shadow_dtype=torch.float32),
    "shadow_ema needs shadow_dtype": lambda: AdamW(ONE, ema=EMA(0.9), shadow_ema=[0]),
    "shadow_ema 1 is not one": lambda: AdamW(
        ONE, ema=EMA(0.9), shadow_dtype=torch.bfloat16, shadow_ema=[1]
    ),
    "empty parameter list": lambda: AdamW([]),
    "groups have no parameters": lambda: AdamW([{"params": []}, {"params": []}]),
    "is torch.complex64": lambda: AdamW([P(torch.ones(3, dtype=torch.complex64))]),
    "is torch.sparse_coo, not dense": lambda: AdamW([P(torch.ones(3).to_sparse())]),
    "is expanded": lambda: AdamW([P(torch.ones(3).expand(4, 3))]),
    "group 0 has a parameter twice": lambda: AdamW(ONE + ONE),
    "several devices, cpu and meta": lambda: AdamW([*ONE, P(torch.ones(3, device="meta"))]),
}


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("message", REFUSED)
def test_options_and_parameters_out_of_range_are_named(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_a_sparse_gradient_and_a_refused_group_change_nothing(backend: str) -> None:
    net = nn.Embedding(4, 3, sparse=True)
    optimizer = AdamW(net.parameters(), max_grad_norm=1.0)
    net(torch.tensor([1])).sum().backward()
    before = net.weight.detach().clone()
    with pytest.raises(ValueError, match="takes dense gradients, got one"):
        optimizer.step()
    with pytest.raises(ValueError, match="group 1: eps must be >= 0"):
        optimizer.add_param_group({"params": [P(torch.ones(2))], "eps": -1.0})
    assert torch.equal(net.weight, before) and optimizer.counts.tolist() == [0, 0, 0]
    assert len(optimizer.param_groups) == 1
    empty = AdamW([{"params": []}, {"params": net.parameters()}])  # as torch's does
    net.weight.grad = net.weight.grad.to_dense()
    empty.step()
    assert not torch.equal(net.weight, before)


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "has 'param_groups'": lambda s: s.pop("param_groups"),
    "has 2 parameter groups, the optimizer 1": lambda s: s["param_groups"].append({}),
    "group 0 has no betas": lambda s: s["param_groups"][0].pop("betas"),
    "group 0 of the state has no params": lambda s: s["param_groups"][0].pop("params"),
    "group 0: amsgrad is not": lambda s: s["param_groups"][0].update(amsgrad=True),
    "the state has 5 parameters, that": lambda s: s["param_groups"][0]["params"].pop(),
    "parameter 2 lacks exp_avg_sq": lambda s: s["state"][2].pop("exp_avg_sq"),
    "parameter 2 lacks ema_1": lambda s: s["state"][2].pop("ema_1"),
    "ema_1 is .1, 3., the parameter .8, 3.": lambda s: s["state"][2].update(ema_1=torch.ones(1, 3)),
    "exp_avg is None": lambda s: s["state"][2].update(exp_avg=None),
    "step must have 1 element": lambda s: s["state"][2].update(step=torch.ones(2)),
    "counts of the state must be 3": lambda s: s.update(counts=[1, 2]),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(message: str) -> None:
    net = network()
    optimizer = AdamW(net.parameters(), lr=0.1, ema=(EMA(0.9), EMA(0.5)))
    train(net, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    train(net, optimizer, 2)
    kept = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"] = 7.0
    BROKEN[message](state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == kept["param_groups"]
    assert torch.equal(after["counts"], kept["counts"])
    for index, entries in kept["state"].items():
        assert all(torch.equal(t, after["state"][index][name]) for name, t in entries.items())
