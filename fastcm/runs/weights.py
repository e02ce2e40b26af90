"""The weights of a network: by names that do not change, and their fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_COMPILED = "_orig_mod."


def plain(net: nn.Module) -> nn.Module:
    """The network itself of one that torch.compile made."""
    inner: nn.Module = getattr(net, "_orig_mod", net)
    return inner


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    """The state of a network, by names that do not tell whether it or parts of it are compiled."""
    return {name.replace(_COMPILED, ""): tensor for name, tensor in net.state_dict().items()}


def load_weights(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """The inverse of `weights_of`."""
    names = {name.replace(_COMPILED, ""): name for name in net.state_dict()}
    net.load_state_dict({names.get(name, name): tensor for name, tensor in weights.items()})


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A short fingerprint of named tensors."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]
