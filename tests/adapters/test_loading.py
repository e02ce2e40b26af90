"""What folders and configs of diffusers say, in all their forms, and what is asked for by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fastcm

diffusers = pytest.importorskip("diffusers")

from tiny_models import MODELS, B, flux, prompted_unet, sd3, unet, wan  # noqa: E402

from fastcm.adapters.diffusers import DiffusersNetwork, load  # noqa: E402


def test_a_consistency_model_is_read_too():
    scheduler = diffusers.CMStochasticIterativeScheduler(sigma_max=40.0)
    loaded = load(unet(), scheduler=scheduler)
    path = fastcm.VarianceExploding(0.002, 40.0, 0.5)
    assert loaded.parameterization == fastcm.Parameterization(path, "cm")
    assert loaded.network.time_scale == 1.0  # 250 ln sigma, of the path


@torch.no_grad()
@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_the_preconditioning_of_edm_is_read(name: str):
    """Which a scheduler applies to what the model returns."""
    scheduler = getattr(diffusers, name)(sigma_min=0.01, sigma_max=30.0, sigma_data=0.6)
    loaded = load(unet(3), scheduler=scheduler)
    p = loaded.parameterization
    path = fastcm.VarianceExploding(0.01, 30.0, 0.6, c_noise_scale=0.25)
    assert p == fastcm.Parameterization(path, "edm")
    scheduler.set_timesteps(5)
    sigma = scheduler.sigmas[:5].double()
    x = sigma.reshape(-1, 1, 1, 1).float() * torch.randn(5, 3, 8, 8)
    told = p.c_noise(sigma)
    torch.testing.assert_close(told, scheduler.timesteps)
    F = loaded.network(x / (sigma**2 + 0.36).sqrt().reshape(-1, 1, 1, 1).float(), told)
    for i, t in enumerate(scheduler.timesteps):
        inputs = scheduler.precondition_inputs(x[i : i + 1], sigma[i].float())
        output = loaded.network.model(inputs, t, return_dict=False)[0]
        want = scheduler.precondition_outputs(x[i : i + 1], output, sigma[i].float())
        a, b, _, _ = (c[i].float() for c in p.coefficients(sigma))
        torch.testing.assert_close(a * x[i] + b * F[i], want[0], rtol=1e-3, atol=1e-4)
    v = getattr(diffusers, name)(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="prediction_type is 'v_prediction', a schedule that no"):
        load(unet(3), scheduler=v)


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
