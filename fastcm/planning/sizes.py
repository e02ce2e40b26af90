"""Networks by the names of their published sizes, built without memory."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastcm import networks

IMAGES, LATENTS = (3, 32, 32), (4, 32, 32)

_DIT: dict[str, dict[str, Any]] = {
    "dit-tiny": {"width": 128, "depth": 4, "num_heads": 4},
    "dit-s": {"width": 384, "depth": 12, "num_heads": 6},
    "dit-b": {"width": 768, "depth": 12, "num_heads": 12},
    "dit-l": {"width": 1024, "depth": 24, "num_heads": 16},
    "dit-xl": {"width": 1152, "depth": 28, "num_heads": 16},
}
"""Patches of 2. Source: Peebles & Xie 2023, table 1; "dit-tiny" is that of the benchmarks."""
NAMES = ("mlp", "unet", "dit", *_DIT)


def default_shape(name: str) -> tuple[int, ...]:
    """Of a sample: digits for an MLP, small images for a UNet, latents for a DiT or your own."""
    return {"mlp": (1, 8, 8), "unet": IMAGES}.get(name, LATENTS)


def network(
    name: str, shape: tuple[int, ...], num_classes: int | None, options: Mapping[str, Any]
) -> nn.Module:
    """A network of this name on the meta device.

    Args:
        name: one of `NAMES`, or ``module:function`` of your own, called without arguments.
        shape: of a sample.
        num_classes: of its labels, or None.
        options: further keywords of a network of this package, such as `two_times`.

    Raises:
        ValueError: no such name, a shape that it does not take, a function that returns no network.
        ImportError: no such module.
    """
    with torch.device("meta"):
        if ":" in name:
            return _of(name)
        description: dict[str, Any] = {"num_classes": num_classes, **options}
        if name == "mlp":
            return networks.build({"name": "mlp", "shape": shape, **description})
        if name not in NAMES:
            raise ValueError(
                f"--net must be one of {', '.join(NAMES)}, or module:function, got {name!r}"
            )
        if len(shape) != 3:
            raise ValueError(f"--net {name} needs --shape C,H,W, got {','.join(map(str, shape))}")
        description["in_channels"] = shape[0]
        if name == "unet":
            return networks.build({"name": "unet", **description})
        return networks.build(
            {"name": "dit", "size": list(shape[1:]), **_DIT.get(name, {}), **description}
        )


def _of(name: str) -> nn.Module:
    module, _, function = name.partition(":")
    make = getattr(importlib.import_module(module), function, None)
    if not callable(make):
        raise ValueError(f"--net {name}: {module} has no function {function!r}")
    net = make()
    if not isinstance(net, nn.Module):
        raise ValueError(f"--net {name} must return an nn.Module, got {type(net).__name__}")
    return net
