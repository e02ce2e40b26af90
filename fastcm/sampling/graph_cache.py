"""CUDA graphs of functions of tensors, one for each of the shapes that come."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from fastcm.graphs import Graphed, Side

_WARMUP, _TIMED = 2, 3
CALLS_TO_DECIDE = _WARMUP + _TIMED + 1 + _TIMED
"""Of a `GraphCache` with one name and one shape, until its graph is kept or not."""


class GraphCache:
    """Calls functions of tensors through CUDA graphs: one per function and shapes of its inputs.

    Args:
        device: of the tensors.
        moved, must, log: see `Graphed`; `moved` is a fresh one for each graph.
        capacity: graphs that are kept; the least recently used goes.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        moved: Callable[[], Callable[[], bool]],
        must: bool,
        log: Callable[[str], None],
        capacity: int = 16,
    ) -> None:
        self.side = Side(device)
        self._device = device
        self._moved, self._must, self._log = moved, must, log
        self._capacity = capacity
        self._held: OrderedDict[Hashable, tuple[list[Tensor | None], Graphed]] = OrderedDict()

    def __call__(self, name: Hashable, work: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """``work(*inputs)``, overwritten by the next call; inside ``with cache.side():``.

        Args:
            name: of the function, with everything but the inputs that its result depends on.
            work: device operations of shapes that follow from those of the inputs.
            inputs: tensors, containers of tensors, or None; copied to the memory that the graph
                reads.
        """
        given, form = _flat(inputs)
        key = (name, form, *(None if v is None else (tuple(v.shape), v.dtype) for v in given))
        if key not in self._held:
            if len(self._held) == self._capacity:
                self._held.popitem(last=False)[1][1].drop()
            static = [None if v is None else v.to(self._device, copy=True) for v in given]
            arguments = static if form is None else _pytree.tree_unflatten(static, form)
            shown = " x ".join(str(list(v.shape)) for v in given if v is not None)
            self._held[key] = (
                static,
                Graphed(
                    lambda: work(*arguments),
                    self.side,
                    moved=self._moved(),
                    must=self._must,
                    log=self._log,
                    name=f"graph of {shown}",
                    warmup=_WARMUP,
                    timed=_TIMED,
                ),
            )
        self._held.move_to_end(key)
        static, graphed = self._held[key]
        for held, value in zip(static, given):
            if held is not None and value is not None:
                held.copy_(value, non_blocking=True)
        return graphed()


def _flat(inputs: tuple[Any, ...]) -> tuple[list[Any], _pytree.TreeSpec | None]:
    """Tensors out of their containers, and what these are; None for none, which is quicker."""
    if all(v is None or isinstance(v, Tensor) for v in inputs):
        return list(inputs), None
    return _pytree.tree_flatten(inputs)
