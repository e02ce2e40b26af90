"""The operators whose tangent is written out: value with gradient, tangent without.

A rule takes the arguments of its function, duals among them, and returns a dual. The value is
computed by the very call that a plain forward pass makes, so that its gradient and what it keeps
for the backward pass are those of that call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastcm.jvp.attention import attention


class NotCovered(Exception):
    """A rule does not hold for these arguments; says why."""


class Dual(NamedTuple):
    """A value and its tangent, None where it has none."""

    value: Tensor
    tangent: Tensor | None


def unpack(x: object) -> Dual:
    """Value and tangent of a tensor."""
    assert isinstance(x, Tensor)
    primal, tangent = forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
    return Dual(primal, tangent)


def is_dual(x: object) -> bool:
    """Whether `x` is a tensor with a tangent."""
    return isinstance(x, Tensor) and unpack(x).tangent is not None


def dual(value: Tensor, tangent: Tensor) -> Tensor:
    """The tensor with this value and this tangent, which is stopped."""
    out: Tensor = forward_ad.make_dual(  # type: ignore[no-untyped-call]
        value, tangent.detach().to(value.dtype)
    )
    return out


def _plain(*tensors: object) -> None:
    if any(is_dual(x) for x in tensors):
        raise NotCovered("weights have a tangent")


def _affine(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The rule of function(x, weight, bias, ...), linear in x: without bias for the tangent."""

    def rule(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kw: Any
    ) -> Tensor:
        _plain(weight, bias)
        x, tx = unpack(input)
        assert tx is not None
        with torch.no_grad():
            tangent = function(tx, weight, None, *args, **kw)
        return dual(function(x, weight, bias, *args, **kw), tangent)

    return rule


def _product(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The rule of a product of two tensors."""

    def rule(a: Tensor, b: Tensor) -> Tensor:
        (a, ta), (b, tb) = unpack(a), unpack(b)
        with torch.no_grad():
            left = None if ta is None else function(ta, b)
            right = None if tb is None else function(a, tb)
            tangent = right if left is None else left if right is None else left + right
        assert tangent is not None
        return dual(function(a, b), tangent)

    return rule


def _normalised(x: Tensor, tx: Tensor, dims: list[int], eps: float, center: bool) -> Tensor:
    """The tangent of (x - mean) / sqrt(var + eps) over `dims`, float32 or float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, tx = x.to(wide), tx.to(wide)
    if center:
        x, tx = x - x.mean(dims, keepdim=True), tx - tx.mean(dims, keepdim=True)
    scale = (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    along = (x * tx).mean(dims, keepdim=True) * scale.square()
    out: Tensor = scale * (tx - along * x)
    return out


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    _plain(weight, bias)
    x, tx = unpack(input)
    assert tx is not None
    with torch.no_grad():
        tangent = _normalised(x, tx, _last(len(normalized_shape)), eps, center=True)
        tangent = tangent if weight is None else tangent * weight
    return dual(F.layer_norm(x, normalized_shape, weight, bias, eps), tangent)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    _plain(weight)
    x, tx = unpack(input)
    assert tx is not None
    with torch.no_grad():
        wide = torch.promote_types(x.dtype, torch.float32)
        small = torch.finfo(wide).eps if eps is None else eps
        tangent = _normalised(x, tx, _last(len(normalized_shape)), small, center=False)
        tangent = tangent if weight is None else tangent * weight
    return dual(F.rms_norm(x, normalized_shape, weight, eps), tangent)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    _plain(weight, bias)
    x, tx = unpack(input)
    assert tx is not None
    with torch.no_grad():
        groups = [torch.unflatten(y, 1, (num_groups, -1)) for y in (x, tx)]
        tangent = _normalised(
            groups[0], groups[1], list(range(2, x.dim() + 1)), eps, center=True
        ).flatten(1, 2)
        if weight is not None:
            tangent = tangent * weight.reshape(-1, *[1] * (x.dim() - 2))
    return dual(F.group_norm(x, num_groups, weight, bias, eps), tangent)


def _last(n: int) -> list[int]:
    return list(range(-n, 0))


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    x, tx = unpack(input)
    assert tx is not None
    with torch.no_grad():
        tangent = torch.ops.aten.silu_backward(tx, x)
    return dual(F.silu(x), tangent)


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    x, tx = unpack(input)
    assert tx is not None
    with torch.no_grad():
        tangent = torch.ops.aten.gelu_backward(tx, x, approximate=approximate)
    return dual(F.gelu(x, approximate=approximate), tangent)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None or enable_gqa:
        raise NotCovered("attention with a mask or grouped queries")
    if dropout_p:
        raise ValueError(f"attention under jvp cannot drop, got dropout_p={dropout_p}")
    return attention(query, key, value, is_causal=is_causal, scale=scale)


RULES: dict[Any, Callable[..., Tensor]] = {
    F.linear: _affine(F.linear),
    F.conv1d: _affine(F.conv1d),
    F.conv2d: _affine(F.conv2d),
    F.conv3d: _affine(F.conv3d),
    torch.matmul: _product(torch.matmul),
    Tensor.matmul: _product(torch.matmul),
    Tensor.__matmul__: _product(torch.matmul),
    torch.bmm: _product(torch.bmm),
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    F.group_norm: group_norm,
    F.silu: silu,
    F.gelu: gelu,
    F.scaled_dot_product_attention: scaled_dot_product_attention,
}


def _attention_in_parts(*args: Any, **kwargs: Any) -> Tensor:
    """Attention as products and a softmax: of the fused ones forward AD knows none."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


DIFFERENTIABLE: dict[Any, Callable[..., Tensor]] = {
    F.scaled_dot_product_attention: _attention_in_parts,
}
"""What stands in for an operator that is left to plain forward AD."""
