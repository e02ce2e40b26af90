"""LoRA students: what is trained, averaged, merged and saved; the teacher within the student."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastcm
from fastcm import networks, planning
from fastcm.adapters import lora
from fastcm.runs.checkpoint import list_checkpoints
from fastcm.runs.checkpoint import load as load_checkpoint

peft = pytest.importorskip("peft")


def base() -> nn.Module:
    torch.manual_seed(0)
    net = networks.MLP((2,), 16, depth=2)
    for p in net.parameters():  # the last layer is zero, and nothing would be learned
        nn.init.normal_(p, std=0.2)
    return net


def with_lora(net: nn.Module, **options: Any) -> Any:
    config = peft.LoraConfig(r=2, target_modules=["fc", "modulation"], **options)
    return peft.inject_adapter_in_model(config, net)


X, T = torch.linspace(-1, 1, 16).reshape(8, 2), torch.linspace(0.1, 0.9, 8)


def distilled(net: nn.Module, steps: int = 4, **options: Any) -> fastcm.Trainer:
    objective = fastcm.ConsistencyDistillation(lora.WithoutAdapters(net))
    options = {"compile": False, "progress": False, "log": lambda line: None, **options}
    data = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    return fastcm.Trainer(net, objective, data=data, batch_size=16, **options).fit(steps)


def trained_names(net: nn.Module) -> list[str]:
    return [name for name, p in net.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("compile", [False, True])
def test_the_teacher_is_the_network_without_its_layers(compile: bool) -> None:
    net = base()
    want = net(X, T).detach()
    student = with_lora(net)
    names = trained_names(student)
    assert names and all("lora_" in name for name in names)
    frozen = {n: p.clone() for n, p in student.named_parameters() if not p.requires_grad}
    trainer = distilled(student, compile=compile)
    teacher = lora.WithoutAdapters(student)
    assert torch.equal(teacher(X, T), want) and not list(teacher.parameters())
    assert not torch.allclose(student(X, T), want)
    assert trained_names(student) == names
    held = dict(student.named_parameters())
    assert all(torch.equal(held[name], value) for name, value in frozen.items())
    assert trainer.optimizer.state_dict()["state"].keys() == {*range(len(names))}


def test_the_numbers_are_those_of_a_teacher_of_its_own() -> None:
    student, fresh = with_lora(base()), with_lora(base())
    fresh.load_state_dict(student.state_dict())
    distilled(student)
    objective = fastcm.ConsistencyDistillation(base())
    data = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"compile": False, "progress": False, "log": lambda line: None}
    fastcm.Trainer(fresh, objective, data=data, batch_size=16, **options).fit(4)
    for a, b in zip(student.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_averages_share_what_is_frozen() -> None:
    student = with_lora(base())
    trainer = distilled(student)
    pairs = list(zip(trainer.ema_network(0).named_parameters(), student.parameters(), strict=True))
    for (name, ours), theirs in pairs:
        assert (ours.data_ptr() == theirs.data_ptr()) == ("lora_" not in name), name


def test_merged_is_a_plain_network() -> None:
    student = with_lora(base(), lora_alpha=3)
    trainer = distilled(student)
    average = trainer.ema_network(0)
    want, before = average(X, T), copy.deepcopy(average.state_dict())
    plain = lora.merged(average)
    assert plain.state_dict().keys() == base().state_dict().keys()
    torch.testing.assert_close(plain(X, T), want)
    assert all(torch.equal(a, b) for a, b in zip(average.state_dict().values(), before.values()))
    assert all(p.requires_grad for p in plain.parameters())


def test_a_model_of_peft_is_a_student_too(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["fc", "modulation"])
    student = peft.get_peft_model(base(), config)
    average = distilled(student, directory=tmp_path, save_frozen=False).ema_network(0)
    read = fastcm.Sampler.from_run(tmp_path, net=peft.get_peft_model(base(), config), steps=1).net
    assert torch.equal(read(X, T), average(X, T))
    plain = lora.merged(read)
    assert type(plain) is networks.MLP and not hasattr(plain, "peft_config")
    torch.testing.assert_close(plain(X, T), average(X, T))


def test_a_network_without_layers_is_named(tmp_path: Path) -> None:
    for act in (lora.WithoutAdapters, lora.merged, lambda net: lora.save_lora(net, tmp_path)):
        with pytest.raises(ValueError, match="MLP has no LoRA layers: put them in with peft"):
            act(base())


def test_diffusers_reads_what_is_saved(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")

    def model() -> Any:
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8),
            layers_per_block=1, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip

    made = model()
    made.add_adapter(peft.LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"]))
    for p in made.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    file = lora.save_lora(made, tmp_path, prefix="unet")
    x, t, prompt = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 9.0]), torch.randn(2, 3, 8)
    want = made(x, t, prompt).sample
    other = model()
    assert not torch.allclose(other(x, t, prompt).sample, want)
    other.load_lora_adapter(str(tmp_path), weight_name=file.name, prefix="unet")
    torch.testing.assert_close(other(x, t, prompt).sample, want)


def test_a_run_of_layers_alone_is_read_into_the_base_with_layers(tmp_path: Path) -> None:
    student = with_lora(base())
    trainer = distilled(student, directory=tmp_path, save_frozen=False)
    (checkpoint,) = list_checkpoints(tmp_path)
    groups = load_checkpoint(checkpoint).groups
    assert groups["model"] and all("lora_" in name for name in groups["model"])
    read = fastcm.Sampler.from_run(tmp_path, net=with_lora(base()), steps=1)
    average = trainer.ema_network(0)
    assert torch.equal(read.net(X, T), average(X, T))
    torch.testing.assert_close(lora.merged(read.net)(X, T), average(X, T))
    folder = fastcm.save_pretrained(tmp_path, tmp_path / "folder", net=with_lora(base()))
    whole = fastcm.from_pretrained(folder, net=with_lora(networks.MLP((2,), 16, depth=2)))
    assert torch.equal(whole.net(X, T), average(X, T))
    resumed = distilled(with_lora(base()), 0, directory=tmp_path, save_frozen=False).load()
    assert resumed.step == 4 and torch.equal(resumed.net(X, T), student(X, T))
    with pytest.raises(fastcm.CheckpointError, match=r"lora_.* is unexpected"):
        fastcm.Sampler.from_run(tmp_path, net=base())


def test_a_step_is_planned_with_one_base() -> None:
    net = base()
    frozen = sum(p.nbytes for p in net.parameters())
    student = with_lora(net)
    layers = sum(p.numel() for p in student.parameters() if p.requires_grad)
    objective = fastcm.ConsistencyDistillation(lora.WithoutAdapters(student))
    plan = planning.plan(student, objective, shape=(2,), batch=8)
    held = plan.memory["whole"][False]
    assert held["parameters"] == frozen + 4 * layers and held["teacher"] == 0
    assert held["moments"] == 8 * layers and held["averages"] == 8 * layers  # also the target's
    assert [e.network for e in plan.counts.evaluations] == ["teacher", "target", "student"]
    own = planning.plan(student, fastcm.ConsistencyDistillation(base()), shape=(2,), batch=8)
    assert own.memory["whole"][False]["teacher"] == frozen
    # without the products of the layers
    assert plan.counts.flops("teacher") == own.counts.flops("teacher")
    assert plan.counts.flops("teacher") < plan.counts.flops("target")


def test_merged_layers_are_a_pipeline_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from tiny_models import MODELS

    from fastcm.adapters.diffusers import load, save

    tiny = MODELS["sd"]
    loaded = load(tiny.write(tmp_path / "teacher"))
    loaded.network.model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    for name, p in loaded.network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    options: dict[str, Any] = {"path": loaded.parameterization, "steps": 2}
    plain = lora.merged(loaded.network)
    save(plain, tmp_path / "student", like=tmp_path / "teacher", **options)
    again = load(tmp_path / "student").network
    x, t = torch.randn(2, *tiny.shape), torch.tensor([3.0, 900.0])
    want = loaded.network(x, t, tiny.cond(2))
    torch.testing.assert_close(again(x, t, tiny.cond(2)), want)
    with lora._off(lora.layers(loaded.network)):
        assert not torch.allclose(loaded.network(x, t, tiny.cond(2)), want)
