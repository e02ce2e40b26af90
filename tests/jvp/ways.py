"""One way to a tangent of attention in one context: ``main(way, context)``.

It is "right", "wrong" (a tangent or gradient that is off, and no error) or the error's name. In a
process of its own for each, since torch compiles no derivative any more after it failed at one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastcm.jvp import attention, attention_dual

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


class Function(torch.autograd.Function):
    """With a jvp of its own, as PyTorch's manual has it."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torchs(q, k, v)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            return torch.autograd.grad(torchs(*leaves), leaves, g[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return attention_dual(*ctx.saved_tensors, *tangents)[1]


@torch.library.custom_op("ways::attention", mutates_args=())
def bare(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torchs(q, k, v)


@bare.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


def _backward(ctx: Any, g: Tensor) -> Any:
    q, k, v = ctx.saved_tensors
    return torch.ops.ways.attention_backward(g, q, k, v)


@torch.library.custom_op("ways::attention_backward", mutates_args=())
def bare_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return tuple(torch.autograd.grad(torchs(*leaves), leaves, g))


@bare_backward.register_fake
def _(g: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


bare.register_autograd(
    _backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)

WAYS: dict[str, Attention] = {
    "torch": torchs,
    "function": lambda *x: Function.apply(*x),
    "operator": lambda *x: bare(*x),
    "ours": lambda *x: attention(*x),
}


def derive(fn: Attention, inputs: list[Tensor], tangents: list[Tensor]) -> tuple[Tensor, Tensor]:
    def both(*x: Tensor) -> Tensor:
        return fn(*x).sin()

    return torch.func.jvp(both, tuple(inputs), tuple(tangents))[:2]


def in_a_level(
    fn: Attention, inputs: list[Tensor], tangents: list[Tensor]
) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        out = fn(*map(forward_ad.make_dual, inputs, tangents)).sin()
        return forward_ad.unpack_dual(out)  # type: ignore[return-value]


def compiled(fn: Attention, inputs: list[Tensor], tangents: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.compile(lambda i, t: derive(fn, i, t), backend="aot_eager")(inputs, tangents)


def compiled_step(
    fn: Attention, inputs: list[Tensor], tangents: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """The tangent, and the gradient of the loss with the tangent in its target."""
    leaves = [x.clone().requires_grad_() for x in inputs]

    def loss(leaves: list[Tensor], tangents: list[Tensor]) -> tuple[Tensor, Tensor]:
        out, tangent = derive(fn, leaves, tangents)
        return (out - tangent.detach()).square().sum(), tangent.detach()

    value, tangent = torch.compile(loss, backend="aot_eager")(leaves, tangents)
    value.backward()
    assert leaves[0].grad is not None
    return leaves[0].grad, tangent


CONTEXTS = {
    "jvp": derive,
    "level": in_a_level,
    "compiled": compiled,
    "compiled step": compiled_step,
}


def main(way: str, context: str) -> str:
    torch.manual_seed(0)
    q, k, v, *tangents = (torch.randn(2, 3, 5, 8) for _ in range(6))
    leaf = q.double().requires_grad_()
    exact = derive(torchs, [leaf, k.double(), v.double()], [t.double() for t in tangents])
    if context == "compiled step":
        (exact[0] - exact[1].detach()).square().sum().backward()
        assert leaf.grad is not None
        exact = (leaf.grad, exact[1])
    try:
        found = CONTEXTS[context](WAYS[way], [q, k, v], tangents)
    except Exception as error:
        return type(error).__name__
    if any(x is None or (x - y).norm() > 1e-4 * y.norm() for x, y in zip(found, exact)):
        return "wrong"
    return "right"
