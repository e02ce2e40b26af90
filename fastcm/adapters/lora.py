"""Students that are a frozen network and LoRA layers on it (the peft library), and their teacher.

The layers are those that ``peft.inject_adapter_in_model``, ``peft.get_peft_model`` or a diffusers
model's ``add_adapter`` puts into a network. Trainer and optimizer need nothing of this: what is
frozen is neither swept nor averaged, and averages share it with the student. Source: Hu et al.
2021, LoRA; Luo et al. 2023, LCM-LoRA.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fastcm.networks.protocol import Network

_OFF = "_disable_adapters"
"""What a layer of peft asks at every call. Its own switch would also freeze the adapters."""

_MARKS = {"peft_config", "_hf_peft_config_loaded"}
"""By which peft and diffusers know a model that has layers."""


def layers(net: nn.Module) -> list[Any]:
    """The LoRA layers of a network.

    Raises:
        ValueError: there are none.
    """
    found = [m for m in net.modules() if hasattr(m, _OFF) and hasattr(m, "lora_A")]
    if not found:
        raise ValueError(
            f"{type(net).__name__} has no LoRA layers: put them in with "
            "peft.inject_adapter_in_model(LoraConfig(target_modules=...), net)"
        )
    return found


class WithoutAdapters(nn.Module):
    """A network with its LoRA layers off: the teacher of itself, which takes no memory.

    It holds no parameters: the network is not a part of it.

    Args:
        net: the network with LoRA layers, the student.

    Raises:
        ValueError: it has none.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self._layers = layers(net)  # a list: none of them becomes a part
        object.__setattr__(self, "net", net)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None, **second: Tensor) -> Tensor:
        net: Network = self.__dict__["net"]
        with _off(self._layers):
            F: Tensor = net(x, t, cond, **second)
        return F


@contextmanager
def _off(held: list[Any]) -> Iterator[None]:
    before = [layer._disable_adapters for layer in held]
    for layer in held:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, off in zip(held, before, strict=True):
            layer._disable_adapters = off


@torch.no_grad()
def merged(net: nn.Module) -> nn.Module:
    """A copy of a network with its LoRA layers added to the weights, and gone.

    Of a ``PeftModel`` it is the model inside.

    Raises:
        ValueError: it has none.
    """
    whole: nn.Module = copy.deepcopy(net)
    whole = getattr(whole, "get_base_model", lambda: whole)()
    for layer in layers(whole):
        layer.merge(safe_merge=True)
    for name, module in list(whole.named_modules()):
        if not (hasattr(module, _OFF) and hasattr(module, "lora_A")):
            continue
        parent, _, last = name.rpartition(".")
        setattr(whole.get_submodule(parent), last, module.get_base_layer())
    for module in whole.modules():
        for mark in vars(module).keys() & _MARKS:
            delattr(module, mark)
    return whole.requires_grad_(True)


def save_lora(net: nn.Module, folder: str | Path, *, prefix: str = "transformer") -> Path:
    """Write the LoRA layers alone, as ``load_lora_weights`` of a diffusers pipeline reads them.

    Args:
        net: the network with the layers, such as an average of it; of a diffusers model inside of a
            wrapper give the model.
        folder: created; the file in it is named as diffusers names it.
        prefix: the part of the pipeline: "transformer" or "unet".

    Returns:
        The file, ``pytorch_lora_weights.safetensors``.

    Raises:
        ValueError: there are no such layers.
        ImportError: peft is missing.
    """
    layers(net)
    try:
        peft: Any = importlib.import_module("peft")
    except ImportError as error:
        raise ImportError('peft is missing: pip install "fastcm[lora]"') from error
    held = peft.get_peft_model_state_dict(net)
    tensors = {f"{prefix}.{name}": value.detach().contiguous() for name, value in held.items()}
    config = next(iter(net.peft_config.values())).to_dict()  # type: ignore[operator]
    packed = {f"{prefix}.{name}": value for name, value in config.items()}
    told = json.dumps(packed, default=_plain, sort_keys=True)
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "pytorch_lora_weights.safetensors"
    safetensors.torch.save_file(tensors, file, {"format": "pt", "lora_adapter_metadata": told})
    return file


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
