"""The loss with validation: the distance of a denoiser from its target, and its gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastcm.losses import Metric, PseudoHuber, SampleMetric
from fastcm.ops import native, reference, validation
from fastcm.ops.dispatch import Door, door
from fastcm.ops.functions import boundary, data_of
from fastcm.ops.normals import noising
from fastcm.ops.operands import flat, same_noise
from fastcm.ops.reference import Denoised, Noised
from fastcm.ops.registered import METRICS


def consistency_loss(
    F: Tensor,
    x_t: Tensor | Noised,
    a: Tensor,
    b: Tensor,
    target: Tensor | Noised | Denoised,
    *,
    metric: Metric = PseudoHuber(),
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted distance of the denoiser a x_t + b F from a target; gradient to F only.

    Args:
        F: student output ``[B, ...]``.
        x_t: ``[B, ...]`` or `Noised`.
        a, b: ``[B]``.
        target: ``[B, ...]``, or in closed form: `Noised` data, or the `Denoised` target network.
        metric: a metric of `fastcm.losses`, or any callable (f, target) -> ``[B]``.
        weight: ``[B]``; default 1.

    Returns:
        (mean, per_sample): scalar and ``[B]``.

    Raises:
        ValueError, TypeError: an argument of the wrong rank, shape, dtype or device; a metric
            that does not return ``[B]``.
    """
    return consistency_loss_and_gradient(F, x_t, a, b, target, metric=metric, weight=weight)[:2]


def consistency_loss_and_gradient(
    F: Tensor,
    x_t: Tensor | Noised,
    a: Tensor,
    b: Tensor,
    target: Tensor | Noised | Denoised,
    *,
    metric: Metric = PseudoHuber(),
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `consistency_loss`, with what a backward pass can begin with.

    Returns:
        (mean, per_sample, gradient): d mean / d F in the dtype of F where the implementation makes
        it along with the loss, else None. ``torch.autograd.backward(F, gradient)`` is then
        ``mean.backward()`` without a pass over the gradient.
    """
    validation.check_map("x_t", x_t, F, a, b)
    if isinstance(target, Denoised):
        validation.check_state("target.x", target.x, like=F)
        validation.check_like("target.F", target.F, F, "F")
        validation.check_coefficient("target.a", target.a, F)
        validation.check_coefficient("target.b", target.b, F)
    else:
        validation.check_state("target", target, like=F)
    if weight is not None:
        validation.check_coefficient("weight", weight, F)
    if not callable(metric):
        raise TypeError(
            f"metric must be callable (f, target) -> [B], got {validation.describe(metric)}"
        )
    source = target.x if isinstance(target, Denoised) else target
    target_F = target.F if isinstance(target, Denoised) else None
    fused = metric if isinstance(metric, SampleMetric) and type(metric) in METRICS else None
    way, gradient = door(F, data_of(x_t), data_of(source), target_F, differentiable=False), None
    if way is Door.REFERENCE or (way is Door.NATIVE and fused is None):
        _, losses = reference.consistency_loss(F, x_t, a, b, target, metric=metric, weight=weight)
    elif way is Door.NATIVE and fused is not None:
        losses, gradient = native.consistency_loss_and_gradient(
            F, x_t, a, b, target, metric=fused, weight=weight
        )
        if torch.is_grad_enabled() and F.requires_grad:
            losses = native.differentiable(F, losses, gradient)
    elif fused is not None:
        shared = isinstance(x_t, Noised) and isinstance(source, Noised) and same_noise(x_t, source)
        y, *noise_of_y = flat(source)
        target_map: tuple[Tensor | None, ...] = (None, None, None)
        if isinstance(target, Denoised):
            target_map = target.F.detach(), target.a, target.b
        losses, gradient = torch.ops.fastcm.consistency_loss(
            F,
            *flat(x_t),
            a,
            b,
            None if shared else y,
            *noise_of_y,
            *target_map,
            weight,
            METRICS.index(type(fused)),
            fused.scale(math.prod(F.shape[1:])) if isinstance(fused, PseudoHuber) else 1.0,
        )
    else:
        losses = metric(boundary(_detach(x_t), F, a.detach(), b.detach()), _value(target))
        if weight is not None:
            losses = losses * weight.detach().to(losses.dtype)
    if losses.shape != F.shape[:1]:
        raise ValueError(
            f"metric must return one value per sample, [{F.shape[0]}], got {list(losses.shape)}"
        )
    return losses.mean(), losses, gradient


def _detach(x: Tensor | Noised) -> Tensor | Noised:
    return x if isinstance(x, Noised) else x.detach()


@torch.no_grad()
def _value(target: Tensor | Noised | Denoised) -> Tensor:
    """The target as a tensor."""
    if isinstance(target, Denoised):
        return boundary(target.x, target.F, target.a, target.b)
    if isinstance(target, Noised):
        out = noising(
            target.x0,
            target.alpha,
            target.sigma,
            target.key,
            stream=target.stream,
            first_sample=target.first_sample,
            out_dtype=torch.float32,
        )
        assert isinstance(out, Tensor)
        return out
    return target.detach()
