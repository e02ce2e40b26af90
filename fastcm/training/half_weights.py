"""Weights in bfloat16 that the optimizer writes, in place of the casts of autocast.

Autocast casts each weight of each network in a kernel of its own, in every step, and the gradient
back in another. The sweep can write such copies on its way. While a loss is computed, they stand in
the places of those weights that a network does nothing with but cast them; gradients then go to the
weights all at once. The bits are those of autocast.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastcm.ema import Average
from fastcm.optim.one_sweep import OneSweep
from fastcm.precision import half_of

DTYPE = torch.bfloat16
_NEITHER = (torch.ops.aten.alias.default, torch.ops.aten.detach.default)
"""Operators that hand a tensor on."""


def half_weights(
    net: nn.Module,
    target_net: nn.Module | None,
    optimizer: Optimizer | None,
    average: Average | None,
) -> HalfWeights | None:
    """Of a training under autocast, on a GPU: on a CPU the casts cost next to nothing."""
    if not isinstance(optimizer, OneSweep) or optimizer.shadow_dtype not in (None, DTYPE):
        return None
    if half_of(net) is not None or not pays(next(net.parameters()).device):
        return None
    return HalfWeights(net, target_net, optimizer, average)


def pays(device: torch.device) -> bool:
    """Whether a cast of a weight is worth avoiding there."""
    return device.type == "cuda"


class Place(NamedTuple):
    """Where a network holds a weight, and what stands there while a loss is computed."""

    parameters: dict[str, nn.Parameter | None]
    name: str
    weight: nn.Parameter
    half: nn.Parameter


class HalfWeights:
    """Called, a context in which the networks hold bfloat16 weights; gradients are there after it.

    Args:
        net: the student.
        target_net: of its average `average`, or None.
        optimizer: of the student's weights. It keeps the copies, from `find` on.
    """

    def __init__(
        self,
        net: nn.Module,
        target_net: nn.Module | None,
        optimizer: OneSweep,
        average: Average | None,
    ) -> None:
        self._net, self._target_net = net, target_net
        self._optimizer, self._average = optimizer, average
        self._places: list[Place] | None = None
        self._holders: list[nn.Module] = []  # the optimizer keeps up what somebody holds
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        self._versions: list[int] = []

    @property
    def found(self) -> bool:
        return self._places is not None

    def find(self, loss: Callable[[], object]) -> None:
        """See which weights `loss` does nothing with but cast them."""
        with _Casts() as casts:
            loss()
        trained = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        mine = [p for p in self._net.parameters() if id(p) in trained and casts.alone(p)]
        self._places = []
        if not mine:
            return
        names = {id(p): name for name, p in self._net.named_parameters()}
        theirs = {} if self._target_net is None else dict(self._target_net.named_parameters())
        pairs = [(p, theirs.get(names[id(p)])) for p in mine]
        also = [(p, q) for p, q in pairs if q is not None and casts.alone(q)]
        if not also or self._target_net is None or self._average is None:
            self._optimizer.keep_shadows(DTYPE)
            self._replace(self._net, mine, mine, None)
            return
        i = self._optimizer.averages.index(self._average)
        self._optimizer.keep_shadows(DTYPE, (i,))
        self._replace(self._net, mine, mine, None)
        self._replace(self._target_net, [q for _, q in also], [p for p, _ in also], i)

    def _replace(
        self,
        net: nn.Module,
        weights: Sequence[nn.Parameter],
        mine: Sequence[nn.Parameter],
        i: int | None,
    ) -> None:
        """Have copies of `weights` of `net`: of the student's, `mine`, or of their average `i`."""
        holder = self._optimizer.shadow_module(nn.ParameterList(mine), i)
        self._holders.append(holder)
        holder.requires_grad_(i is None)
        pairs = list(zip(weights, holder.parameters(), strict=True))
        halves = {id(weight): half for weight, half in pairs}
        self._pairs += pairs
        assert self._places is not None
        self._places += [
            Place(module._parameters, name, weight, halves[id(weight)])
            for module in net.modules()
            for name, weight in module._parameters.items()
            if weight is not None and id(weight) in halves
        ]

    def refresh(self) -> None:
        """Copy what was written to weights other than by the sweep."""
        versions = [weight._version for weight, _ in self._pairs]
        if versions != self._versions:
            self._versions = versions
            with torch.no_grad():
                torch._foreach_copy_([h for _, h in self._pairs], [w for w, _ in self._pairs])

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.refresh()
        places = self._places or []
        for place in places:
            place.parameters[place.name] = place.half
        try:
            yield
        finally:
            for place in places:
                place.parameters[place.name] = place.weight
        self._gather()

    @torch.no_grad()
    def _gather(self) -> None:
        """Add the gradients of the copies to those of the weights."""
        arrived = [(w, h, h.grad) for w, h in self._pairs if h.grad is not None]
        if not arrived:
            return
        whole = [torch.empty_like(w) for w, _, _ in arrived]
        torch._foreach_copy_(whole, [g for _, _, g in arrived])
        for (weight, half, _), gradient in zip(arrived, whole):
            half.grad = None
            if weight.grad is None:
                weight.grad = gradient
            else:
                weight.grad += gradient


class _Casts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees what becomes of weights, by their addresses: others of the same memory count as they."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cast: set[int] = set()
        self._differentiably: Counter[int] = Counter()
        self._otherwise: set[int] = set()

    def alone(self, weight: Tensor) -> bool:
        """Whether it was cast to bfloat16, and nothing else was done with it.

        Once at most for the backward pass: gradients of two casts would add up in float32.
        """
        address = weight.data_ptr()
        is_cast = address in self._cast and address not in self._otherwise
        return is_cast and self._differentiably[address] <= 1

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func not in _NEITHER:
            is_cast = func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == DTYPE
            leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            addresses = [x.data_ptr() for x in leaves]
            (self._cast if is_cast else self._otherwise).update(addresses)
            if is_cast and torch.is_grad_enabled():
                self._differentiably.update(addresses)
        return func(*args, **kwargs)
