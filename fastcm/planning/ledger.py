"""What operators compute, move and keep: the entries of a step that runs on the meta device."""

from __future__ import annotations

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

Work = list[tuple[int, int]]
"""FLOPs and bytes of each operator, one after the other."""

aten = torch.ops.aten
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_counter.flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_counter.flop_registry[
        aten._scaled_dot_product_flash_attention
    ],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_counter.flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
_MOVES_NOTHING = {
    aten._unsafe_view, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty,
    aten.new_empty_strided, aten.lift_fresh,
}  # fmt: skip


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, operators are entered under the part of the step that `during` names.

    Attributes:
        work: by part.
        saved: what autograd keeps of the student's evaluations.
    """

    def __init__(self, saved: Saved) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work: dict[str, Work] = defaultdict(list)
        self.saved = saved
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
        out = func(*args, **kwargs)
        if self._part is not None:
            entry = flops(func, args, kwargs, out), moved(func, args, kwargs, out)
            if any(entry):
                self.work[self._part].append(entry)
                if self._part == "forward" and self.saved.within_block:
                    self.work["blocks"].append(entry)
        return out


def flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Two for each product of a matrix product or convolution; 0 for other operators."""
    formula = _FLOPS.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def moved(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes of the operands and results, each once; views move none."""
    if getattr(func, "is_view", False) or func._overloadpacket in _MOVES_NOTHING:
        return 0
    return sum(
        min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
        for x in pytree.tree_leaves((args, kwargs, out))
        if isinstance(x, Tensor)
    )


class Saved:
    """The bytes that autograd keeps for the backward pass, but for the parameters themselves.

    Args:
        net: the student, on the meta device; hooks are put on the blocks that it repeats.
    """

    def __init__(self, net: nn.Module) -> None:
        self._parameters = {p.untyped_storage()._cdata for p in net.parameters()}
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
            with torch.autograd.graph.saved_tensors_hooks(self._enter_tensor, lambda x: x):
                yield
        finally:
            self._listening = False

    def _enter_tensor(self, x: Tensor) -> Tensor:
        self._keep(x, self._blocks[-1] if self._depth else self._outside)
        return x

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
