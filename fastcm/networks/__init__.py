"""Small standard networks ``net(x, t, cond=None) -> F`` for demos, tests and benchmarks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from fastcm.networks.dit import DiT as DiT
from fastcm.networks.embedding import LogVariance as LogVariance
from fastcm.networks.lpips import LPIPS as LPIPS
from fastcm.networks.mixture import GaussianConsistency as GaussianConsistency
from fastcm.networks.mixture import GaussianMixture as GaussianMixture
from fastcm.networks.mlp import MLP as MLP
from fastcm.networks.unet import UNet as UNet

_NETWORKS: dict[str, type[nn.Module]] = {"mlp": MLP, "unet": UNet, "dit": DiT}


def build(description: Mapping[str, object]) -> nn.Module:
    """The network that `description` describes, freshly initialised.

    Args:
        description: ``{"name": "mlp" | "unet" | "dit", ...}`` with the constructor's keywords,
            such as ``net.description``.

    Raises:
        ValueError: the name or a keyword is unknown, a required keyword is missing, or the
            network refuses a value.
    """
    kwargs: dict[str, Any] = dict(description)
    name = kwargs.pop("name", None)
    network = _NETWORKS.get(name) if isinstance(name, str) else None
    if network is None:
        raise ValueError(f"unknown network {name!r}, expected one of {sorted(_NETWORKS)}")
    parameters = inspect.signature(network).parameters
    for keyword in kwargs:
        if keyword not in parameters:
            raise ValueError(f"unknown keyword {keyword!r} for {name!r}, valid: {list(parameters)}")
    for keyword, parameter in parameters.items():
        if parameter.default is parameter.empty and keyword not in kwargs:
            raise ValueError(f"keyword {keyword!r} is required for {name!r}")
    return network(**kwargs)
