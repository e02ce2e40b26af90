"""Families of diffusers: tiny models of each, loaded from folders as real checkpoints are."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import fastcm
from fastcm.networks.conditions import each

diffusers = pytest.importorskip("diffusers")

from tiny_models import MODELS, B, flux, prompted_unet, sd3, unet, wan  # noqa: E402

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


def test_a_consistency_model_is_read_too():
    scheduler = diffusers.CMStochasticIterativeScheduler(sigma_max=40.0)
    loaded = load(unet(), scheduler=scheduler)
    path = fastcm.VarianceExploding(0.002, 40.0, 0.5)
    assert loaded.parameterization == fastcm.Parameterization(path, "cm")
    assert loaded.network.time_scale == 1.0  # 250 ln sigma, of the path


@torch.no_grad()
@pytest.mark.parametrize("name", ["pixart", "dit"])
def test_checkpoints_of_the_older_class_are_those_of_its_heirs(name: str, tmp_path: Path):
    """Transformer2DModel, as the released PixArt-alpha and DiT are saved."""
    tiny = MODELS[name]
    torch.manual_seed(0)
    older = diffusers.Transformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=1,
        sample_size=8, patch_size=2, norm_elementwise_affine=False, attention_bias=True,
        activation_fn="gelu-approximate", num_embeds_ada_norm=10,
        **({"norm_type": "ada_norm_zero"} if name == "dit" else
           {"norm_type": "ada_norm_single", "caption_channels": 12, "cross_attention_dim": 24}),
    ).eval()  # fmt: skip
    older.save_pretrained(tmp_path / "transformer")
    tiny.scheduler().save_pretrained(tmp_path / "scheduler")
    parts = {"transformer": ["diffusers", "Transformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(parts))
    loaded = load(tmp_path)
    assert loaded.network.name == type(tiny.model()).__name__
    x, cond = torch.randn(B, *tiny.shape), tiny.cond(B)
    F = loaded.network(x, torch.full((B,), 41.0), cond)
    wanted = older(x, timestep=torch.full((B,), 41), return_dict=False, **cond)[0][:, :4]
    torch.testing.assert_close(F, wanted, rtol=1e-4, atol=1e-5)


def test_a_model_and_a_scheduler_come_in_any_form(tmp_path: Path):
    tiny = MODELS["sd3"]
    folder = tiny.write(tmp_path)
    model, scheduler = tiny.model(), tiny.scheduler()
    file = folder / "scheduler" / "scheduler_config.json"
    forms = (scheduler, json.loads(file.read_text()), file, str(folder / "scheduler"))
    for source in (model, folder / "transformer", str(folder / "transformer")):
        for form in forms:
            loaded = load(source, scheduler=form)
            assert loaded.parameterization == fastcm.Parameterization()
            assert (loaded.network.time_scale, loaded.shift()) == (1000.0, 3.0)
    loaded = load(model, parameterization=fastcm.Parameterization(), time_scale=1000.0)
    assert loaded.shape == (4, 8, 8) and loaded.network.model is model
    assert load(folder, dtype=torch.bfloat16).network.model.dtype == torch.bfloat16


def test_what_a_config_does_not_say_is_asked_for_by_name(tmp_path: Path):
    tiny = MODELS["sd"]
    folder = tiny.write(tmp_path)
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())

    def refused(match: str, *, drop: str = "", **changed):
        wrong = {k: v for k, v in {**config, **changed}.items() if k != drop}
        with pytest.raises(ValueError, match=match):
            load(folder, scheduler=wrong)
        return wrong

    older = refused("has no prediction_type: give prediction='eps'", drop="prediction_type")
    assert load(folder, scheduler=older, prediction="v").parameterization.prediction == "v"
    refused(r"lacks \['beta_start'\]: give parameterization=", drop="beta_start")
    refused("scheduler 'MyScheduler' is not known here", _class_name="MyScheduler")
    refused("scheduler None is not known here", drop="_class_name")
    refused("prediction_type is 'flow' instead of one of", prediction_type="flow")
    refused("beta_schedule is 'squaredcos_cap_v2'", beta_schedule="squaredcos_cap_v2")
    refused("timestep_type is 'continuous'", timestep_type="continuous")
    refused("trained_betas is 'set'", trained_betas=[0.1, 0.2])
    refused("rescale_betas_zero_snr is True", rescale_betas_zero_snr=True)
    refused(
        "instead of 'flow_prediction'", _class_name="UniPCMultistepScheduler", use_flow_sigmas=True
    )
    refused(
        "invert_sigmas is True", _class_name="FlowMatchEulerDiscreteScheduler", invert_sigmas=True
    )
    with pytest.raises(ValueError, match="prediction is 'eps' by the scheduler's config, and 'v'"):
        load(folder, prediction="v")
    file.unlink()
    with pytest.raises(ValueError, match="give scheduler=, the folder or config of it, or param"):
        load(folder)
    with pytest.raises(ValueError, match=r"give time_scale= \(1 for Flux"):
        load(sd3(), parameterization=fastcm.Parameterization())
    with pytest.raises(TypeError, match="scheduler must be a scheduler of diffusers"):
        load(folder, scheduler=3)
    loaded = load(flux(False), scheduler=MODELS["flux"].scheduler())
    with pytest.raises(ValueError, match="depends on the resolution: give shape"):
        loaded.shift()
    assert load(flux(False), scheduler=MODELS["flux"].scheduler(), shape=(4, 8, 8)).shift() > 1.5


def test_folders_that_hold_something_else_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"neither model_index\.json nor config\.json"):
        load(tmp_path / "nowhere")
    folder = MODELS["wan"].write(tmp_path / "wan")
    index = json.loads((folder / "model_index.json").read_text())
    two = {**index, "transformer_2": index["transformer"], "vae": ["diffusers", "AutoencoderKLWan"]}
    (folder / "model_index.json").write_text(json.dumps(two))
    with pytest.raises(ValueError, match=r"one of \['transformer', 'transformer_2'\]"):
        load(folder)
    assert load(folder, component="transformer").parameterization == fastcm.Parameterization()
    with pytest.raises(FileNotFoundError, match=r"transformer_2 has neither"):
        load(folder, component="transformer_2")
    (folder / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(ValueError, match=r"the pipeline holds \{'vae': 'AutoencoderKL'\}"):
        load(folder)
    (folder / "model_index.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no JSON object"):
        load(folder)

    model = tmp_path / "wan" / "transformer"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "_class_name": "MyModel"}))
    with pytest.raises(ValueError, match="'MyModel', which is not one of the families"):
        load(model)
    (model / "config.json").write_text(json.dumps(config))
    weights = next(model.glob("*.safetensors"))
    weights.rename(model / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no weights in safetensors.*model\.bin"):
        load(model)
    with pytest.raises(ValueError, match="Linear is not one of the families"):
        load(nn.Linear(2, 2))
    inpainting = unet()
    inpainting.register_to_config(in_channels=5)
    with pytest.raises(ValueError, match="in_channels = 5 and out_channels = 2: it takes more"):
        DiffusersNetwork(inpainting)
    with pytest.raises(ValueError, match="addition_embed_type must be one of"):
        model = prompted_unet()
        model.register_to_config(addition_embed_type="image_hint")
        DiffusersNetwork(model)


def test_samples_and_conditions_of_the_wrong_kind_are_named():
    def refused(error, match, model, x, cond):
        with pytest.raises(error, match=match):
            DiffusersNetwork(model)(x, torch.rand(len(x)), cond)

    x = torch.randn(B, 4, 8, 8)
    cond = MODELS["flux-plain"].cond(B)
    refused(
        ValueError, r"x must be \[B, 4, H, W\].* got \[B, 3, 8, 8\]", flux(False), x[:, 1:], cond
    )
    refused(ValueError, r"x must be \[B, 4, T, H, W\]", wan(), x, MODELS["wan"].cond(B))
    refused(ValueError, r"multiples of \[2, 2\].* got \[7, 8\]", flux(False), x[:, :, 1:], cond)
    with pytest.raises(ValueError, match=r"x must be \[B, 4, H, W\]"):
        load(sd3(), scheduler=MODELS["sd3"].scheduler(), shape=(16, 8, 8))

    refused(
        ValueError,
        r"lacks \['pooled_projections'\] and has unknown \['prompt'\]: this Flux.* takes "
        "'encoder_hidden_states', 'pooled_projections' in it",
        flux(False), x, {"encoder_hidden_states": cond["encoder_hidden_states"], "prompt": x},
    )  # fmt: skip
    refused(ValueError, r"lacks \['guidance'\]", flux(True), x, cond)
    refused(
        ValueError, r"unknown \['guidance'\]", flux(False), x, {**cond, "guidance": x[:, 0, 0, 0]}
    )
    refused(ValueError, r"lacks \['encoder_hidden_states'\]", prompted_unet(), x, None)
    refused(
        TypeError, "cond must be a dict of 'encoder_hidden_states', 'pooled_", flux(False), x, x
    )
    refused(ValueError, "takes no condition", unet(), x[:, :2], {"class_labels": x})
    tiny = MODELS["sdxl"]
    cond = tiny.cond(B)
    added = {"text_embeds": cond["added_cond_kwargs"]["text_embeds"]}
    refused(
        ValueError, r"cond\['added_cond_kwargs'\] lacks \['time_ids'\]",
        tiny.model(), x, {**cond, "added_cond_kwargs": added},
    )  # fmt: skip
    refused(
        TypeError, r"cond\['added_cond_kwargs'\] must be a dict",
        tiny.model(), x, {**cond, "added_cond_kwargs": added["text_embeds"]},
    )  # fmt: skip


def test_labels_are_not_dropped_by_the_model_itself():
    tiny = MODELS["dit"]
    net = load(tiny.model(), scheduler=tiny.scheduler()).network.train()
    x, t, cond = (
        torch.randn(64, *tiny.shape),
        torch.rand(64),
        {"class_labels": torch.ones(64).long()},
    )
    assert torch.equal(net(x, t, cond), net(x, t, cond))
