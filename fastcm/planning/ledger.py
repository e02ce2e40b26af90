"""What operators compute, move and keep: the entries of a step that runs on the meta device."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

from fastcm.networks.blocks import repeated_blocks
from fastcm.ops.decompositions import REFERENCES

AROUND = "around the networks"
"""The part of the step that no network has."""

Work = list[tuple[int, int]]
"""FLOPs and bytes of each operator, one after the other."""

aten = torch.ops.aten


def _products_of_attention(q: Tensor, k: Tensor, v: Tensor, *tangents: Any, **_: Any) -> int:
    """Scores and values, one more for each tangent of the three, and for that of the weights."""
    tq, tk, tv = (t is not None for t in tangents[:3])
    return 2 * (2 + tq + tk + tv + (tq or tk)) * q.numel() * k.shape[-2]


def _attention_dual(q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


_KERNELS: dict[Any, Callable[..., Any]] = {
    **REFERENCES,
    torch.ops.fastcm.attention_dual.default: _attention_dual,
}
"""What gives the shapes of the results of a launch that has no implementation without a GPU."""
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_counter.flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_counter.flop_registry[
        aten._scaled_dot_product_flash_attention
    ],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_counter.flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
    torch.ops.fastcm.attention_dual: _products_of_attention,
}
_MOVES_NOTHING = {
    aten._unsafe_view, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty,
    aten.new_empty_strided, aten.lift_fresh,
}  # fmt: skip
_OVERWRITES = {aten.copy_, aten.fill_, aten.zero_}
"""What does not read the operand that it writes."""


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, operators are entered under the part of the step that `during` names.

    What is in none is around the networks: one entry for each launch of a kernel of this package,
    which reads its operands and writes its results once, and for each operator of torch. There
    the few numbers that belong to a whole sample, its times and coefficients, do not count.

    Args:
        saved: what autograd keeps of the student's evaluations.
        elements: of a sample.

    Attributes:
        work: by part.
        saved: what autograd keeps of the student's evaluations.
    """

    def __init__(self, saved: Saved, elements: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work: dict[str, Work] = defaultdict(list)
        self.saved = saved
        self._elements = elements
        self._part: str | None = None

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Enter operators under this part; of nested ones under the outermost."""
        outer, self._part = self._part, self._part or part
        try:
            yield
        finally:
            self._part = outer

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = _KERNELS.get(func, func)(*args, **kwargs)
        least = self._elements if self._part is None else 0
        entry = flops(func, args, kwargs, out), moved(func, args, kwargs, out, least)
        if any(entry):
            self.work[self._part or AROUND].append(entry)
            if self._part == "forward" and self.saved.within_block:
                self.work["blocks"].append(entry)
        return out


def flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Two for each product of a matrix product or convolution; 0 for other operators."""
    formula = _FLOPS.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def moved(func: Any, args: Any, kwargs: Any, out: Any, elements: int = 0) -> int:
    """Bytes of the operands and results, each once; views move none.

    Args:
        elements: tensors that have fewer a row do not count.
    """
    if getattr(func, "is_view", False) or func._overloadpacket in _MOVES_NOTHING:
        return 0
    read = args[1:] if func._overloadpacket in _OVERWRITES else args
    return sum(
        min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
        for x in pytree.tree_leaves((read, kwargs, out))
        if isinstance(x, Tensor) and x.numel() >= elements * (len(x) if x.dim() else 1)
    )


class _Kept:
    """A tensor that a node of autograd keeps, for as long as the node lives."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Saved:
    """The bytes that autograd keeps for the backward pass, but for the parameters themselves.

    They are known once `settle` is called, when all that a derivative along the way kept for
    itself is gone.

    Args:
        net: the student, on the meta device; hooks are put on the blocks that it repeats.
    """

    def __init__(self, net: nn.Module) -> None:
        self._parameters = {p.untyped_storage()._cdata for p in net.parameters()}
        self._found: list[tuple[weakref.ref[_Kept], dict[int, int]]] = []
        self._alive: list[Tensor] = []  # or another tensor would have the same key
        self._outside: dict[int, int] = {}
        self._blocks: list[dict[int, int]] = []
        self._depth = 0
        self._listening = False
        for block in repeated_blocks(net):
            block.register_forward_pre_hook(self._enter, with_kwargs=True)
            block.register_forward_hook(self._leave)

    @property
    def within_block(self) -> bool:
        return self._depth > 0

    @property
    def whole(self) -> int:
        """Bytes of all that is kept."""
        everything = dict(self._outside)
        for block in self._blocks:
            everything.update(block)
        return sum(everything.values())

    @property
    def checkpointed(self) -> int:
        """Where every block keeps its input alone, and is computed again: with the largest then."""
        inner = (
            sum(size for key, size in block.items() if key not in self._outside)
            for block in self._blocks
        )
        return sum(self._outside.values()) + max(inner, default=0)

    def listening(self) -> Any:
        """Inside, what autograd keeps is entered."""
        if not torch.is_grad_enabled():
            return nullcontext()
        return self._hooks()

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        self._listening = True
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._enter_tensor, lambda kept: kept.x):
                yield
        finally:
            self._listening = False

    def _enter_tensor(self, x: Tensor) -> _Kept:
        kept = _Kept(x)
        table = self._blocks[-1] if self._depth else self._outside
        self._found.append((weakref.ref(kept), table))
        return kept

    def settle(self) -> None:
        """What is still kept, before a backward pass frees it, is what the pass needs."""
        for found, table in self._found:
            kept = found()
            if kept is not None:
                self._keep(kept.x, table)
        self._found.clear()

    def _keep(self, x: Tensor, table: dict[int, int]) -> None:
        storage = x.untyped_storage()
        if storage._cdata not in self._parameters:
            self._alive.append(x.detach())
            table[storage._cdata] = storage.nbytes()

    def _enter(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._listening:
            return
        if not self._depth:
            self._blocks.append({})
            for x in pytree.tree_leaves((args, kwargs)):
                if isinstance(x, Tensor):
                    self._keep(x, self._outside)
        self._depth += 1

    def _leave(self, block: nn.Module, args: Any, out: Any) -> None:
        self._depth -= self._listening
