"""Prompts: the conditions are what pipelines of diffusers give their networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tiny_models import MODELS  # noqa: E402
from tiny_text_encoders import ENCODERS, write  # noqa: E402

from fastcm.adapters.text_encoders import load  # noqa: E402
from fastcm.networks.conditions import flattened, nested  # noqa: E402

PROMPTS = ["a cat", "dogs on grass"]


def given(name: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the pipeline, called as a whole, gives its network: null rows and the prompts'."""
    kind: Any = getattr(diffusers, MODELS[name].pipeline)
    pipeline = kind.from_pretrained(folder, **parts_without(kind))
    pipeline.set_progress_bar_config(disable=True)
    if name == "sd":  # its own does not take so few steps
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    network = getattr(pipeline, MODELS[name].component)
    calls: list[dict[str, Any]] = []
    forward = network.forward

    def recorded(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return forward(*args, **kwargs)

    network.forward = recorded
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}
    if name == "wan":
        options |= {"height": 16, "width": 16, "num_frames": 1}
    else:
        options |= {"height": 64, "width": 64}
    if name == "pixart":
        options["use_resolution_binning"] = False
    guided = {} if "flux" in name else {"guidance_scale": 3.0}
    pipeline(PROMPTS, **options, **guided)
    names = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections")
    held = (flattened({k: c.get(k) for k in (*names, "added_cond_kwargs")}) for c in calls)
    found = [{k: x for k, x in each.items() if x is not None} for each in held]
    if "flux" in name:
        return {}, found[0]
    if name == "wan":  # one call each, the prompts first
        return found[1], found[0]
    halves = {key: x.chunk(2) for key, x in found[0].items()}
    return {k: v[0] for k, v in halves.items()}, {k: v[1] for k, v in halves.items()}


def parts_without(kind: Any) -> dict[str, None]:
    import inspect

    known = ("vae", "safety_checker", "feature_extractor", "image_encoder", "transformer_2")
    takes = inspect.signature(kind.__init__).parameters
    return {name: None for name in known if name in takes}


@pytest.mark.parametrize("name", ENCODERS)
def test_a_condition_is_what_the_pipeline_gives_its_network(name: str, tmp_path: Path) -> None:
    write(name, tmp_path)
    size = (64, 64) if name == "sdxl" else None
    encoder = load(tmp_path, size=size)
    found, null = encoder.encode(PROMPTS), encoder.null()
    theirs_null, theirs = given(name, tmp_path)
    assert found.keys() == theirs.keys() == null.keys()
    for key, x in found.items():
        assert x.dtype == (torch.float16 if theirs[key].is_floating_point() else theirs[key].dtype)
        torch.testing.assert_close(x.float(), theirs[key].float(), rtol=2e-3, atol=2e-3)
        if theirs_null:
            wanted = theirs_null[key][0]
            torch.testing.assert_close(null[key].float(), wanted.float(), rtol=2e-3, atol=2e-3)
    one = encoder.encode(PROMPTS[:1])
    assert all(torch.equal(one[key][0], x[0]) for key, x in found.items() if x.dtype == torch.long)
    assert MODELS[name].cond(1).keys() - {"guidance"} == nested(found).keys()


def test_what_encodes_no_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no model_index\.json"):
        load(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    with pytest.raises(ValueError, match="the prompts of DiTPipeline are not encoded here"):
        load(tmp_path)
    write("sdxl", tmp_path / "sdxl")
    with pytest.raises(ValueError, match="told the size of its images: give size="):
        load(tmp_path / "sdxl")
