"""Models of diffusers from their folders: network, path, prediction and shape by their configs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastcm.adapters.families import FAMILIES
from fastcm.adapters.network import DiffusersNetwork
from fastcm.adapters.schedulers import parameterization_of
from fastcm.networks.conditions import Null
from fastcm.parameterization import Parameterization, Prediction
from fastcm.paths import Linear
from fastcm.schedules import ShiftedGrid, resolution_mu

OLDER = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
"""What became of a Transformer2DModel, by its norm_type; checkpoints still name that."""

Config = Mapping[str, Any]
INDEX, MODEL, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"


@dataclass(frozen=True)
class DiffusersModel:
    """What a folder of diffusers holds.

    Args:
        network: ``network(x, t, cond) -> F``.
        parameterization: its path and prediction type.
        shape: of one sample ``[C, ...]``; None where nothing says it.
        null_condition: where the configs say it: the label of no class of a DiT, zeros of SDXL.
        scheduler: the config of the scheduler, empty where there was none.
    """

    network: DiffusersNetwork = field(repr=False)
    parameterization: Parameterization
    shape: tuple[int, ...] | None
    null_condition: Null
    scheduler: Config = field(repr=False)

    def shift(self, shape: Sequence[int] | None = None) -> float:
        """Of the times of a flow, by the scheduler's config; 1 is none.

        Args:
            shape: of one sample, which it may depend on; default `shape`.

        Raises:
            ValueError: it depends on the shape, which nothing says.
        """
        config = self.scheduler
        if not config.get("use_dynamic_shifting"):
            key = "flow_shift" if config.get("use_flow_sigmas") else "shift"
            return float(config.get(key) or 1.0)
        size = self.shape if shape is None else tuple(shape)
        if size is None:
            raise ValueError("the shift depends on the resolution: give shape, of one sample")
        pairs = (("base_tokens", "base_image_seq_len"), ("max_tokens", "max_image_seq_len"),
                 ("base", "base_shift"), ("max", "max_shift"))  # fmt: skip
        given = {ours: config[theirs] for ours, theirs in pairs if config.get(theirs) is not None}
        mu = resolution_mu(self.network.call.tokens(size), **given)
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)

    def grid(self, shape: Sequence[int] | None = None) -> ShiftedGrid:
        """The grid of `shift`, for training and sampling."""
        return ShiftedGrid(self.shift(shape))


def load(
    source: str | Path | nn.Module,
    *,
    scheduler: str | Path | Config | object | None = None,
    parameterization: Parameterization | None = None,
    prediction: Prediction | None = None,
    time_scale: float | None = None,
    shape: Sequence[int] | None = None,
    component: str | None = None,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> DiffusersModel:
    """A model of diffusers as a network, with what its configs say of it.

    Nothing is downloaded or unpickled: weights are read from safetensors.

    Args:
        source: folder of a pipeline (with model_index.json) or of a model (with config.json), or
            the model itself.
        scheduler: for a model: folder or file of its scheduler's config, the config, or the
            scheduler. For a pipeline in the place of its own.
        parameterization: in the place of what the scheduler says.
        prediction: "eps", "v" or "x0", where the scheduler's config has no prediction_type.
        time_scale: timestep of the model / network time; needed for a flow without a scheduler.
        shape: of one sample ``[C, ...]``; default that of the config, where it has one.
        component: of a pipeline with several networks, such as "transformer_2".
        dtype: of the weights.
        variant: of the weights' files, such as "fp16".

    Raises:
        ValueError: a class that is not known; something that the configs do not say, or
            contradict: the message names the argument.
        FileNotFoundError: no such folder, or no safetensors in it.
        ImportError: diffusers is not installed.
    """
    index: Config = {}
    if isinstance(source, nn.Module):
        model = source
    else:
        folder = Path(source)
        if (folder / INDEX).is_file():
            index = read_json(folder / INDEX)
            component = component_of(index, component)
            own = folder / "scheduler"
            if scheduler is None and (own / SCHEDULER).is_file():
                scheduler = own
            folder = folder / component
        model = _pretrained(folder, dtype, variant)
    if type(model).__name__ not in FAMILIES or not hasattr(model, "config"):
        raise ValueError(
            f"{type(model).__name__} is not one of the families that are known here, "
            f"{sorted(FAMILIES)}: wrap it as DiffusersNetwork(model, time_scale=...)"
        )
    config = {} if scheduler is None else scheduler_config(scheduler)
    if parameterization is None:
        if scheduler is None:
            raise ValueError(
                "what the model predicts is said by its scheduler, and there is none: give "
                "scheduler=, the folder or config of it, or parameterization="
            )
        parameterization = parameterization_of(config, prediction)
    network = DiffusersNetwork(model)
    network.time_scale = (
        time_scale_of(network, parameterization, config) if time_scale is None else time_scale
    )
    call = network.call
    if shape is None and call.size is not None and call.channels is not None:
        shape = (call.channels, *call.size)
    if shape is not None:
        network.check_sample(tuple(shape))
    null = call.null_condition
    if null is None and index.get("force_zeros_for_empty_prompt"):
        null = {"encoder_hidden_states": 0.0}
        if "added_cond_kwargs" in call.keys:
            null["added_cond_kwargs"] = {"text_embeds": 0.0, "time_ids": None}
    size = None if shape is None else tuple(shape)
    return DiffusersModel(network, parameterization, size, null, config)


def time_scale_of(network: DiffusersNetwork, p: Parameterization, config: Config) -> float:
    """Timestep of the model / network time, by its scheduler's config.

    Raises:
        ValueError: a flow whose config does not say it.
    """
    if not isinstance(p.path, Linear):
        return network.call.unit
    timesteps = config.get("num_train_timesteps")
    if timesteps is None:
        raise ValueError(
            "what the model is told of the time of a flow is said by num_train_timesteps of its "
            "scheduler, and there is none: give time_scale= (1 for Flux, 1000 for most others)"
        )
    # the product as in 1000 * 1e-3 == 1
    return round(float(timesteps) * network.call.unit, 9)


def library() -> Any:
    """diffusers.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return import_module("diffusers")
    except ImportError as error:
        raise ImportError(
            "load and save need diffusers: pip install 'fastcm[diffusers]'"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def component_of(index: Config, component: str | None) -> str:
    """The name of a pipeline's network, in its model_index.json.

    Raises:
        ValueError: there is none, or no such; there are several and none is named.
    """
    found = [
        name
        for name, entry in index.items()
        if isinstance(entry, list) and entry[-1] in (*FAMILIES, "Transformer2DModel")
    ]
    if component is None and len(found) == 1:
        return found[0]
    if component not in found:
        parts = {name: entry[1] for name, entry in index.items() if isinstance(entry, list)}
        raise ValueError(
            f"component must be one of {found}, the networks of families that are known here, "
            f"got {component!r}; the pipeline holds {parts}"
        )
    return component


def class_of(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The class and the config of a model's folder.

    Raises:
        FileNotFoundError: it has no config.json.
        ValueError: a class that is not known.
    """
    if not (folder / MODEL).is_file():
        raise FileNotFoundError(
            f"{folder} has neither {INDEX} nor {MODEL}: give the folder of a pipeline or of a "
            "model, downloaded before"
        )
    config = read_json(folder / MODEL)
    name = config.get("_class_name")
    if name == "Transformer2DModel":
        name = OLDER.get(str(config.get("norm_type")), name)
    if name not in FAMILIES:
        raise ValueError(
            f"{folder / MODEL} is of {name!r}, which is not one of the families that are known "
            f"here, {sorted(FAMILIES)}"
        )
    return getattr(library(), name), config


def _pretrained(folder: Path, dtype: torch.dtype, variant: str | None) -> nn.Module:
    kind, _ = class_of(folder)
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{folder} has no weights in safetensors, and others are not read: it holds "
            f"{sorted(p.name for p in folder.iterdir())}"
        )
    model: nn.Module = kind.from_pretrained(
        folder, torch_dtype=dtype, variant=variant, use_safetensors=True, local_files_only=True
    )
    return model


def scheduler_config(scheduler: str | Path | Config | object) -> Config:
    """The config of a scheduler, of its folder or of its file.

    Raises:
        FileNotFoundError: no such file.
        TypeError: none of these.
    """
    if isinstance(scheduler, (str, Path)):
        path = Path(scheduler)
        return read_json(path / SCHEDULER if path.is_dir() else path)
    if isinstance(scheduler, Mapping):
        return scheduler
    config = getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        raise TypeError(
            "scheduler must be a scheduler of diffusers, its config or the path of that, got "
            f"{type(scheduler).__name__}"
        )
    return {"_class_name": type(scheduler).__name__, **config}
