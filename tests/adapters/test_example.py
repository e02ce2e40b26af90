"""examples/distil_diffusers.py, with tiny teachers: from its arguments to a folder that samples."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fastcm

diffusers = pytest.importorskip("diffusers")

from tiny_models import MODELS, mask, prompt  # noqa: E402

from fastcm.adapters.diffusers import load  # noqa: E402

SCRIPT = str(Path(__file__).resolve().parents[2] / "examples" / "distil_diffusers.py")


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


def test_without_arguments_a_teacher_stands_in(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [SCRIPT])
    runpy.run_path(SCRIPT)
    assert "sigmas=[1.0, 0.75, 0.5, 0.25], guidance_scale=1.0)" in capsys.readouterr().out
