"""Runs that leave out what is frozen: small, complete with the network that is brought, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcm
from fastcm import CheckpointError, FlowMatching, Sampler, Trainer
from fastcm.networks import MLP
from fastcm.runs.checkpoint import list_checkpoints, load

WIDE = 256


class OnBase(nn.Module):
    """A wide frozen network, which counts its calls, and a small one that is trained."""

    def __init__(self, base: int = 0) -> None:
        super().__init__()
        torch.manual_seed(base)
        self.base = MLP((2,), WIDE, depth=2)
        for p in self.base.parameters():
            nn.init.normal_(p, std=0.05)
            p.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        torch.manual_seed(100)
        self.more = MLP((2,), 8, depth=1)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        if self.training:
            self.calls += 1
        out: Tensor = self.base(x, t) + self.more(x, t)
        return out


def trainer(net: nn.Module | None = None, **options: Any) -> Trainer:
    net = net or OnBase()
    options = {"compile": False, "progress": False, "log": lambda line: None, **options}
    options = {"save_frozen": False, **options}
    data = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    if options.pop("stock", False):
        options["optimizer"] = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
    return Trainer(net, FlowMatching(), data=data, batch_size=8, **options)


def bytes_of(run: Path) -> int:
    return sum(f.stat().st_size for f in list_checkpoints(run)[0].rglob("*") if f.is_file())


@pytest.mark.parametrize("stock", [False, True])
def test_checkpoints_hold_what_is_trained_and_buffers_alone(stock: bool, tmp_path: Path) -> None:
    net = OnBase()
    trainer(net, stock=stock, directory=tmp_path / "small").fit(2)
    trainer(stock=stock, save_frozen=True, directory=tmp_path / "whole").fit(2)
    groups = load(list_checkpoints(tmp_path / "small")[0]).groups
    kept = {name for name in net.state_dict() if name.startswith("more.")} | {"calls"}
    assert groups["model"].keys() == groups["average_0"].keys() == kept
    trained = sum(p.nbytes for p in net.more.parameters())
    # weights, one average, two moments; the rest is random states, names and state.json
    assert bytes_of(tmp_path / "small") < 4 * trained + 40_000
    frozen = sum(p.nbytes for p in net.base.parameters())
    assert bytes_of(tmp_path / "whole") - bytes_of(tmp_path / "small") > 2 * frozen


@pytest.mark.parametrize("stock", [False, True])
def test_a_run_goes_on_bit_for_bit_with_the_base_that_is_brought(
    stock: bool, tmp_path: Path
) -> None:
    whole = trainer(stock=stock).fit(5)
    trainer(stock=stock, directory=tmp_path).fit(3)
    halves = trainer(stock=stock, directory=tmp_path).load().fit(2)
    for name, net in whole.state.networks.items():
        other = halves.state.networks[name].state_dict()
        assert all(torch.equal(w, other[key]) for key, w in net.state_dict().items())


@pytest.mark.parametrize("ema", [0, -1])
def test_samplers_and_folders_are_completed(ema: int, tmp_path: Path) -> None:
    run = trainer(directory=tmp_path / "run").fit(3)
    trained = run.net if ema == -1 else run.ema_network(0)
    options: dict[str, Any] = {"method": "ode", "steps": 2}
    want = Sampler(trained, fastcm.Linear(), shape=(2,), **options)(4)
    x = Sampler.from_run(tmp_path / "run", net=OnBase(), ema=ema, **options)(4)
    assert torch.equal(x, want)
    folder = fastcm.save_pretrained(tmp_path / "run", tmp_path / "out", ema=ema, net=OnBase())
    x = fastcm.from_pretrained(folder, net=OnBase(base=7), **options)(4)  # it holds the base
    assert torch.equal(x, want)


def test_another_base_or_none_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer(directory=run).fit(1)
    other = OnBase(base=1)
    message = rf"the frozen parameters are not those of {run}, which leaves them out .*: give a net"
    with pytest.raises(ValueError, match=message):
        trainer(other, directory=run).load()
    with pytest.raises(ValueError, match=message):
        Sampler.from_run(run, net=other)
    with pytest.raises(ValueError, match=message):
        fastcm.save_pretrained(run, tmp_path / "out", net=other)
    lacks = rf"{run} leaves out its frozen parameters: give net=, a network that has them"
    with pytest.raises(ValueError, match=lacks):
        Sampler.from_run(run)
    with pytest.raises(ValueError, match=lacks):
        fastcm.save_pretrained(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match=r"more\..* is unexpected"):
        Sampler.from_run(run, net=MLP((2,), WIDE, depth=2))


def test_a_run_goes_on_as_it_saves(tmp_path: Path) -> None:
    trainer(directory=tmp_path / "small").fit(1)
    with pytest.raises(ValueError, match=r"leaves out .*: resume it with save_frozen=False, and"):
        trainer(save_frozen=True).load(tmp_path / "small")
    trainer(save_frozen=True, directory=tmp_path / "whole").fit(1)
    with pytest.raises(ValueError, match=r"holds its frozen .*: resume it with save_frozen=True"):
        trainer().load(tmp_path / "whole")
    nothing_frozen = MLP((2,), 8, depth=1)  # then nothing is left out
    trainer(nothing_frozen, directory=tmp_path / "plain").fit(1)
    trainer(MLP((2,), 8, depth=1), save_frozen=True).load(tmp_path / "plain")


def test_averages_by_an_optimizer_of_torch_share_what_is_frozen() -> None:
    net = OnBase()
    average = trainer(net, stock=True).fit(2).ema_network(0)
    for (name, ours), theirs in zip(average.named_parameters(), net.parameters(), strict=True):
        assert (ours.data_ptr() == theirs.data_ptr()) == name.startswith("base."), name
        assert torch.equal(ours, theirs) == name.startswith("base."), name


def test_a_base_in_bfloat16_is_known_again_in_float32(tmp_path: Path) -> None:
    def net() -> OnBase:
        made = OnBase()
        made.base.bfloat16()
        return made

    trainer(net(), directory=tmp_path, precision="bf16").fit(1)
    trainer(net(), directory=tmp_path, precision="bf16").load()
    assert torch.isfinite(Sampler.from_run(tmp_path, net=net().float(), method="ode")(2)).all()
