"""The line that says that a step will not fit, and when there is none."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcm import ConsistencyTraining, FlowMatching, Trainer
from fastcm.networks import MLP, UNet
from fastcm.planning import count, shortage
from fastcm.planning.memory import free_memory

NET = MLP((4,), 64, 3)
ROWS = torch.zeros(64, 4)


def needed(rows: int) -> int:
    activations = count(NET, FlowMatching(), ROWS[:rows]).activations
    return activations + sum(p.nbytes for p in NET.parameters())


def test_it_says_what_is_needed_and_which_micro_batch_fits() -> None:
    assert shortage(NET, FlowMatching(), ROWS, free=needed(64)) is None
    line = shortage(NET, FlowMatching(), ROWS, free=needed(64) - 1)
    assert line is not None and line.startswith("memory: a step on 64 rows needs ")
    (parts,) = re.findall(r"--accumulate (\d+) ", line)
    assert "micro-batches of 32 rows fit" in line and parts == "2" and "--batch" in line
    assert shortage(NET, FlowMatching(), ROWS, accumulate=2, free=needed(64) - 1) is None
    line = shortage(NET, FlowMatching(), ROWS, free=1000)
    assert line is not None and "not even one row fits" in line


class Described(nn.Module):
    """Its condition is a dictionary of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        out: Tensor = self.fc(x) * cond["scale"][:, None]
        return out


def test_a_condition_may_be_nested() -> None:
    cond = {"scale": torch.ones(64)}
    line = shortage(Described(), FlowMatching(), ROWS, cond, accumulate=4, free=1)
    assert line is not None and "16 rows" in line


def test_memory_of_this_host_is_known() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is not None and 2**20 < free < 2**50
    assert free_memory(torch.device("meta")) is None


class Asks(nn.Module):
    """Does not run on the meta device: it looks at a value."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.fc(x) if float(t.max()) <= 1.0 else x


def trained(net: nn.Module, free: int, monkeypatch: pytest.MonkeyPatch, **more: Any) -> list[str]:
    monkeypatch.setattr("fastcm.planning.memory.free_memory", lambda device: free)
    lines: list[str] = []
    trainer = Trainer(
        net,
        ConsistencyTraining(),
        data=torch.randn(64, 4),
        batch_size=64,
        compile=False,
        progress=False,
        log=lines.append,
        **more,
    )
    trainer.fit(2)
    trainer.fit(1)
    assert trainer.step == 3 and not any(p.is_meta for p in trainer.net.parameters())
    return [line for line in lines if line.startswith("memory:")]


def test_a_trainer_says_it_once_and_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = trained(MLP((4,), 64, 3), 10_000, monkeypatch)
    assert "64 rows" in line and "10 kB are free on this host" in line
    assert trained(MLP((4,), 64, 3), 2**40, monkeypatch) == []
    (line,) = trained(MLP((4,), 64, 3), 10_000, monkeypatch, accumulate=4)
    assert "16 rows" in line


def test_it_is_silent_where_it_cannot_be_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trained(Asks(), 1, monkeypatch) == []
    hooked = MLP((4,), 16, 1)
    hooked.register_forward_hook(lambda module, args, out: None)
    assert trained(hooked, 1, monkeypatch) == []


def test_it_changes_no_bit_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for free in (1, 2**40):
        torch.manual_seed(0)
        net, data = MLP((4,), 16, 2), torch.randn(64, 4)
        monkeypatch.setattr("fastcm.planning.memory.free_memory", lambda device, f=free: f)
        options: dict[str, Any] = {"compile": False, "progress": False, "log": lambda line: None}
        Trainer(net, FlowMatching(), data=data, batch_size=16, **options).fit(3)
        ends.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_it_takes_less_than_a_second_of_the_default_unet() -> None:
    """On 28 x 28 images at the default batch: the step that surprises on a small host."""
    net, images = UNet(1), torch.zeros(256, 1, 28, 28, dtype=torch.uint8)
    start = time.process_time()  # others on the machine are not its fault
    line = shortage(net, ConsistencyTraining(), images, free=4 * 10**9)
    assert time.process_time() - start < 1.0
    assert line is not None and re.search(r"needs [\d.]+ GB at least", line)
