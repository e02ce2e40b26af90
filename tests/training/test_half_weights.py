"""Training on bfloat16 weights that the sweep keeps, against autocast's casts: the same bits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastcm
from fastcm import ConsistencyDistillation, ConsistencyTraining, FlowMatching, MeanFlow
from fastcm.networks import MLP, DiT, UNet
from fastcm.training import half_weights

STEPS = 4
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": lambda **more: MLP((3, 8, 8), 16, 1, **more),
    "unet": lambda **more: UNet(3, 8, (1, 2), 1, **more),
    "dit": lambda **more: DiT(3, 8, width=32, depth=1, num_heads=2, **more),
}


def trained(
    net: nn.Module,
    objective: Any,
    patch: pytest.MonkeyPatch,
    *,
    half: bool,
    between: Callable[[fastcm.Trainer], None] = lambda trainer: None,
    **options: Any,
) -> fastcm.Trainer:
    patch.setattr(half_weights, "pays", lambda device: half)
    torch.manual_seed(0)
    options = {"compile": False, "data": torch.randn(64, 3, 8, 8), **options}
    net = copy.deepcopy(net)
    trainer = fastcm.Trainer(
        net, objective, batch_size=8, precision="bf16", progress=False, log=print, **options
    )
    for _ in range(2):
        trainer.fit(STEPS // 2)
        between(trainer)
    assert (trainer.stepper.gradients._half is not None) is half
    return trainer


def assert_same(a: fastcm.Trainer, b: fastcm.Trainer) -> None:
    for x, y in zip(a.net.parameters(), b.net.parameters(), strict=True):
        assert torch.equal(x, y)
    for i in range(len(a.averages)):
        mine, theirs = (t.ema_network(i).parameters() for t in (a, b))
        assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))


def halves(trainer: fastcm.Trainer) -> list[half_weights.Place]:
    found = trainer.stepper.gradients._half
    assert found is not None and found._places is not None
    return found._places


class Casts(TorchDispatchMode):
    """Counts the casts of parameters."""

    count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
            self.count += 1
        return func(*args, **(kwargs or {}))


def casts(trainer: fastcm.Trainer) -> int:
    with Casts() as mode:
        trainer.train_step()
    return mode.count


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", ["flow", "ct", "cd"])
def test_bits_are_those_of_autocast(
    network: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net, teacher = NETWORKS[network](), NETWORKS[network]()
    objective: Any = {
        "flow": FlowMatching(),
        "ct": ConsistencyTraining(),
        "cd": ConsistencyDistillation(teacher=teacher),
    }[method]
    on, off = (trained(net, objective, monkeypatch, half=half) for half in (True, False))
    assert_same(on, off)
    matrices = sum(p.dim() > 1 for p in net.parameters())
    assert len(halves(on)) >= matrices * (1 if method == "flow" else 2) - 4
    assert casts(on) <= casts(off) - len(halves(on))


@pytest.mark.parametrize(
    "options", [{"accumulate": 2}, {"max_grad_norm": None}, {"checkpoint": "blocks"}], ids=str
)
def test_options(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    net = NETWORKS["dit" if "checkpoint" in options else "mlp"]()
    if "checkpoint" in options:
        net = DiT(3, 8, width=32, depth=2, num_heads=2)
    runs = [
        trained(net, ConsistencyTraining(), monkeypatch, half=half, **options)
        for half in (True, False)
    ]
    assert_same(*runs)
    assert halves(runs[0])


@pytest.mark.parametrize("instant", [0.0, 0.5])
def test_derivative_in_time(instant: float, monkeypatch: pytest.MonkeyPatch) -> None:
    net, objective = NETWORKS["mlp"](two_times=True), MeanFlow(instant=instant)
    on, off = (trained(net, objective, monkeypatch, half=half) for half in (True, False))
    assert_same(on, off)
    # rows with s = t go through the network in a call of their own, with casts of their own
    assert bool(halves(on)) is (instant == 0.0)


def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    net = NETWORKS["mlp"]()
    on, off = (
        trained(net, ConsistencyTraining(), monkeypatch, half=half, compile=True)
        for half in (True, False)
    )
    for x, y in zip(on.net.parameters(), off.net.parameters(), strict=True):
        assert torch.allclose(x, y, rtol=1e-2, atol=2e-3)
    assert halves(on)


class Tied(nn.Module):
    """Two layers of one weight, one that is used as it is, one that is frozen, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(192, 192), nn.Linear(192, 192)
        self.b.weight = self.a.weight
        self.read, self.frozen = nn.Linear(192, 192), nn.Linear(192, 192).requires_grad_(False)
        self.drop, self.norm = nn.Dropout(0.1), nn.BatchNorm1d(192)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        h = self.drop(self.b(torch.relu(self.a(x.flatten(1)))))
        h = self.norm(self.read(h) + self.frozen(h)) + self.read.weight.mean()
        return h.view_as(x)


def test_weights_that_are_not_only_cast_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = Tied()
    on, off = (trained(net, FlowMatching(), monkeypatch, half=half) for half in (True, False))
    assert_same(on, off)
    assert torch.equal(on.net.norm.running_var, off.net.norm.running_var)  # type: ignore[union-attr,arg-type]
    held = {id(place.weight) for place in halves(on)}
    student = on.net
    assert isinstance(student, Tied)
    assert held == {
        id(p) for p in (student.a.weight, student.a.bias, student.b.bias, student.read.bias)
    }
    assert len(halves(on)) == 5  # one of them in two places
    assert all(place.parameters[place.name] is place.weight for place in halves(on))


def test_weights_written_from_outside_count_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def shrink(trainer: fastcm.Trainer) -> None:
        with torch.no_grad():
            for p in [*trainer.net.parameters(), *trainer.ema_network(0).parameters()]:
                p.mul_(0.5)

    net = NETWORKS["mlp"]()
    on, off = (
        trained(net, ConsistencyTraining(), monkeypatch, half=half, between=shrink)
        for half in (True, False)
    )
    assert_same(on.fit(2), off.fit(2))


def test_resumed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run goes on where it stopped, with or without them."""
    net, directory = NETWORKS["mlp"](), tmp_path / "run"
    whole = trained(net, ConsistencyTraining(), monkeypatch, half=False, directory=directory)
    whole.fit(2)
    monkeypatch.setattr(half_weights, "pays", lambda device: True)
    other = fastcm.Trainer(
        NETWORKS["mlp"](),
        ConsistencyTraining(),
        batch_size=8,
        data=whole.source.dataset,  # type: ignore[attr-defined]
        precision="bf16",
        compile=False,
        progress=False,
        log=print,
    )
    other.fit(1)
    assert_same(other.load(directory), whole)
    assert_same(other.fit(2), whole.fit(2))


def test_an_error_leaves_the_weights_in_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained(NETWORKS["mlp"](), ConsistencyTraining(), monkeypatch, half=True)
    with monkeypatch.context() as patch:
        patch.setattr(ConsistencyTraining, "loss", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train_step()
    assert all(place.parameters[place.name] is place.weight for place in halves(trainer))
