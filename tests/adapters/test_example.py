"""The examples of diffusers, with tiny teachers: from their arguments to what diffusers samples."""

from __future__ import annotations

import inspect
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fastcm

diffusers = pytest.importorskip("diffusers")

from their_noise import SEED, close, noise  # noqa: E402
from tiny_models import MODELS, mask, prompt  # noqa: E402

from fastcm.adapters.diffusers import load  # noqa: E402
from fastcm.adapters.lora import WithoutAdapters  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = ("distil_diffusers.py", "lora_lcm.py", "latents.py")
SCRIPT, LORA, LATENTS = (str(EXAMPLES / name) for name in NAMES)


def test_a_prompted_teacher_becomes_a_pipeline_of_four_steps(tmp_path: Path, monkeypatch, capsys):
    tiny = MODELS["pixart"]
    tiny.write(tmp_path / "teacher")
    rows = {"latents": torch.randn(20, *tiny.shape), **tiny.cond(20)}
    null = {"null.encoder_hidden_states": prompt(1, seed=5), "null.encoder_attention_mask": mask(1)}
    save_file({**rows, **null}, tmp_path / "data.safetensors")
    names = ("teacher", "data.safetensors", "student")
    monkeypatch.setattr(sys, "argv", [SCRIPT, *(str(tmp_path / name) for name in names), "3"])
    runpy.run_path(SCRIPT)
    assert "(prompt, num_inference_steps=4, guidance_scale=1.0)" in capsys.readouterr().out
    saved = load(tmp_path / "student")
    assert saved.scheduler["_class_name"] == "LCMScheduler"
    assert saved.parameterization == load(tmp_path / "teacher").parameterization
    sampler = fastcm.Sampler(saved.network, saved.parameterization, steps=4, shape=saved.shape)
    run = fastcm.Sampler.from_run(tmp_path / "student-run", net=load(tmp_path / "teacher").network,
                                  steps=4)  # fmt: skip
    assert torch.equal(sampler(2, cond=tiny.cond(2)), run(2, cond=tiny.cond(2)))


CALLS = {
    SCRIPT: "sigmas=[1.0, 0.75, 0.5, 0.25], guidance_scale=1.0)",
    LORA: "pipeline(prompt, num_inference_steps=4, guidance_scale=1.0)",
    LATENTS: "16 images in two steps: ",
}


@pytest.mark.parametrize("script", CALLS)
def test_without_arguments_a_teacher_stands_in(script: str, monkeypatch, capsys):
    if script == LORA:
        pytest.importorskip("peft")
    monkeypatch.setattr(sys, "argv", [script])
    runpy.run_path(script)
    assert CALLS[script] in capsys.readouterr().out


def test_lora_layers_make_a_pipeline_one_of_four_steps(tmp_path, our_noise, monkeypatch, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    tiny, n = MODELS["sd"], 20
    teacher = tiny.write(tmp_path / "teacher")
    rows = {"latents": torch.randn(n, *tiny.shape), "prompts": prompt(n)}
    save_file({**rows, "null": prompt(1, seed=5)[0]}, tmp_path / "data.safetensors")
    arguments = [str(tmp_path / name) for name in ("teacher", "data.safetensors", "lcm")]
    monkeypatch.setattr(sys, "argv", [LORA, *arguments, "3"])
    left = runpy.run_path(LORA)
    p, average, times = left["p"], left["average"], left["TIMES"]
    written = sum(f.stat().st_size for f in (tmp_path / "lcm" / "run").rglob("model.safetensors"))
    layers = sum(q.nbytes for q in left["student"].parameters() if q.requires_grad)
    assert layers < written < 1.1 * layers

    kind = diffusers.StableDiffusionPipeline
    parts = inspect.signature(kind.__init__).parameters.values()
    absent = {q.name: None for q in parts if q.default is q.empty and q.name != "self"}
    index = json.loads((teacher / "model_index.json").read_text())
    nothing = {name: None for name in absent if name not in index}
    described = {**{name: [None, None] for name in nothing}, **index}
    (teacher / "model_index.json").write_text(json.dumps(described))
    pipeline = kind.from_pretrained(teacher, **nothing)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae_scale_factor = 8
    pipeline.load_lora_weights(str(tmp_path / "lcm"))
    pipeline.scheduler = diffusers.LCMScheduler.from_config(pipeline.scheduler.config)
    our_noise(pipeline.scheduler)
    start = p.path.at(torch.tensor([times[0]], dtype=torch.float64)).sigma.float()
    got = pipeline(
        prompt_embeds=prompt(2), height=64, width=64, output_type="latent", num_inference_steps=4,
        guidance_scale=1.0, latents=start * noise((2, *tiny.shape)),
    )[0]  # fmt: skip
    sampler = fastcm.Sampler(average, p, times=times, shape=tiny.shape)
    wanted = sampler(2, seed=SEED, cond={"encoder_hidden_states": prompt(2)})
    close(got / wanted.std(), wanted / wanted.std())
    base = fastcm.Sampler(WithoutAdapters(average), p, times=times, shape=tiny.shape)
    without = base(2, seed=SEED, cond={"encoder_hidden_states": prompt(2)})
    assert (without - wanted).abs().max() > 1e-3 * wanted.std()
