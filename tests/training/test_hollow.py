"""Networks on the meta device: filled as if they had been built on a CPU, or out of files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import fastcm
from fastcm.networks import MLP, DiT, UNet
from fastcm.runs.pretrained import Pretrained
from fastcm.sharding import is_hollow, materialise

CPU = torch.device("cpu")
MAKES: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: MLP((6,), 16, 2, num_classes=3, two_times=True, guided=True, log_variance=True),
    "DiT": lambda: DiT(2, 8, width=16, depth=2, num_heads=2, num_classes=3),
    "UNet": lambda: UNet(3, 8, (1, 2), num_res_blocks=1, num_heads=2, num_classes=3),
}


def hollow(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def values(net: nn.Module) -> dict[str, Tensor]:
    return dict([*net.named_parameters(), *net.named_buffers()])


def assert_same(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = values(a), values(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", MAKES)
def test_reset_draws_what_a_network_built_after_the_same_seed_has(name: str) -> None:
    before = torch.get_rng_state()
    net = hollow(MAKES[name])
    materialise(net, "reset", device=CPU, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert_same(net, MAKES[name]())


class Odd(nn.Module):
    """A parameter and buffers of its own, tied weights, a layer without a reset."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(6))
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("passing", torch.arange(6.0), persistent=False)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.second(self.first(x)) * self.scale + self.passing * t[:, None]


def test_what_init_leaves_without_values_is_named() -> None:
    with pytest.raises(ValueError, match=r"init leaves scale, kept, passing without values"):
        materialise(hollow(Odd), "reset", device=CPU)


def fill_odd(module: nn.Module) -> None:
    if isinstance(module, Odd):
        nn.init.constant_(module.scale, 2.0)
        module.kept, module.passing = torch.arange(3.0), torch.arange(6.0)


def test_a_function_fills_what_modules_do_not() -> None:
    net = hollow(Odd)
    materialise(net, fill_odd, device=CPU, seed=3)
    assert isinstance(net, Odd) and net.second.weight is net.first.weight
    assert torch.equal(net.scale, torch.full((6,), 2.0))
    torch.manual_seed(3)
    plain = Odd()
    assert torch.equal(net.first.weight, plain.first.weight)
    assert torch.equal(net.second.bias, plain.second.bias)  # drawn after a weight that is not used


@pytest.mark.parametrize("form", ["file", "folder", "index"])
def test_values_out_of_files(form: str, tmp_path: Path) -> None:
    net = MAKES["DiT"]()
    nn.init.normal_(net.output.weight)  # type: ignore[union-attr,arg-type]
    held = {name: t.contiguous() for name, t in net.state_dict().items()}
    path = tmp_path
    if form == "index":
        names = sorted(held)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, some in parts.items():
            safetensors.torch.save_file({n: held[n] for n in some}, tmp_path / file)
        where = ", ".join(f'"{n}": "{file}"' for file, some in parts.items() for n in some)
        index = tmp_path / "model.safetensors.index.json"
        index.write_text('{"weight_map": {' + where + "}}")
    else:
        path = tmp_path / "model.safetensors" if form == "file" else tmp_path
        safetensors.torch.save_file(held, tmp_path / "model.safetensors")
    filled = hollow(MAKES["DiT"])
    materialise(filled, path, device=CPU)
    assert_same(filled, net)
    read = Pretrained(path)
    weight = held["blocks.0.qkv.weight"]
    assert torch.equal(read.elements("blocks.0.qkv.weight", 5, 77), weight.flatten()[5:77])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda held: held.pop("input.bias"), "input.bias is missing"),
        (lambda held: held.update(other=torch.zeros(1)), "other is unexpected"),
        (
            lambda held: held.update({"input.bias": torch.zeros(3)}),
            r"input.bias is \[3\] instead of \[16\]",
        ),
    ],
)
def test_files_of_another_network_are_refused(change: Any, said: str, tmp_path: Path) -> None:
    held = MAKES["MLP"]().state_dict()
    change(held)
    safetensors.torch.save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"does not fit the network: {said}"):
        materialise(hollow(MAKES["MLP"]), tmp_path, device=CPU)


def test_folders_that_say_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a safetensors file nor a folder"):
        Pretrained(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="has no safetensors file"):
        Pretrained(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(fastcm.CheckpointError, match="is not a safetensors file"):
        Pretrained(tmp_path)
    for name in ("a", "b"):
        safetensors.torch.save_file({name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(fastcm.CheckpointError, match="has 3 safetensors files and no index"):
        Pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "../elsewhere.safetensors"}}')
    with pytest.raises(fastcm.CheckpointError, match="which is no file beside it"):
        Pretrained(tmp_path)
    index.write_text("{}")
    with pytest.raises(fastcm.CheckpointError, match="has no weight_map"):
        Pretrained(tmp_path)


def trainer(net: nn.Module, **options: Any) -> fastcm.Trainer:
    data = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    options = {"batch_size": 8, "progress": False, "compile": False, "log": print, **options}
    return fastcm.Trainer(net, options.pop("objective"), data=data, **options)


def mlp() -> nn.Module:
    return MLP((6,), 16, 1)


def test_a_training_from_hollow_networks_is_that_from_filled_ones() -> None:
    torch.manual_seed(0)
    net = mlp()
    torch.manual_seed(1)
    teacher = mlp()
    optimizer = fastcm.AdamW(net.parameters(), lr=1e-2)
    objective = fastcm.ConsistencyDistillation(teacher)
    plain = trainer(net, objective=objective, optimizer=optimizer).fit(3)
    hollow_net = hollow(mlp)
    filled = trainer(
        hollow_net,
        objective=fastcm.ConsistencyDistillation(hollow(mlp)),
        optimizer=fastcm.AdamW(hollow_net.parameters(), lr=1e-2),
        init="reset",
        teacher_init="reset",
    ).fit(3)
    assert_same(filled.net, plain.net)
    assert not torch.equal(values(plain.net)["input.weight"], values(mlp())["input.weight"])


def test_a_run_fills_a_network(tmp_path: Path) -> None:
    run = trainer(mlp(), objective=fastcm.FlowMatching(), directory=tmp_path / "run").fit(2)
    net = hollow(mlp)
    materialise(net, tmp_path / "run", device=CPU)
    assert_same(net, run.ema_network(0))
    with pytest.raises(ValueError, match="does not fit the network"):
        materialise(hollow(lambda: MLP((6,), 24, 1)), tmp_path / "run", device=CPU)


def test_bad_input_is_named() -> None:
    flow = fastcm.FlowMatching()
    with pytest.raises(ValueError, match="has no values: give init="):
        trainer(hollow(mlp), objective=flow)
    with pytest.raises(ValueError, match="has no values: give teacher_init="):
        trainer(mlp(), objective=fastcm.ConsistencyDistillation(hollow(mlp)))
    with pytest.raises(ValueError, match="init is for a network on the meta device"):
        trainer(mlp(), objective=flow, init="reset")
    net = copy.deepcopy(mlp())
    net.output = hollow(mlp).output  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"output\.weight is on the meta device and conditioning"):
        is_hollow(net)
