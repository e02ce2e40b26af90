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


def frozen_of(net: nn.Module) -> dict[str, Tensor]:
    """The parameters among `weights_of` that require no gradient."""
    held = net.state_dict(keep_vars=True)
    return {
        name.replace(_COMPILED, ""): tensor.detach()
        for name, tensor in held.items()
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    }


def load_weights(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """The inverse of `weights_of`, of known names; what is not among the weights stays as it is."""
    names = {name.replace(_COMPILED, ""): name for name in net.state_dict()}
    named = {names.get(name, name): tensor for name, tensor in weights.items()}
    unknown = net.load_state_dict(named, strict=False).unexpected_keys
    assert not unknown, unknown


def digest(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """A short fingerprint of named tensors, of what they are in `dtype` if that is given."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode())
        if hasattr(tensor, "full_tensor"):  # of a shard all processes ask at once
            tensor = tensor.full_tensor()
        here = tensor.detach().cpu().to(dtype or tensor.dtype)
        sha.update(here.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]
