"""Training and eval mode of a network's modules, and back to what each of them was in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(net: nn.Module) -> Iterator[None]:
    """The network in eval mode; afterwards every submodule is in the mode it was in."""
    in_training = to_eval(net)
    try:
        yield
    finally:
        to_training(in_training)


def to_eval(net: nn.Module) -> list[nn.Module]:
    """Put the network in eval mode; returns those of its modules that were not."""
    in_training: list[nn.Module] = []
    modules: list[nn.Module | None] = [net]
    for module in modules:  # which grows; as net.modules(), but for its bookkeeping
        if module is None:
            continue
        children = module._modules
        if children:
            modules.extend(children.values())
        if module.training:
            _set_training(module, False)
            in_training.append(module)
    return in_training


def to_training(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        _set_training(module, True)


def _set_training(module: nn.Module, value: bool) -> None:
    """As ``module.training = value``, which looks for parameters and buffers of the name first."""
    if "training" in module.__dict__:
        module.__dict__["training"] = value
    else:  # a module of TorchScript keeps it elsewhere
        module.training = value
