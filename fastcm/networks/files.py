"""Weights of networks that others trained, out of local files. Nothing is unpickled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

_NAMED = 3


def read_weights(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU.

    Args:
        path: ``.safetensors``, or what ``torch.save`` wrote, of which nothing but tensors is read.
        what: whose weights, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not readable, or holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file of {what} weights: {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path, device="cpu")
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and safetensors raise many kinds
        raise ValueError(f"{path} is not a readable file of weights: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a dictionary of tensors, got {type(found).__name__}")
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def take_weights(net: nn.Module, found: Mapping[str, Tensor], where: str, hint: str) -> None:
    """Give a network on the meta device all its weights: float32, frozen, for evaluation.

    Args:
        net: whose state the weights are.
        found: by the names of that state.
        where: the file, for messages.
        hint: what to give instead, likewise.

    Raises:
        ValueError: a weight is missing, of another shape, or of no such network.
    """
    shapes = {name: value.shape for name, value in net.state_dict().items()}
    for what, names in (
        ("lacks", shapes.keys() - found.keys()),
        ("has besides", found.keys() - shapes.keys()),
    ):
        if names:
            raise ValueError(f"{where} {what} {_some(names)}: {hint}")
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise ValueError(
                f"{name!r} in {where} must be {list(shape)}, got {list(found[name].shape)}: {hint}"
            )
    weights = {name: found[name].float() for name in shapes}
    net.load_state_dict(weights, strict=False, assign=True)  # strict, torch asks for counters
    net.requires_grad_(False).eval()


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    return ", ".join(map(repr, ordered[:_NAMED])) + more
