"""Gradients of the registered operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcm.ops import registered
from fastcm.ops.reference import lift


def _scale(g: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    out: Tensor = torch.ops.fastcm.scale(g, c, dtype)
    return out


def _noising_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x0, alpha, *_ = inputs
    ctx.save_for_backward(alpha)
    ctx.dtype = x0.dtype


def _noising_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    (alpha,) = ctx.saved_tensors
    return _scale(g, alpha, ctx.dtype), *[None] * 6


def _noising_pair_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x0, alpha, _, alpha2, *_ = inputs
    ctx.save_for_backward(alpha, alpha2)
    ctx.dtype = x0.dtype


def _noising_pair_backward(ctx: Any, g: Tensor, g2: Tensor) -> tuple[Tensor | None, ...]:
    alpha, alpha2 = ctx.saved_tensors
    return _scale(g, alpha, ctx.dtype) + _scale(g2, alpha2, ctx.dtype), *[None] * 8


def _boundary_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, F, a, b = inputs[0], *inputs[6:]
    ctx.save_for_backward(a, b)
    ctx.dtypes = x.dtype, F.dtype
    ctx.closed = inputs[1] is not None


def _boundary_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    wanted = ctx.needs_input_grad[0] and not ctx.closed
    grad_x = _scale(g, a, ctx.dtypes[0]) if wanted else None
    grad_F = _scale(g, b, ctx.dtypes[1]) if ctx.needs_input_grad[6] else None
    return grad_x, *[None] * 5, grad_F, None, None


def _euler_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, v, dt, v_uncond, guidance, scale, input_scale, input_dtype = inputs[0], *inputs[6:]
    ctx.save_for_backward(dt, guidance, scale, input_scale)
    ctx.dtypes = x.dtype, v.dtype
    ctx.closed, ctx.paired, ctx.guided = inputs[1] is not None, input_dtype, v_uncond is not None


def _euler_backward(ctx: Any, g: Tensor, g2: Tensor) -> tuple[Tensor | None, ...]:
    dt, guidance, scale, input_scale = ctx.saved_tensors
    g = _of_both(ctx, g, g2, input_scale)
    grad_x = None
    if ctx.needs_input_grad[0] and not ctx.closed:
        grad_x = _scale(g, torch.ones_like(dt) if scale is None else scale, ctx.dtypes[0])
    cond = -dt if guidance is None else -dt * guidance
    grad_v = _scale(g, cond, ctx.dtypes[1])
    grad_uncond = _scale(g, -dt - cond, ctx.dtypes[1]) if ctx.guided else None
    return grad_x, *[None] * 5, grad_v, None, grad_uncond, *[None] * 4


def _of_both(ctx: Any, g: Tensor, g2: Tensor, input_scale: Tensor | None) -> Tensor:
    """The gradient of a state from its own and that of the network's input made of it."""
    if ctx.paired is None:
        return g
    return g + (g2 if input_scale is None else lift(input_scale, g) * g2)


def _sampler_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, F, a, b, alpha = inputs[:5]
    *_, guidance, input_scale, ctx.paired = inputs
    ctx.save_for_backward(a, b, alpha, guidance, input_scale)
    ctx.dtypes = x.dtype, F.dtype


def _sampler_backward(ctx: Any, g: Tensor, g2: Tensor) -> tuple[Tensor | None, ...]:
    a, b, alpha, guidance, input_scale = ctx.saved_tensors
    g = _of_both(ctx, g, g2, input_scale)
    gain = alpha * b
    cond = gain if guidance is None else gain * guidance
    grad_x, grad_F = _scale(g, alpha * a, ctx.dtypes[0]), _scale(g, cond, ctx.dtypes[1])
    grad_uncond = None if guidance is None else _scale(g, gain - cond, ctx.dtypes[1])
    return grad_x, grad_F, *[None] * 7, grad_uncond, *[None] * 3


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.count = len(inputs)


def _loss_backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if g is None:
        return tuple([None] * ctx.count)
    (gradient,) = ctx.saved_tensors  # of the mean
    return _scale(gradient, g * g.shape[0], gradient.dtype), *[None] * (ctx.count - 1)


for _op, _setup, _backward in (
    (registered.noising_op, _noising_setup, _noising_backward),
    (registered.noising_pair_op, _noising_pair_setup, _noising_pair_backward),
    (registered.boundary_op, _boundary_setup, _boundary_backward),
    (registered.euler_step_op, _euler_setup, _euler_backward),
    (registered.sampler_update_op, _sampler_setup, _sampler_backward),
    (registered.consistency_loss_op, _loss_setup, _loss_backward),
):
    _registered: Any = _op
    _registered.register_autograd(_backward, setup_context=_setup)
