"""Networks that people bring: each trains, samples and is read back, or is told what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastcm
from fastcm import Sampler


class Any2D(nn.Module):
    """Convolutions of any rank over ``[B, C, ...]``, with the time as a channel."""

    def __init__(self, *, rank: int = 2, channels: int = 1, **parts: Any) -> None:
        super().__init__()
        conv: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
        self.first = conv(channels + 1, 6, 3, padding=1)
        self.middle = parts.get("middle") or nn.SiLU()
        self.last = conv(6, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Any:
        at = t.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1)).expand(len(x), 1, *x.shape[2:])
        return self.last(self.middle(self.first(torch.cat([x, at], 1))))


class Checkpointing(Any2D):
    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        out: Tensor = checkpoint(super().forward, x, t, use_reentrant=False)
        return out


class Tied(nn.Module):
    """One weight, used in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        out: Tensor = self.b(self.a(x.flatten(1)).tanh() + t[:, None]).reshape(x.shape)
        return out


def parametrized() -> nn.Module:
    net = Any2D()
    nn.utils.parametrizations.weight_norm(net.first)
    return net


def frozen() -> nn.Module:
    net = Any2D()
    net.first.requires_grad_(False)
    return net


def partly_compiled() -> nn.Module:
    net = Any2D()
    net.middle = torch.compile(nn.Sequential(nn.Conv2d(6, 6, 1)), backend="eager")
    return net


class VisionTransformer(nn.Module):
    """A ViT of timm, whose tokens are told the time and made an image again."""

    def __init__(self) -> None:
        super().__init__()
        timm: Any = pytest.importorskip("timm")
        self.vit = timm.create_model(
            "vit_tiny_patch16_224", img_size=(8, 12), patch_size=4, in_chans=1, embed_dim=16,
            depth=2, num_heads=2, num_classes=0, global_pool="", class_token=False,
        )  # fmt: skip
        self.time = nn.Linear(1, 16)
        self.last = nn.Linear(16, 16)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        tokens = self.vit.patch_embed(x) + self.vit.pos_embed + self.time(t[:, None])[:, None]
        for block in self.vit.blocks:
            tokens = block(tokens)
        patches = self.last(self.vit.norm(tokens)).unflatten(1, (2, 3)).unflatten(-1, (4, 4))
        return patches.permute(0, 1, 3, 2, 4).reshape(x.shape)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "audio": (lambda: Any2D(rank=1, channels=2), (2, 10)),
    "video": (lambda: Any2D(rank=3), (1, 3, 4, 5)),
    "not square": (Any2D, (1, 3, 7)),
    "batch norm": (lambda: Any2D(middle=nn.BatchNorm2d(6)), (1, 4, 4)),
    "dropout": (lambda: Any2D(middle=nn.Dropout(0.3)), (1, 4, 4)),
    "checkpointing": (Checkpointing, (1, 4, 4)),
    "tied weights": (Tied, (1, 4, 4)),
    "parametrized": (parametrized, (1, 4, 4)),
    "frozen parts": (frozen, (1, 4, 4)),
    "compiled": (lambda: torch.compile(Any2D(), backend="eager"), (1, 4, 4)),  # type: ignore
    "compiled parts": (partly_compiled, (1, 4, 4)),
    "bfloat16": (lambda: Any2D().bfloat16(), (1, 4, 4)),
    "timm": (VisionTransformer, (1, 8, 12)),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(len(name))
    return NETWORKS[name][0]()


def trainer(net: nn.Module, objective: Any, shape: tuple[int, ...], **options: Any) -> Any:
    data = torch.randn(16, *shape, generator=torch.Generator().manual_seed(0))
    options = {"compile": False, "progress": False, "log": lambda line: None, **options}
    return fastcm.Trainer(net, objective, data=data, batch_size=8, **options)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:.*leaves .* of the .* parameters")
def test_a_network_is_taught_and_teaches(name: str, tmp_path: Path) -> None:
    shape = NETWORKS[name][1]
    net = made(name)
    before = [p.detach().clone() for p in net.parameters() if p.requires_grad]
    run = trainer(net, fastcm.FlowMatching(), shape, directory=tmp_path / "flow").fit(3)
    after = [p for p in net.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(after, before))
    assert all(p.isfinite().all() for p in net.parameters())
    student = made(name)
    objective = fastcm.ConsistencyDistillation(run.ema_network(0))
    trainer(student, objective, shape, directory=tmp_path / "cd").fit(3)
    x = Sampler(run.ema_network(0), fastcm.Linear(), shape=shape, steps=2)(3)
    assert x.shape == (3, *shape) and x.isfinite().all() and x.dtype == torch.float32

    again = trainer(made(name), fastcm.FlowMatching(), shape, directory=tmp_path / "flow").load()
    for a, b in zip(again.net.state_dict().values(), net.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("saved", "loaded"), [(True, False), (False, True)])
def test_a_compiled_network_and_the_plain_one_read_each_others_runs(
    saved: bool, loaded: bool, tmp_path: Path
) -> None:
    def net(compiled: bool) -> Any:
        torch.manual_seed(0)
        return torch.compile(Any2D(), backend="eager") if compiled else Any2D()

    run = trainer(net(saved), fastcm.FlowMatching(), (1, 4, 4), directory=tmp_path).fit(2)
    again = trainer(net(loaded), fastcm.FlowMatching(), (1, 4, 4), directory=tmp_path).load()
    for a, b in zip(again.net.parameters(), run.net.parameters(), strict=True):
        assert torch.equal(a, b)
    x = Sampler.from_run(tmp_path, net=net(loaded))(2)
    assert torch.equal(x, Sampler(run.ema_network(0), fastcm.Linear(), shape=(1, 4, 4))(2))


def test_half_precision_weights_stay_and_their_averages_do_not_round() -> None:
    lines: list[str] = []
    net = made("bfloat16")
    run = trainer(net, fastcm.ConsistencyTraining(), (1, 4, 4), log=lines.append).fit(3)
    assert "precision: bf16, as the weights are" in lines
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in run.ema_network(0).parameters()} == {torch.float32}
    student = Any2D()
    trainer(student, fastcm.ConsistencyDistillation(net), (1, 4, 4)).fit(1)
    half = Sampler(Any2D().half(), fastcm.Linear(), shape=(1, 4, 4))(2)
    assert half.dtype == torch.float32 and half.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_that_cannot_be_trained_are_named(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"first.weight is {name}, where .*: train net.float\(\)"):
        trainer(Any2D().to(dtype), fastcm.FlowMatching(), (1, 4, 4))


class Prompted(Any2D):
    """Several inputs besides state and time."""

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Any:
        mask = cond["mask"][..., None]
        told = (cond["prompt"] * mask).sum(1) / mask.sum(1) + cond["styles"][0]
        return super().forward(x + told.mean(1).reshape(-1, 1, 1, 1), t)


def test_a_network_of_several_inputs_is_taught_and_teaches(tmp_path: Path) -> None:
    def cond(n: int) -> dict[str, Any]:
        return {
            "prompt": torch.randn(n, 3, 6),
            "mask": torch.ones(n, 3),
            "styles": (torch.ones(n, 6),),
        }

    net, null = Prompted(), {"prompt": 0.0, "mask": None, "styles": (None,)}
    data = fastcm.Dataset(torch.randn(16, 1, 4, 4), cond=cond(16))
    options: dict[str, Any] = {"batch_size": 8, "compile": False, "progress": False}
    flow = fastcm.FlowMatching(condition_dropout=0.2, null_condition=null)
    run = fastcm.Trainer(net, flow, data=data, directory=tmp_path, **options).fit(2)
    objective = fastcm.ConsistencyDistillation(
        run.ema_network(0), guidance=2.0, null_condition=null
    )
    student = fastcm.Trainer(Prompted(), objective, data=data, **options).fit(2)
    sampler = Sampler(student.net, fastcm.Linear(), shape=(1, 4, 4), steps=2)
    assert sampler(3, cond=cond(3)).isfinite().all()


def test_what_is_wrapped_for_several_processes_teaches_and_is_unwrapped_to_be_taught() -> None:
    torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        net = nn.parallel.DistributedDataParallel(Any2D())
        message = r"wrapped in DistributedDataParallel.*: give net.module, and parallel='ddp'"
        with pytest.raises(ValueError, match=message):
            trainer(net, fastcm.FlowMatching(), (1, 4, 4))
        trainer(Any2D(), fastcm.ConsistencyDistillation(net), (1, 4, 4)).fit(1)
        assert Sampler(net, fastcm.Linear(), shape=(1, 4, 4))(2).isfinite().all()
    finally:
        torch.distributed.destroy_process_group()


class WithoutCondition(Any2D):
    def forward(self, x: Tensor, t: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, t)


class Tuple(Any2D):
    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Any:
        return (super().forward(x, t),)


@dataclass
class ModelOutput:
    sample: Tensor


class Output(Any2D):
    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Any:
        return ModelOutput(super().forward(x, t))


def test_a_network_that_is_called_in_another_way_is_told_how() -> None:
    wanted = r"net is called as net\(x, t, cond\), and WithoutCondition.forward takes \(x"
    with pytest.raises(TypeError, match=wanted):
        trainer(WithoutCondition(), fastcm.FlowMatching(), (1, 4, 4))
    with pytest.raises(TypeError, match=wanted):
        Sampler(WithoutCondition(), fastcm.Linear())
    with pytest.raises(TypeError, match=r"teacher is called as teacher\(x, t, cond\)"):
        objective = fastcm.ConsistencyDistillation(WithoutCondition())
        trainer(Any2D(), objective, (1, 4, 4))
    with pytest.raises(TypeError, match=r"called as net\(x, t, cond, s=s\) for the mean velocity"):
        trainer(Any2D(), fastcm.MeanFlow(), (1, 4, 4))
    with pytest.raises(TypeError, match=r"s=s\)"):
        Sampler(Any2D(), fastcm.Linear(), method="flow-map")
    for net, name in ((Tuple(), "tuple"), (Output(), "ModelOutput")):
        with pytest.raises(TypeError, match=f"must return a tensor, got {name}: wrap it"):
            trainer(net, fastcm.FlowMatching(), (1, 4, 4)).fit(1)
        with pytest.raises(TypeError, match=f"teacher must return a tensor, got {name}"):
            trainer(Any2D(), fastcm.ConsistencyDistillation(net), (1, 4, 4)).fit(1)
