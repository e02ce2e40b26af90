"""Families of diffusers: tiny models of each, loaded from folders as real checkpoints are."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import fastcm
from fastcm.networks.conditions import each

diffusers = pytest.importorskip("diffusers")

from tiny_models import MODELS, B, prompted_unet  # noqa: E402

from fastcm.adapters.diffusers import DiffusersNetwork, load  # noqa: E402

VP = fastcm.VariancePreserving
SD, DDPM = VP(1000, 0.00085, 0.012), VP(1000, 1e-4, 0.02, scaled=False)
WANTED = {  # path, prediction, timestep / time, shift
    "unet": (DDPM, "eps", 1.0, 1.0),
    "labelled": (DDPM, "v", 1.0, 1.0),
    "sd": (SD, "eps", 1.0, 1.0),
    "sdxl": (SD, "eps", 1.0, 1.0),
    "lcm": (SD, "eps", 1.0, 1.0),
    "pixart": (DDPM, "eps", 1.0, 1.0),
    "pixart-sizes": (DDPM, "eps", 1.0, 1.0),
    "dit": (DDPM, "eps", 1.0, 1.0),
    "sd3": (fastcm.Linear(), "v", 1000.0, 3.0),
    "flux": (fastcm.Linear(), "v", 1.0, math.exp(0.5 + 0.65 * (16 - 256) / (4096 - 256))),
    "flux-plain": (fastcm.Linear(), "v", 1.0, 1.0),
    "sana": (fastcm.Linear(), "v", 500.0, 3.0),
    "sana-guided": (fastcm.Linear(), "v", 1000.0, 3.0),
    "wan": (fastcm.Linear(), "v", 1000.0, 5.0),
}
assert WANTED.keys() == MODELS.keys()
UNSIZED = ("flux", "flux-plain", "wan")
"""Families whose config does not name the size of a sample."""

every_family = pytest.mark.parametrize("name", MODELS)


@every_family
@torch.no_grad()
def test_a_folder_says_how_its_model_is_called_and_what_it_predicts(name: str, tmp_path: Path):
    tiny = MODELS[name]
    loaded = load(tiny.write(tmp_path))
    path, prediction, time_scale, shift = WANTED[name]
    assert loaded.parameterization == fastcm.Parameterization(path, prediction)
    assert loaded.network.time_scale == time_scale
    assert loaded.shape == (None if name in UNSIZED else tiny.shape)
    assert loaded.shift(tiny.shape) == pytest.approx(shift, rel=1e-12)
    assert loaded.grid(tiny.shape) == fastcm.schedules.ShiftedGrid(loaded.shift(tiny.shape))
    x, cond, model = torch.randn(B, *tiny.shape), tiny.cond(B), tiny.model()
    outputs = []
    for timestep in (999.0, 41.0):
        if isinstance(path, fastcm.Linear):
            t = timestep / 1000
        else:
            t = path.c_noise(torch.tensor([timestep + 1.0])).item()
        F = loaded.network(x, torch.full((B,), t), cond)
        wanted = tiny.called(model, x, torch.tensor(timestep), cond)
        torch.testing.assert_close(F, wanted, rtol=1e-4, atol=1e-5)
        outputs.append(wanted)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3, "the time is not heard"
    if cond is not None:
        other = each(lambda v: v + 1 if v.dtype == torch.long else 0.5 * v, cond)
        assert (loaded.network(x, torch.full((B,), t), other) - F).abs().max() > 1e-3


def step(net: nn.Module, objective, tiny) -> dict[str, float]:
    data = torch.randn(4, *tiny.shape)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = fastcm.AdamW(net.parameters(), lr=1e-3)
    trainer = fastcm.Trainer(
        net, objective, optimizer, data=fastcm.Dataset(data, cond=tiny.cond(4)), batch_size=2,
        compile=False, progress=False, log=lambda line: None,
    )  # fmt: skip
    trainer.fit(1)
    moved = [not torch.equal(p, q) for p, q in zip(net.parameters(), before)]
    assert any(moved) and all(p.isfinite().all() for p in net.parameters())
    return trainer


@every_family
def test_a_model_is_trained_distilled_with_guidance_and_sampled(name: str, tmp_path: Path):
    tiny = MODELS[name]
    loaded = load(tiny.write(tmp_path))
    p, net = loaded.parameterization, loaded.network
    step(copy.deepcopy(net), fastcm.FlowMatching(p), tiny)
    student = copy.deepcopy(net)
    null = tiny.null if loaded.null_condition is None else loaded.null_condition
    assert null == tiny.null
    flow = isinstance(p.path, fastcm.Linear)
    guidance = {} if null is None else {"guidance": 3.0, "null_condition": null}
    objective = fastcm.ConsistencyDistillation(
        net, p, solver="euler" if flow else "ddim", discretization=50, **guidance
    )
    step(student, objective, tiny)
    sampler = fastcm.Sampler(
        student, p, steps=2, grid=loaded.grid(tiny.shape), shape=tiny.shape, null_condition=null
    )
    samples = sampler(B, cond=tiny.cond(B), guidance=None if null is None else 2.0)
    assert samples.shape == (B, *tiny.shape) and samples.isfinite().all() and samples.std() > 0.1


@pytest.mark.parametrize("name", ["flux", "sana-guided"])
def test_a_teacher_that_embeds_the_weight_is_distilled_over_a_range(name: str):
    """What is drawn takes the place of a weight in the data."""
    tiny = MODELS[name]
    loaded = load(tiny.model(), scheduler=tiny.scheduler())
    told: list[torch.Tensor] = []
    loaded.network.model.register_forward_pre_hook(
        lambda model, args, inputs: told.append(inputs["guidance"]), with_kwargs=True
    )
    student = copy.deepcopy(loaded.network)
    objective = fastcm.ConsistencyDistillation(
        loaded.network, guidance=(1.0, 5.0), embedded_guidance=True
    )
    step(student, objective, tiny)
    teachers, *students = told
    scale = getattr(loaded.network.model.config, "guidance_embeds_scale", 1.0)
    assert all(torch.equal(teachers, w) for w in students) and teachers.std() > 0
    assert (scale <= teachers).all() and (teachers <= 5.0 * scale).all()


def test_a_student_that_embeds_the_weight_is_made_of_a_teacher_with_guidance():
    """As LCM: the same U-Net, and a projection of the weight that starts at zero."""
    tiny, settings = MODELS["sd"], {"time_cond_proj_dim": 16}
    teacher = load(tiny.model(), scheduler=tiny.scheduler())
    student = DiffusersNetwork(prompted_unet(**settings))
    found = student.model.load_state_dict(teacher.network.model.state_dict(), strict=False)
    assert found.missing_keys == ["time_embedding.cond_proj.weight"] and not found.unexpected_keys
    student.model.time_embedding.cond_proj.weight.data.zero_()
    x, t, cond = torch.randn(B, *tiny.shape), torch.full((B,), 500.0), tiny.cond(B)
    weighted = fastcm.sampling.append_weight(cond, 3.0)
    torch.testing.assert_close(student(x, t, weighted), teacher.network(x, t, cond))
    objective = fastcm.ConsistencyDistillation(
        teacher.network, teacher.parameterization, guidance=(2.0, 8.0), null_condition=tiny.null,
        solver="ddim", discretization=1000, skip=20,
    )  # fmt: skip
    step(student, objective, tiny)
    assert student.model.time_embedding.cond_proj.weight.any()


@pytest.mark.parametrize("name", ["sd", "sd3", "wan"])
def test_weights_in_half_precision_are_sampled_and_distilled(name: str):
    tiny = MODELS[name]
    model, scheduler = tiny.model(), tiny.scheduler()
    full, half = (load(m, scheduler=scheduler) for m in (model, copy.deepcopy(model).bfloat16()))
    p = full.parameterization
    drawn = [
        fastcm.Sampler(m.network, p, steps=2, shape=tiny.shape)(B, cond=tiny.cond(B))
        for m in (full, half)
    ]
    assert 0 < (drawn[1] - drawn[0]).std() < 0.05 * drawn[0].std()
    objective = fastcm.ConsistencyDistillation(
        half.network, p, guidance=2.0, null_condition=tiny.null,
        solver="euler" if name != "sd" else "ddim",
    )  # fmt: skip
    step(copy.deepcopy(full.network).requires_grad_(True), objective, tiny)


def test_a_network_is_compiled_in_one_piece():
    tiny = MODELS["flux"]
    net = load(tiny.model(), scheduler=tiny.scheduler()).network
    inputs = torch.randn(B, *tiny.shape), torch.full((B,), 0.5), tiny.cond(B)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), net(*inputs))


def test_labels_are_not_dropped_by_the_model_itself():
    tiny = MODELS["dit"]
    net = load(tiny.model(), scheduler=tiny.scheduler()).network.train()
    x, t, cond = (
        torch.randn(64, *tiny.shape),
        torch.rand(64),
        {"class_labels": torch.ones(64).long()},
    )
    assert torch.equal(net(x, t, cond), net(x, t, cond))
