"""Prompts as the conditions of text models, by the pipelines of diffusers themselves.

A pipeline is opened without its network and autoencoder, and asked by its own ``encode_prompt``,
with what its call has as defaults (the number of tokens, Sana's instruction), so that a condition
is what the pipeline gives its network.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcm.adapters.loading import INDEX, library, read_json
from fastcm.networks.conditions import flattened
from fastcm.runs.checkpoint import digest

Both = tuple[dict[str, Any], dict[str, Any]]
"""The condition of prompts, and the null one, by the keywords of the model's ``forward``."""


def _plain(pipeline: Any, prompts: Sequence[str], options: dict[str, Any]) -> Both:
    found, null = pipeline.encode_prompt(list(prompts), **options)
    return {"encoder_hidden_states": found}, {"encoder_hidden_states": null}


def _masked(pipeline: Any, prompts: Sequence[str], options: dict[str, Any]) -> Both:
    found, mask, null, null_mask = pipeline.encode_prompt(list(prompts), **options)
    names = ("encoder_hidden_states", "encoder_attention_mask")
    return dict(zip(names, (found, mask))), dict(zip(names, (null, null_mask)))


def _sdxl(pipeline: Any, prompts: Sequence[str], options: dict[str, Any]) -> Both:
    size = options.pop("size")
    found, null, pooled, null_pooled = pipeline.encode_prompt(list(prompts), **options)
    row = torch.tensor([*size, 0, 0, *size], dtype=torch.float32, device=found.device)

    def condition(states: Tensor, texts: Tensor) -> dict[str, Any]:
        added = {"text_embeds": texts, "time_ids": row.expand(len(texts), -1)}
        return {"encoder_hidden_states": states, "added_cond_kwargs": added}

    return condition(found, pooled), condition(null, null_pooled)


def _pooled(pipeline: Any, prompts: Sequence[str], options: dict[str, Any]) -> Both:
    texts = list(prompts)
    found, null, pooled, null_pooled = pipeline.encode_prompt(texts, texts, texts, **options)
    names = ("encoder_hidden_states", "pooled_projections")
    return dict(zip(names, (found, pooled))), dict(zip(names, (null, null_pooled)))


def _flux(pipeline: Any, prompts: Sequence[str], options: dict[str, Any]) -> Both:
    names = ("encoder_hidden_states", "pooled_projections")
    both = (pipeline.encode_prompt(texts, **options) for texts in (list(prompts), [""]))
    found, null = (dict(zip(names, (states, pooled))) for states, pooled, _ in both)
    return found, null


PIPELINES: dict[str, Callable[[Any, Sequence[str], dict[str, Any]], Both]] = {
    "StableDiffusionPipeline": _plain,
    "LatentConsistencyModelPipeline": _plain,
    "StableDiffusionXLPipeline": _sdxl,
    "StableDiffusion3Pipeline": _pooled,
    "FluxPipeline": _flux,
    "PixArtAlphaPipeline": _masked,
    "PixArtSigmaPipeline": _masked,
    "SanaPipeline": _masked,
    "WanPipeline": _plain,
}
"""Pipelines whose prompts are encoded, by class."""

_SHARED = ("max_sequence_length", "complex_human_instruction", "clean_caption")


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """The encoders of a pipeline, see `load`.

    Args:
        pipeline: of diffusers, with text encoders and tokenizers alone.
        options: of its ``encode_prompt``.
        record: JSON-able: class, options and a fingerprint of the weights.
    """

    pipeline: Any
    options: dict[str, Any]
    record: dict[str, Any]

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The condition of prompts.

        Args:
            prompts: at least one.

        Returns:
            Tensors of one row each by their names, those of nested keys joined by dots, such as
            ``added_cond_kwargs.text_embeds``: floats in float16, on the host.
        """
        return {name: _stored(x) for name, x in flattened(self._both(prompts)[0]).items()}

    def null(self) -> dict[str, Tensor]:
        """What stands for no condition, of the same names, without the dimension of rows."""
        return {name: _stored(x)[0] for name, x in flattened(self._both([""])[1]).items()}

    @torch.no_grad()
    def _both(self, prompts: Sequence[str]) -> Both:
        make = PIPELINES[type(self.pipeline).__name__]
        return make(self.pipeline, prompts, dict(self.options))


def load(
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    size: tuple[int, int] | None = None,
) -> TextEncoder:
    """The text encoders of a pipeline of diffusers.

    Args:
        path: folder of the pipeline, whose other parts are not read.
        device: default the CPU.
        dtype: of the weights.
        size: height and width in pixels, which SDXL is told.

    Raises:
        FileNotFoundError: it is no pipeline.
        ValueError: a pipeline that is not known here; SDXL without size.
        ImportError: diffusers or transformers is missing.
    """
    folder = Path(path)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} has no {INDEX}: give the folder of a pipeline")
    index = read_json(folder / INDEX)
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise ValueError(
            f"the prompts of {name} are not encoded here, those of {', '.join(PIPELINES)} are"
        )
    if name == "StableDiffusionXLPipeline" and size is None:
        raise ValueError("SDXL is told the size of its images: give size=(height, width)")
    kind: Any = getattr(library(), str(name))
    made_of = inspect.signature(kind.__init__).parameters.values()
    parts = [p.name for p in made_of if p.default in (p.empty, None) and p.name != "self"]
    absent = {p: None for p in parts if not p.startswith(("text_encoder", "tokenizer"))}
    pipeline = kind.from_pretrained(folder, **absent, torch_dtype=dtype, local_files_only=True)
    pipeline.to(device or "cpu")
    takes = inspect.signature(pipeline.encode_prompt).parameters
    called = inspect.signature(pipeline.__call__).parameters
    options = {n: called[n].default for n in _SHARED if n in takes and n in called}
    many = "num_videos_per_prompt" if "num_videos_per_prompt" in takes else "num_images_per_prompt"
    options |= {many: 1, "device": torch.device(device or "cpu")}
    if "do_classifier_free_guidance" in takes:
        options["do_classifier_free_guidance"] = True
    record: dict[str, Any] = {n: options[n] for n in _SHARED if n in options}
    if name == "StableDiffusionXLPipeline":
        options["size"] = record["size"] = size
    held = [getattr(pipeline, part) for part in parts if part.startswith("text_encoder")]
    weights = [digest(encoder.state_dict()) for encoder in held if encoder is not None]
    return TextEncoder(pipeline, options, {"pipeline": name, "weights": weights, **record})


def _stored(x: Tensor) -> Tensor:
    x = x.detach().cpu().contiguous()
    return x.half() if x.is_floating_point() else x
