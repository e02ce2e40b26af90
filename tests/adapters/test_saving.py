"""Networks written into folders of diffusers, which then samples what fastcm.Sampler does."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from their_noise import SEED, close, noise
from torch import Tensor

import fastcm
from fastcm.schedules import KarrasGrid, ShiftedGrid

diffusers = pytest.importorskip("diffusers")

from tiny_models import MODELS, B, E, L, ddpm, flux, unet  # noqa: E402

from fastcm.adapters.diffusers import DiffusersNetwork, load, save  # noqa: E402

P = fastcm.Parameterization
VP = fastcm.VariancePreserving()
LCM, EULER = "LCMScheduler", "FlowMatchEulerDiscreteScheduler"
FLOW_LCM, CM = "FlowMatchLCMScheduler", "CMStochasticIterativeScheduler"


def test_a_consistency_pipeline_samples_what_we_do(tmp_path: Path, our_noise):
    """The whole way: a folder, a run in it, another folder, and its own pipeline."""
    model, scheduler = unet(3, num_class_embeds=4), ddpm(CM)()
    theirs = diffusers.ConsistencyModelPipeline(unet=model, scheduler=scheduler)
    theirs.save_pretrained(tmp_path / "teacher")
    loaded = load(tmp_path / "teacher")
    data = fastcm.Dataset(torch.randn(8, 3, 8, 8), cond={"class_labels": torch.arange(8) % 4})
    fastcm.Trainer(
        loaded.network, fastcm.ConsistencyTraining(loaded.parameterization), data=data,
        batch_size=4, directory=tmp_path / "run", compile=False, progress=False,
        averages=(fastcm.EMA(0.9),), log=lambda line: None,
    ).fit(2)  # fmt: skip
    settings: dict[str, Any] = {"steps": 3, "grid": KarrasGrid()}
    saved = save(tmp_path / "run", tmp_path / "student", like=tmp_path / "teacher", **settings)
    assert (saved.scheduler, saved.call, saved.noise_scale) == (CM, {"num_inference_steps": 3}, 1.0)
    note = json.loads((tmp_path / "student" / "fastcm.json").read_text())
    assert note["call"] == saved.call and note["method"] == "multistep" and len(note["times"]) == 3

    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student")
    assert type(pipeline) is diffusers.ConsistencyModelPipeline
    pipeline.set_progress_bar_config(disable=True)
    pipeline.postprocess_image = lambda sample, output_type: sample  # which clamps
    our_noise(pipeline.scheduler)
    got = pipeline(4, class_labels=[0, 1, 2, 3], latents=noise((4, 3, 8, 8)), **saved.call).images
    net = DiffusersNetwork(unet(3, num_class_embeds=4))
    cond = {"class_labels": torch.arange(4)}
    for ema, same in ((0, True), (-1, False)):
        ours = fastcm.Sampler.from_run(tmp_path / "run", ema=ema, net=net, **settings)
        wanted = ours(4, seed=SEED, cond=cond)
        if same:
            close(got, wanted)
        else:
            assert (got - wanted).abs().max() > 1e-3, "the average is not the weights"


def small_vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(4,), down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), norm_num_groups=2, latent_channels=4,
    )  # fmt: skip


@pytest.mark.parametrize("steps", [1, 4])
def test_a_class_pipeline_samples_what_we_do(steps: int, tmp_path: Path, our_noise, monkeypatch):
    """Of a network in memory, with all that the pipeline has besides."""
    tiny = MODELS["dit"]
    pipeline = diffusers.DiTPipeline(tiny.model(), small_vae(), tiny.scheduler())
    pipeline.save_pretrained(tmp_path / "teacher")
    loaded = load(tmp_path / "teacher")
    saved = save(
        loaded.network, tmp_path / "student", like=tmp_path / "teacher",
        path=loaded.parameterization, steps=steps,
    )  # fmt: skip
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student")
    for p, q in zip(pipeline.vae.parameters(), small_vae().parameters()):
        assert p.shape == q.shape
    pipeline.set_progress_bar_config(disable=True)
    decoded: list[Tensor] = []
    scale = pipeline.vae.config.scaling_factor
    decode = pipeline.vae.decode
    monkeypatch.setattr(pipeline.vae, "decode", lambda x: decoded.append(scale * x) or decode(x))
    module = sys.modules[diffusers.DiTPipeline.__module__]
    start = saved.noise_scale * noise((3, 4, 8, 8))
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **settings: start)
    our_noise(pipeline.scheduler)
    pipeline([1, 5, 9], guidance_scale=1.0, output_type="pt", **saved.call)
    sampler = fastcm.Sampler(loaded.network, loaded.parameterization, steps=steps, shape=tiny.shape)
    wanted = sampler(3, seed=SEED, cond={"class_labels": torch.tensor([1, 5, 9])})
    close(decoded[0] / wanted.std(), wanted / wanted.std())


TEXT_PIPELINES: dict[str, dict[str, Any]] = {  # what each is called with besides
    "sd": {"guidance_scale": 1.0},
    "sdxl": {"guidance_scale": 1.0},
    "lcm": {"guidance_scale": 2.5},
    "pixart": {"guidance_scale": 1.0, "use_resolution_binning": False, "negative_prompt": None},
    "sd3": {"guidance_scale": 1.0},
    "flux": {"guidance_scale": 2.5},
    "flux-plain": {},
    "sana": {"guidance_scale": 1.0, "use_resolution_binning": False, "negative_prompt": None},
    "wan": {"guidance_scale": 1.0, "num_frames": 9},
}


SHIFTED = ("sd3", "flux", "flux-plain", "sana")
"""Of flows, but for Wan, whose pipeline takes no sigmas."""


def text_pipeline(name: str, folder: Path, **settings: Any) -> tuple[Any, Any, Any]:
    """A teacher, its network saved with these settings, as a pipeline without encoders; and how."""
    tiny = MODELS[name]
    teacher = tiny.write(folder / "teacher")
    index = json.loads((teacher / "model_index.json").read_text())
    parts = inspect.signature(getattr(diffusers, tiny.pipeline).__init__).parameters.values()
    absent = {p.name: [None, None] for p in parts if p.default is p.empty and p.name != "self"}
    (teacher / "model_index.json").write_text(json.dumps(absent | index))
    loaded = load(teacher)
    settings["path"] = loaded.parameterization
    saved = save(loaded.network, folder / "student", like=teacher, **settings)
    nothing = {part: None for part in absent if part not in index}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder / "student", **nothing)
    assert type(pipeline).__name__ == tiny.pipeline
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae_scale_factor = 8
    return loaded, pipeline, saved


@pytest.mark.parametrize("name", TEXT_PIPELINES)
def test_a_text_pipeline_samples_what_we_do(name: str, tmp_path: Path, our_noise):
    """From embedded prompts to latents: no encoder and no decoder is needed for that."""
    pytest.importorskip("transformers")
    tiny = MODELS[name]
    settings: dict[str, Any] = {"steps": 4}
    if name in SHIFTED:
        settings["grid"] = ShiftedGrid(3.0)
    loaded, pipeline, saved = text_pipeline(name, tmp_path, **settings)
    cond = tiny.cond(B)
    z = saved.noise_scale * noise((B, *tiny.shape))
    call = dict(TEXT_PIPELINES[name])
    if "guidance" in cond:
        cond["guidance"] = torch.full((B,), 2.5)
    packed = loaded.network.call.packed or (lambda x: x)
    takes = inspect.signature(pipeline.__call__).parameters
    for ours, theirs in (("encoder_hidden_states", "prompt_embeds"),
                         ("pooled_projections", "pooled_prompt_embeds"),
                         ("encoder_attention_mask", "prompt_attention_mask")):  # fmt: skip
        if ours in cond:
            assert theirs in takes
            call[theirs] = cond[ours]
    if name == "sdxl":  # which makes time_ids of the size
        call["pooled_prompt_embeds"] = cond["added_cond_kwargs"]["text_embeds"]
    our_noise(pipeline.scheduler, lambda shape, j: packed(noise((B, *tiny.shape), j)))
    got = pipeline(
        height=64, width=64, latents=packed(z), output_type="latent", **call, **saved.call
    )[0]
    p = loaded.parameterization
    assert (name in SHIFTED) == (isinstance(p.path, fastcm.Linear) and name != "wan")
    sampler = fastcm.Sampler(loaded.network, p, shape=tiny.shape, **settings)
    wanted = packed(sampler(B, seed=SEED, cond=cond))
    close(got / wanted.std(), wanted / wanted.std())
    assert call["prompt_embeds"].shape == (B, L, E)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_pipeline_is_told_to_rescale_its_guidance(name: str, tmp_path: Path, our_noise):
    """Teachers are called with a weight; so far as their pipeline rescales, it does so as we do."""
    pytest.importorskip("transformers")
    loaded, pipeline, saved = text_pipeline(name, tmp_path, steps=4, guidance_rescale=0.7)
    tiny = MODELS[name]
    assert saved.call == {"num_inference_steps": 4, "guidance_rescale": 0.7}
    note = json.loads((tmp_path / "student" / "fastcm.json").read_text())
    assert note["call"] == saved.call
    cond = tiny.cond(B)
    call = {"prompt_embeds": cond["encoder_hidden_states"]}
    if name == "sdxl":
        call["pooled_prompt_embeds"] = cond["added_cond_kwargs"]["text_embeds"]
    call |= {f"negative_{key}": torch.zeros_like(value) for key, value in call.items()}
    our_noise(pipeline.scheduler, lambda shape, j: noise((B, *tiny.shape), j))
    got = pipeline(
        height=64, width=64, latents=saved.noise_scale * noise((B, *tiny.shape)),
        guidance_scale=7.5, output_type="latent", **call, **saved.call,
    )[0]  # fmt: skip
    settings = {"path": loaded.parameterization, "shape": tiny.shape, "steps": 4}
    options = {"null_condition": tiny.null}
    rescaled, plain = (
        fastcm.Sampler(loaded.network, **settings, **options, guidance_rescale=share)
        for share in (0.7, None)
    )
    wanted = rescaled(B, seed=SEED, cond=cond, guidance=7.5)
    scale = wanted.std()
    close(got / scale, wanted / scale)
    assert (plain(B, seed=SEED, cond=cond, guidance=7.5) - wanted).abs().max() > 1e-2 * scale


def test_an_embedding_student_is_saved_with_its_own_config(tmp_path: Path):
    """Trained from a teacher without an embedding of the weight."""
    tiny = MODELS["flux-plain"]
    teacher = load(tiny.write(tmp_path / "teacher"))
    student = DiffusersNetwork(flux(True))
    student.model.load_state_dict(teacher.network.model.state_dict(), strict=False)
    objective = fastcm.ConsistencyDistillation(
        teacher.network, guidance=(1.0, 4.0), null_condition=tiny.null
    )
    fastcm.Trainer(
        student, objective, data=fastcm.Dataset(torch.randn(4, *tiny.shape), cond=tiny.cond(4)),
        batch_size=2, directory=tmp_path / "run", compile=False, progress=False,
        log=lambda line: None,
    ).fit(1)  # fmt: skip
    save(
        tmp_path / "run", tmp_path / "student", like=tmp_path / "teacher", steps=2,
        net=DiffusersNetwork(flux(True)),
    )  # fmt: skip
    loaded = load(tmp_path / "student")
    assert loaded.network.model.config.guidance_embeds and "guidance" in loaded.network.call.keys
    for (name, p), q in zip(student.state_dict().items(), loaded.network.state_dict().values()):
        assert name and (p - q).abs().max() < 1e-2  # the average is near


def trained(net: torch.nn.Module, p: Any, tiny: Any, run: Path) -> Path:
    fastcm.Trainer(
        net, fastcm.FlowMatching(p), batch_size=2, directory=run, compile=False, progress=False,
        data=fastcm.Dataset(torch.randn(4, *tiny.shape), cond=tiny.cond(4)),
        log=lambda line: None,
    ).fit(1)  # fmt: skip
    return run


def test_a_run_is_told_the_time_as_its_teacher(tmp_path: Path):
    """Of a schedule of another length; on another path that is asked for."""
    tiny = MODELS["sd3"]
    like = tiny.write(tmp_path / "teacher")
    ddpm(EULER, num_train_timesteps=250)().save_pretrained(like / "scheduler")
    loaded = load(like)
    run = trained(loaded.network, loaded.parameterization, tiny, tmp_path / "run")
    save(run, tmp_path / "student", like=like, steps=2)
    saved = load(tmp_path / "student")
    assert saved.network.time_scale == 250.0 == loaded.network.time_scale

    other = DiffusersNetwork(tiny.model())
    run = trained(other, P(VP, "eps"), tiny, tmp_path / "other-run")
    with pytest.raises(
        ValueError, match=r"run is on VariancePreserving, and the scheduler.*give net"
    ):
        save(run, tmp_path / "other", like=like, steps=2)
    made = save(run, tmp_path / "other", like=like, steps=2, net=DiffusersNetwork(tiny.model()))
    assert made.scheduler == LCM


def test_a_diffusers_that_is_too_old_is_named(tmp_path: Path, monkeypatch):
    class Older:
        def __init__(self, num_train_timesteps: int, shift: float) -> None: ...

    tiny = MODELS["sd3"]
    loaded, like = load(tiny.model(), scheduler=tiny.scheduler()), tiny.write(tmp_path / "teacher")
    diffusers_then = SimpleNamespace(__version__="0.30.0", **{EULER: Older})
    monkeypatch.setattr("fastcm.adapters.saving.library", lambda: diffusers_then)
    options = {"like": like, "path": loaded.parameterization, "steps": 2}
    for name, said in ((EULER, "takes .*'stochastic_sampling'"), (FLOW_LCM, "takes .*'shift'")):
        with pytest.raises(ValueError, match=rf"diffusers 0\.30\.0 has no {name} that {said}"):
            save(loaded.network, tmp_path / "student", scheduler=name, **options)


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path):
    tiny = MODELS["sd3"]
    like = tiny.write(tmp_path / "teacher")
    loaded = load(like)
    out = tmp_path / "student"

    def refused(error: type[Exception], match: str, source: Any, **options: Any) -> None:
        with pytest.raises(error, match=match):
            save(source, **{"out": out, "like": like, **options})
        assert sorted(p.name for p in tmp_path.iterdir()) == ["teacher"]

    p = loaded.parameterization
    refused(
        FileNotFoundError, "like must be the folder of a pipeline", loaded.network, like=tmp_path
    )
    refused(FileExistsError, "teacher exists", loaded.network, out=like)
    refused(ValueError, "a network needs path=", loaded.network)
    refused(ValueError, "DiffusersNetwork, got MLP", fastcm.networks.MLP(shape=(2,)), path=p)
    sampler = fastcm.Sampler(loaded.network, p)
    refused(ValueError, r"a Sampler has its settings: leave out \['steps'\]", sampler, steps=3)
    refused(ValueError, "on Linear by 'heun'", loaded.network, path=p, method="ode", solver="heun")
    refused(FileNotFoundError, "no checkpoint", tmp_path / "nowhere")
    odd = DiffusersNetwork(tiny.model(), time_scale=0.3)
    refused(
        ValueError, "time_scale is 0.3, and its pipelines give it a whole multiple", odd, path=p
    )
    vp = DiffusersNetwork(tiny.model(), time_scale=1000.0)
    refused(ValueError, "time_scale is 1000, and its pipelines give it 1 times", vp, path=P(VP))
    index = json.loads((like / "model_index.json").read_text())
    (like / "model_index.json").write_text(json.dumps({**index, "_class_name": "DiTPipeline"}))
    refused(ValueError, "DiTPipeline takes no sigmas", loaded.network, path=p, times=[1.0, 0.3])
    (like / "model_index.json").write_text(json.dumps(index))
    rescales = {"path": p, "guidance_rescale": 0.7}
    refused(ValueError, f"{tiny.pipeline} takes no guidance_rescale", loaded.network, **rescales)
    saved = save(sampler, out, like=like)
    assert saved.path == out and load(out).parameterization == p
