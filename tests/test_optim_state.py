"""State, averages, low-precision copies and the options of the optimizers; and what they refuse."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from fastcm import EMA, AdamW, RAdam

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
