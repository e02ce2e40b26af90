"""Networks whose parameters are averages: swapped in for a while, or alive beside the other."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastcm.sharding import dtensors

Find = Callable[[Tensor], Tensor | None]
"""From a parameter of the optimizer to its average; None for other parameters."""


@contextmanager
def swapped(module: nn.Module, find: Find) -> Iterator[nn.Module]:
    """The averages in the memory of the parameters, which are kept aside and put back.

    Addresses stay, so compiled code and captured graphs see the averages.
    """
    dtensors.reshard(module)  # a root keeps its parameters gathered after a forward pass
    found = [(dtensors.local(p), find(p)) for p in module.parameters()]
    pairs = [(parameter, average) for parameter, average in found if average is not None]
    if not pairs:
        raise ValueError(
            f"{type(module).__name__} has none of the optimizer's parameters: give the module that "
            "the optimizer was made for"
        )
    kept = [parameter.clone() for parameter, _ in pairs]
    try:
        for parameter, average in pairs:
            parameter.copy_(average)
        yield module
    finally:
        dtensors.reshard(module)
        for (parameter, _), value in zip(pairs, kept):
            parameter.copy_(value)


def alive(module: nn.Module, find: Find) -> tuple[nn.Module, Live]:
    """A copy of a module whose parameters are tensors of the optimizer, and its keeper.

    Frozen parameters are shared with the module. Where averages are of another dtype, these and
    buffers are copied and cast to it.

    Args:
        module: the network that is trained.
        find: the tensor that stands for one of its parameters.
    """
    if any(dtensors.is_dtensor(p) for p in module.parameters()):
        raise ValueError(
            "a sharded module cannot be copied: use `with optimizer.averaged(i, module):`"
        )
    # deepcopy takes what memo holds: the parameters are never copied
    memo: dict[int, object] = {}
    pairs: list[tuple[weakref.ref[Tensor], Tensor]] = []
    dtype: torch.dtype | None = None
    for parameter in module.parameters():
        average = find(parameter)
        if average is not None:
            live = nn.Parameter(average, requires_grad=False)
            memo[id(parameter)] = live
            pairs.append((weakref.ref(parameter), live))
            if average.dtype != parameter.dtype:
                dtype = average.dtype
    if not pairs:
        raise ValueError(f"{type(module).__name__} has none of the optimizer's parameters")
    if dtype is None:
        memo |= {id(p): p for p in module.parameters() if not p.requires_grad and id(p) not in memo}
    network = copy.deepcopy(module, memo).requires_grad_(False).eval()
    if dtype is not None:
        network.to(dtype)
    return network, Live(module, network, pairs, find)


class Live:
    """Keeps a network that `alive` made up to date, without keeping it in memory."""

    def __init__(
        self,
        module: nn.Module,
        network: nn.Module,
        pairs: list[tuple[weakref.ref[Tensor], Tensor]],
        find: Find,
    ) -> None:
        self._module = weakref.ref(network)
        self._pairs = pairs
        self._find = find
        self._buffers = [
            (ours._buffers, theirs._buffers, name)
            for ours, theirs in zip(module.modules(), network.modules())
            for name in ours._buffers
        ]

    def attach(self) -> None:
        """Point at the tensors of the optimizer again, after they moved."""
        for reference, live in self._pairs:
            parameter = reference()
            average = None if parameter is None else self._find(parameter)
            if average is not None:
                live.data = average

    def copy_buffers(self) -> bool:
        """False if nobody holds the network any more."""
        if self._module() is None:
            return False
        for ours, theirs, name in self._buffers:
            source, target = ours[name], theirs[name]
            if source is not None and target is not None:
                target.copy_(source)
        return True
