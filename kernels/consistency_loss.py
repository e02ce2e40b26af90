"""The consistency loss: both boundary maps, residual, metric and weight, with dloss / dF at once.

A sample of at most `launch.MAX_SAMPLE` elements is one program, its residual stays in registers
between the reduction and the gradient. A larger one, or a large one of a small batch
(`launch.split`), takes two launches: partial sums, then every program adds them up in the same
order and makes its residual again. There are no atomics, and the number of partial sums follows
from B and D alone: the bits do not depend on how many multiprocessors a machine has, and those of
a sample above `launch.MAX_SAMPLE` / 2 elements depend on the size of its batch where that is small.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcm.kernels import launch
from fastcm.kernels.launch import LaunchConfig, columns, locate
from fastcm.kernels.noising import (
    Kernel,
    State,
    affine,
    as_state,
    coefficient,
    configure,
    load_state,
    load_unit,
    store,
)
from fastcm.kernels.philox import normals

SQUARED_L2 = 0
L2 = 1
L1 = 2
PSEUDO_HUBER = 3

_SQUARED_L2 = tl.constexpr(SQUARED_L2)
_L2 = tl.constexpr(L2)
_L1 = tl.constexpr(L1)


@triton.jit
def load_residual(
    F_ptr, a_ptr, b_ptr,
    x_ptr, x_alpha_ptr, x_sigma_ptr, x_key_ptr, x_stream, x_first_sample,
    y_ptr, y_alpha_ptr, y_sigma_ptr, y_key_ptr, y_stream, y_first_sample,
    target_F_ptr, target_a_ptr, target_b_ptr,
    sample, row, start, D,
    X_NOISED: tl.constexpr, Y_NOISED: tl.constexpr, SAME_NOISE: tl.constexpr,
    MAPPED: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """A block of a x + b F - target, 0 beyond the sample."""
    cols, mask = columns(start, D, BLOCK, VECTOR)
    F = load_unit(F_ptr, row + cols, mask)
    if SAME_NOISE:
        x0 = load_unit(x_ptr, row + cols, mask)
        z = normals(x_key_ptr, x_stream, x_first_sample, sample, start, BLOCK, VECTOR, FAST)
        x = affine(x_alpha_ptr, x0, x_sigma_ptr, z, sample)
        y = affine(y_alpha_ptr, x0, y_sigma_ptr, z, sample)
    else:
        x = load_state(
            x_ptr, x_alpha_ptr, x_sigma_ptr, x_key_ptr, x_stream, x_first_sample,
            sample, row, start, D, X_NOISED, BLOCK, VECTOR, FAST,
        )  # fmt: skip
        y = load_state(
            y_ptr, y_alpha_ptr, y_sigma_ptr, y_key_ptr, y_stream, y_first_sample,
            sample, row, start, D, Y_NOISED, BLOCK, VECTOR, FAST,
        )  # fmt: skip
    if MAPPED:
        target_F = load_unit(target_F_ptr, row + cols, mask)
        y = affine(target_a_ptr, y, target_b_ptr, target_F, sample)
    return tl.where(mask, affine(a_ptr, x, b_ptr, F, sample) - y, 0.0)


@triton.jit
def accumulate(residual, METRIC: tl.constexpr):
    """What the metric sums over a sample."""
    if METRIC == _L1:
        term = tl.abs(residual)
    else:
        term = residual * residual
    return term


@triton.jit
def evaluate(total, c, METRIC: tl.constexpr):
    """The metric from its sum, and the factor of its gradient."""
    if METRIC == _SQUARED_L2:
        value = total
        slope = 2.0
    elif METRIC == _L1:
        value = total
        slope = 1.0
    else:
        if METRIC == _L2:
            norm = tl.sqrt_rn(total)
            value = norm
        else:
            c = tl.cast(c, tl.float32)  # an argument of compiled code is float64
            norm = tl.sqrt_rn(total + c * c)
            # sqrt(total + c^2) - c without its cancellation near zero
            value = total / (norm + c)
        # a norm of 0 has only zero residuals: any finite slope gives gradient 0
        slope = 1.0 / tl.where(norm == 0.0, 1.0, norm)
    return value, slope


@triton.jit
def differentiate(residual, factor, METRIC: tl.constexpr):
    """factor times the gradient of the metric's sum; a NaN stays one."""
    direction = residual
    if METRIC == _L1:
        direction = tl.where(residual > 0.0, 1.0, tl.where(residual < 0.0, -1.0, residual))
    return factor * direction


@triton.jit(do_not_specialize=["x_stream", "x_first_sample", "y_stream", "y_first_sample"])
def loss_kernel(
    F_ptr, a_ptr, b_ptr,
    x_ptr, x_alpha_ptr, x_sigma_ptr, x_key_ptr, x_stream, x_first_sample,
    y_ptr, y_alpha_ptr, y_sigma_ptr, y_key_ptr, y_stream, y_first_sample,
    target_F_ptr, target_a_ptr, target_b_ptr,
    weight_ptr, loss_ptr, grad_ptr, c, gradient_scale, D,
    X_NOISED: tl.constexpr, Y_NOISED: tl.constexpr, SAME_NOISE: tl.constexpr,
    MAPPED: tl.constexpr, WEIGHTED: tl.constexpr, METRIC: tl.constexpr,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, VECTOR: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One program per sample, in one or two blocks."""
    sample = tl.program_id(0).to(tl.int64)
    row = sample * D
    head = load_residual(
        F_ptr, a_ptr, b_ptr,
        x_ptr, x_alpha_ptr, x_sigma_ptr, x_key_ptr, x_stream, x_first_sample,
        y_ptr, y_alpha_ptr, y_sigma_ptr, y_key_ptr, y_stream, y_first_sample,
        target_F_ptr, target_a_ptr, target_b_ptr,
        sample, row, 0, D,
        X_NOISED, Y_NOISED, SAME_NOISE, MAPPED, BLOCK, VECTOR, FAST,
    )  # fmt: skip
    if TAIL > 0:  # loaded before the first sum, at whose barrier all threads wait
        tail = load_residual(
            F_ptr, a_ptr, b_ptr,
            x_ptr, x_alpha_ptr, x_sigma_ptr, x_key_ptr, x_stream, x_first_sample,
            y_ptr, y_alpha_ptr, y_sigma_ptr, y_key_ptr, y_stream, y_first_sample,
            target_F_ptr, target_a_ptr, target_b_ptr,
            sample, row, BLOCK, D,
            X_NOISED, Y_NOISED, SAME_NOISE, MAPPED, TAIL, VECTOR, FAST,
        )  # fmt: skip
    total = tl.sum(accumulate(head, METRIC))
    if TAIL > 0:
        total += tl.sum(accumulate(tail, METRIC))
    value, slope = evaluate(total, c, METRIC)
    if WEIGHTED:
        weight = coefficient(weight_ptr, sample)
        value *= weight
        slope *= weight
    tl.store(loss_ptr + sample, value)
    # dloss / dF = slope b r: the residual is still in registers
    slope *= coefficient(b_ptr, sample) * tl.cast(gradient_scale, tl.float32)
    cols, mask = columns(0, D, BLOCK, VECTOR)
    store(grad_ptr, row + cols, differentiate(head, slope, METRIC), mask)
    if TAIL > 0:
        cols, mask = columns(BLOCK, D, TAIL, VECTOR)
        store(grad_ptr, row + cols, differentiate(tail, slope, METRIC), mask)


@triton.jit(do_not_specialize=["x_stream", "x_first_sample", "y_stream", "y_first_sample"])
def loss_partial_kernel(
    F_ptr, a_ptr, b_ptr,
    x_ptr, x_alpha_ptr, x_sigma_ptr, x_key_ptr, x_stream, x_first_sample,
    y_ptr, y_alpha_ptr, y_sigma_ptr, y_key_ptr, y_stream, y_first_sample,
    target_F_ptr, target_a_ptr, target_b_ptr,
    partial_ptr, D,
    X_NOISED: tl.constexpr, Y_NOISED: tl.constexpr, SAME_NOISE: tl.constexpr,
    MAPPED: tl.constexpr, METRIC: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, VECTOR: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The sum of one chunk of one sample into partial ``[B, chunks]``."""
    sample, start, row = locate(tl.program_id(0), D, BLOCK * STEPS)
    sums = tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        residual = load_residual(
            F_ptr, a_ptr, b_ptr,
            x_ptr, x_alpha_ptr, x_sigma_ptr, x_key_ptr, x_stream, x_first_sample,
            y_ptr, y_alpha_ptr, y_sigma_ptr, y_key_ptr, y_stream, y_first_sample,
            target_F_ptr, target_a_ptr, target_b_ptr,
            sample, row, start + step * BLOCK, D,
            X_NOISED, Y_NOISED, SAME_NOISE, MAPPED, BLOCK, VECTOR, FAST,
        )  # fmt: skip
        sums += accumulate(residual, METRIC)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(sums))


@triton.jit(do_not_specialize=["x_stream", "x_first_sample", "y_stream", "y_first_sample"])
def loss_finish_kernel(
    F_ptr, a_ptr, b_ptr,
    x_ptr, x_alpha_ptr, x_sigma_ptr, x_key_ptr, x_stream, x_first_sample,
    y_ptr, y_alpha_ptr, y_sigma_ptr, y_key_ptr, y_stream, y_first_sample,
    target_F_ptr, target_a_ptr, target_b_ptr,
    weight_ptr, loss_ptr, grad_ptr, c, gradient_scale, partial_ptr, D,
    X_NOISED: tl.constexpr, Y_NOISED: tl.constexpr, SAME_NOISE: tl.constexpr,
    MAPPED: tl.constexpr, WEIGHTED: tl.constexpr, METRIC: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, CHUNKS: tl.constexpr,
    VECTOR: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """All partial sums of the sample, in the same order in every program; loss and gradient."""
    sample, start, row = locate(tl.program_id(0), D, BLOCK * STEPS)
    # at most MAX_CHUNKS numbers, in L2: cheaper than a third launch
    chunks = tl.cdiv(D, BLOCK * STEPS)
    parts = tl.arange(0, CHUNKS)
    partial = tl.load(partial_ptr + sample * chunks + parts, mask=parts < chunks, other=0.0)
    value, slope = evaluate(tl.sum(partial), c, METRIC)
    if WEIGHTED:
        weight = coefficient(weight_ptr, sample)
        value *= weight
        slope *= weight
    if start == 0:
        tl.store(loss_ptr + sample, value)
    slope *= coefficient(b_ptr, sample) * tl.cast(gradient_scale, tl.float32)
    for step in range(STEPS):
        residual = load_residual(
            F_ptr, a_ptr, b_ptr,
            x_ptr, x_alpha_ptr, x_sigma_ptr, x_key_ptr, x_stream, x_first_sample,
            y_ptr, y_alpha_ptr, y_sigma_ptr, y_key_ptr, y_stream, y_first_sample,
            target_F_ptr, target_a_ptr, target_b_ptr,
            sample, row, start + step * BLOCK, D,
            X_NOISED, Y_NOISED, SAME_NOISE, MAPPED, BLOCK, VECTOR, FAST,
        )  # fmt: skip
        cols, mask = columns(start + step * BLOCK, D, BLOCK, VECTOR)
        store(grad_ptr, row + cols, differentiate(residual, slope, METRIC), mask)


def loss_scratch_size(B: int, D: int) -> int:
    """float32 elements of the scratch that `launch_consistency_loss` needs; 0 in one launch."""
    return B * launch.chunks(D, launch.chunked(B, D, 4)) if launch.split(B, D) else 0


def launch_consistency_loss(
    F: Tensor,
    x: Tensor | State,
    a: Tensor,
    b: Tensor,
    target: Tensor | State,
    target_F: Tensor | None,
    target_a: Tensor | None,
    target_b: Tensor | None,
    weight: Tensor | None,
    loss: Tensor,
    grad: Tensor,
    *,
    metric: int,
    c: float = 1.0,
    gradient_scale: float = 1.0,
    scratch: Tensor | None = None,
    config: LaunchConfig | None = None,
    kernel: Kernel = loss_kernel,
    partial_kernel: Kernel = loss_partial_kernel,
    finish_kernel: Kernel = loss_finish_kernel,
) -> None:
    """weight metric(a x + b F, y) of each sample into `loss`, and its gradient to F into `grad`.

    The target y is `target`, or target_a target + target_b target_F. If x and target are
    versions of one x0 under one noise (`State.same_noise`), it is made once.

    Args:
        F, target_F: ``[B, ...]``, any float dtype.
        x, target: ``[B, ...]``, a tensor or a `State`.
        a, b, target_a, target_b, weight: ``[B]``; target_a, target_b and target_F go
            together.
        loss: float32 ``[B]``.
        grad: gradient_scale d loss_b / dF; any float dtype.
        metric: SQUARED_L2, L2, L1 or PSEUDO_HUBER.
        c: > 0, of pseudo-Huber.
        gradient_scale: 1 / B makes `grad` that of the mean.
        scratch: float32, `loss_scratch_size` elements; given, the loss takes two launches.
    """
    x, target = as_state(x), as_state(target)
    mapped = target_F is not None
    assert mapped == (target_a is not None) == (target_b is not None), "target_F, _a, _b"
    assert SQUARED_L2 <= metric <= PSEUDO_HUBER, metric
    B, D = launch.extent(F, x.x, target.x, target_F, grad)
    x.check(B)
    target.check(B)
    launch.check_coefficients(B, (a, b, target_a, target_b, weight))
    assert loss.dtype == torch.float32 and loss.shape == (B,) and loss.is_contiguous()
    if B == 0:
        return
    if D == 0:
        loss.zero_()
        return
    make = launch.per_sample if scratch is None else partial(launch.chunked, B)
    config, fast = configure(config, make, D, F, x.x, target.x, target_F, grad)
    sources = (
        F, a, b, *x.arguments(), *target.arguments(),
        x.x if target_F is None else target_F,  # what is not read, by a tensor that exists:
        x.x if target_a is None else target_a,  # compiled code would make an intermediate one
        x.x if target_b is None else target_b,  # a second time
    )  # fmt: skip
    results = (x.x if weight is None else weight, loss, grad, c, gradient_scale)
    form = {
        "X_NOISED": x.noised,
        "Y_NOISED": target.noised,
        "SAME_NOISE": x.same_noise(target),
        "MAPPED": mapped,
        "METRIC": metric,
        "BLOCK": config.BLOCK,
        "VECTOR": config.VECTOR,
        "FAST": fast,
        "num_warps": config.num_warps,
    }
    if scratch is None:
        assert D <= config.BLOCK + config.TAIL, f"samples of {D} elements need a scratch"
        kernel[(B,)](*sources, *results, D, WEIGHTED=weight is not None, TAIL=config.TAIL, **form)
        return
    assert scratch.numel() >= B * launch.chunks(D, config), f"scratch of {scratch.numel()}"
    grid = launch.grid(B, D, config)
    partial_kernel[grid](*sources, scratch, D, STEPS=config.STEPS, **form)
    finish_kernel[grid](
        *sources,
        *results,
        scratch,
        D,
        WEIGHTED=weight is not None,
        CHUNKS=launch.power_of_two(launch.chunks(D, config), 1, 2**20),
        STEPS=config.STEPS,
        **form,
    )
