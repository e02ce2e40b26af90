"""The registered operator ``torch.ops.fastcm.attention_dual``, of GPUs, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

from fastcm.ops.dispatch import HAS_KERNELS
from fastcm.ops.registered import operator

if HAS_KERNELS:
    from fastcm.kernels import attention_jvp


@operator("attention_dual")
def attention_dual_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """o and its tangent, ``[Z, H, N, D]``, and log sum exp of the scores, ``[Z, H, N]``."""
    Z, H, N, D = q.shape
    # tokens outermost, as networks take them on
    o, to = (
        torch.empty((Z, N, H, D), dtype=q.dtype, device=q.device).transpose(1, 2) for _ in range(2)
    )
    lse = torch.empty((Z, H, N), dtype=torch.float32, device=q.device)
    tangents = (None if x is None else _rows(x) for x in (tq, tk, tv))
    operands: Any = (*(_rows(x) for x in (q, k, v)), *tangents, o, to, lse)
    attention_jvp.launch_attention_jvp(
        *operands,
        causal=is_causal,
        scale=scale,
        kernel=wrap_triton(attention_jvp.attention_jvp_kernel),
    )
    return o, to, lse


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, *_, ctx.is_causal, ctx.scale = inputs
    o, to, lse = output
    ctx.save_for_backward(q, k, v, o, lse)
    ctx.mark_non_differentiable(to, lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 8
    q, k, v, o, lse = (_rows(x) for x in ctx.saved_tensors)
    aten, g = torch.ops.aten, _rows(g)
    if g.is_cpu:
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, o, lse, 0.0, ctx.is_causal, scale=ctx.scale
        )
    else:
        unused = torch.empty(2, dtype=torch.int64, device=g.device)  # nothing is dropped
        gradients = aten._scaled_dot_product_flash_attention_backward(
            g, q, k, v, o, lse, None, None, q.shape[-2], k.shape[-2], 0.0, ctx.is_causal,
            unused, unused, scale=ctx.scale,
        )  # fmt: skip
    return *gradients[:3], *[None] * 5


_registered: Any = attention_dual_op
_registered.register_autograd(_backward, setup_context=_setup)
