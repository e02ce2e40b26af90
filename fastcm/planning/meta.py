"""Networks without memory: copies on the meta device, which run as on a device of their own.

The meta device knows shapes and dtypes alone, so a network of any size is counted in a moment. Two
things it lacks are put in: attention that does not keep its matrix of scores, and autocast.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

META = torch.device("meta")

_LOW = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d,
    F.conv_transpose3d, F.scaled_dot_product_attention, torch.matmul, torch.mm, torch.bmm,
    torch.addmm, torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.mm, Tensor.bmm,
    Tensor.__matmul__,
}  # fmt: skip
"""What autocast computes in bfloat16."""
_FULL = {F.layer_norm, F.group_norm, F.softmax, F.log_softmax, torch.softmax, Tensor.softmax}
"""What it computes in float32 on a GPU."""


def without_memory(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy whose tensors have no memory; the original's are not read.

    Args:
        module: the network.
        memo: of `copy.deepcopy`: what has been copied already, and is not copied again. A teacher
            may be the student in another state.

    Raises:
        Exception: whatever a part of it raises that cannot be copied.
    """
    memo = {} if memo is None else memo
    for part in module.modules():
        held = (part._parameters, part._buffers, vars(part))
        for tensor in (value for table in held for value in table.values()):
            if isinstance(tensor, Tensor):
                memo.setdefault(id(tensor), _empty(tensor))
    return copy.deepcopy(module, memo)


def _empty(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor.detach(), device=META)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def on_meta(tree: Any) -> Any:
    """Tensors of this shape and dtype without memory, in whatever holds them."""
    return pytree.tree_map_only(Tensor, _empty, tree)


class AsOnDevice(TorchFunctionMode):
    """Within a call of a network, meta tensors are computed with as those of a device are.

    It is entered before whatever else looks at functions, so that it sees what these make of them,
    as autocast does.

    Args:
        device_type: "cuda" casts normalisations and softmax back to float32, as autocast there.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._gpu = device_type == "cuda"
        self._called = self._low = False
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def call(self, precision: str) -> Iterator[None]:
        """Inside is one call; "bf16" casts as autocast does."""
        outer = self._called, self._low, self._casts
        self._called, self._low, self._casts = True, precision == "bf16", {}
        try:
            yield
        finally:
            self._called, self._low, self._casts = outer

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._low and func in _LOW:
            args, kwargs = pytree.tree_map_only(Tensor, self._lowered, (tuple(args), kwargs))
        elif self._low and self._gpu and func in _FULL:
            args, kwargs = pytree.tree_map_only(Tensor, _raised, (tuple(args), kwargs))
        if self._called and func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _lowered(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(torch.bfloat16)
        # of weights a network call makes one copy, which has a gradient whoever asks first
        held = self._casts.get(id(x))
        if held is None:
            with torch.enable_grad():
                held = self._casts[id(x)] = (x, x.to(torch.bfloat16))
        return held[1]


def _raised(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    plain = attn_mask is None and dropout_p == 0.0 and not enable_gqa
    if not (plain and q.is_meta and q.dim() == 4 and q.shape[-1] == v.shape[-1]):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    # without a device torch would take the one that keeps the scores
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: Tensor = fused(q, k, v, 0.0, is_causal, scale=scale)[0]
    return out
