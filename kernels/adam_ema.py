"""Clip, Adam, every average and every low-precision copy in one sweep over the parameters.

The tick turns hyperparameters, the squared norm and the step of each tensor into scalars, on the
device: a captured step needs nothing from the host. AdamW and RAdam differ in these scalars alone.
A step whose norm is not finite touches nothing but its counts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcm.kernels import launch, tables
from fastcm.kernels.chunks import (
    ELEMENTS,
    check_tables,
    elements,
    load_part,
    locate_chunk,
    store_part,
)
from fastcm.kernels.launch import LaunchConfig
from fastcm.kernels.noising import Kernel, store
from fastcm.kernels.tables import CHUNK, Segment

TICK_BLOCK = 128
"""Tensors per program of the tick, each with a thread of its own."""

_PARAMETER = tl.constexpr(tables.PARAMETER)
_GRADIENT = tl.constexpr(tables.GRADIENT)
_OFFSET = tl.constexpr(tables.OFFSET)
_GROUP = tl.constexpr(tables.GROUP)


@triton.jit
def power(base, exponent):
    """base^exponent for 0 <= base < 1 and exponent >= 1, in float64."""
    # log 0 times an exponent must not become a NaN; 1e-300 is 0 next to 1
    return tl.exp(exponent * tl.log(tl.maximum(base, 1e-300)))


@triton.jit(do_not_specialize=["n"])
def tick_kernel(
    tensors_ptr,
    hyper_ptr,
    limit_ptr,
    sums_ptr,
    steps_ptr,
    rows_ptr,
    shared_ptr,
    norm_ptr,
    counts_ptr,
    n,
    NORM: tl.constexpr,
    CLASSES: tl.constexpr,
    RADAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK tensors per program; all scalars in float64."""
    clip = tl.full([], 1.0, tl.float64)
    apply = tl.full([], 1, tl.int64)
    if NORM:
        # every program adds the few classes up again, in the same order
        total = tl.full([], 0.0, tl.float64)
        for c in range(CLASSES):
            total += tl.load(sums_ptr + c)
        norm = tl.sqrt(total)
        apply = (norm < float("inf")).to(tl.int64)
        clip = tl.minimum(tl.load(limit_ptr) / (norm + 1e-6), 1.0)
    if tl.program_id(0) == 0:
        if NORM:
            store(norm_ptr, 0, norm, None)
        store(shared_ptr, 0, clip, None)
        store(shared_ptr, 1, apply, None)
        skipped = 1 - apply
        tl.store(counts_ptr, tl.load(counts_ptr) + 1)
        tl.store(counts_ptr + 1, tl.load(counts_ptr + 1) + skipped)
        tl.store(counts_ptr + 2, (tl.load(counts_ptr + 2) + 1) * skipped)

    tensor = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gradient = tl.load(tensors_ptr + _GRADIENT * n + tensor, mask=tensor < n, other=0)
    moves = gradient * apply != 0
    step = tl.load(steps_ptr + tensor, mask=moves, other=0.0) + 1.0
    tl.store(steps_ptr + tensor, step, mask=moves)
    k = step.to(tl.float64)
    group = tl.load(tensors_ptr + _GROUP * n + tensor, mask=moves, other=0)
    hyper_ptr += 6 * group
    lr = tl.load(hyper_ptr)
    beta1 = tl.load(hyper_ptr + 1)
    beta2 = tl.load(hyper_ptr + 2)
    eps = tl.load(hyper_ptr + 3)
    rows_ptr += 8 * tensor
    store(rows_ptr, 0, 1.0 - beta1, moves)
    store(rows_ptr, 1, 1.0 - beta2, moves)
    store(rows_ptr, 2, lr * tl.load(hyper_ptr + 4), moves)
    store(rows_ptr, 6, tl.load(hyper_ptr + 5), moves)
    store(rows_ptr, 7, tl.zeros_like(k), moves)
    c1 = 1.0 - power(beta1, k)
    beta2_k = power(beta2, k)
    c2 = 1.0 - beta2_k
    if RADAM:
        rho_inf = 2.0 / (1.0 - beta2) - 1.0
        rho_k = rho_inf - 2.0 * k * beta2_k / c2
        adaptive = rho_k > 5.0
        # where it is not adaptive, any number that keeps the branch not taken finite
        r = tl.where(adaptive, rho_k, 5.0)
        r_inf = tl.where(adaptive, rho_inf, 5.0)
        rect = tl.sqrt((r - 4.0) * (r - 2.0) * r_inf / ((r_inf - 4.0) * (r_inf - 2.0) * r))
        size = lr / c1 * tl.where(adaptive, rect * tl.sqrt(c2), 1.0)
        a = tl.where(adaptive, 1.0, 0.0)
        b = tl.where(adaptive, eps, 1.0)
    else:
        size = lr / c1
        a = 1.0 / tl.sqrt(c2)
        b = eps
    store(rows_ptr, 3, size, moves)
    store(rows_ptr, 4, a, moves)
    store(rows_ptr, 5, b, moves)


@triton.jit
def direction(m, v, a, b):
    """m / (a sqrt(v) + b); in float32 the plain signs would be approximate."""
    if m.dtype == tl.float64:
        change = m / tl.fma(tl.sqrt(v), a, b)
    else:
        change = tl.div_rn(m, tl.fma(tl.sqrt_rn(v), a, b))
    return change


@triton.jit
def sweep_block(
    parameter_ptr, gradient_ptr, moments_ptr, masters_ptr, averages, shadows, total, has_gradient,
    w1, w2, decay, size, a, b, l2, clip, rates, cols, left,
    MASK: tl.constexpr, AVERAGES: tl.constexpr, MASTER: tl.constexpr, SHADOWED: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """The whole update of the elements `cols` of a chunk."""
    ACC: tl.constexpr = moments_ptr.dtype.element_ty
    # all loads first: each store is a barrier for the loads behind it
    x = load_part(parameter_ptr, cols, left, ACC, FULL)
    old = ()
    for j in tl.static_range(AVERAGES):
        old += (load_part(averages[j], cols, left, ACC, FULL),)
    if MASTER:
        master = load_part(masters_ptr, cols, left, ACC, FULL)
        # a parameter that is not its rounded master was written from outside, and wins
        same = master.to(parameter_ptr.dtype.element_ty).to(ACC) == x
        x = tl.where(same, master, x)
    if has_gradient:
        g = load_part(gradient_ptr, cols, left, ACC, FULL)
        m = load_part(moments_ptr, cols, left, ACC, FULL)
        v = load_part(moments_ptr + total, cols, left, ACC, FULL)
        d = tl.fma(l2, x, g * clip)
        m = tl.fma(w1, d - m, m)
        v = tl.fma(w2, tl.fma(d, d, -v), v)
        x = tl.fma(-decay, x, x)
        x = tl.fma(-size, direction(m, v, a, b), x)
        store_part(moments_ptr, cols, left, m, FULL)
        store_part(moments_ptr + total, cols, left, v, FULL)
        store_part(parameter_ptr, cols, left, x, FULL)
    if MASTER:
        store_part(masters_ptr, cols, left, x, FULL)
    if SHADOWED:
        store_part(shadows[0], cols, left, x, FULL)
    for j in tl.static_range(AVERAGES):
        e = tl.fma(rates[j], x - old[j], old[j])
        store_part(averages[j], cols, left, e, FULL)
        if (MASK >> j) & 1:
            store_part(shadows[1 + j], cols, left, e, FULL)


@triton.jit(do_not_specialize=["first", "n", "C"])
def sweep_kernel(
    tensors_ptr, chunks_ptr, moments_ptr, masters_ptr, averages_ptr, shadows_ptr,
    rows_ptr, shared_ptr, first, n, C, total,
    PARAMETER: tl.constexpr, GRADIENT: tl.constexpr, ALIGNED: tl.constexpr,
    AVERAGES: tl.constexpr, MASK: tl.constexpr, MASTER: tl.constexpr, SHADOWED: tl.constexpr,
    SHADOW: tl.constexpr, SEGMENT_ALIGN: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """One chunk per program, BLOCK elements at a time."""
    if tl.load(shared_ptr + 1) == 0.0:
        return
    chunk = first + tl.program_id(0).to(tl.int64)
    tensor, start, left = locate_chunk(tensors_ptr, chunks_ptr, chunk, n, C, CHUNK)
    address = tl.load(tensors_ptr + _GRADIENT * n + tensor)
    gradient_ptr = elements(address, start, GRADIENT, ALIGNED)
    address_p = tl.load(tensors_ptr + _PARAMETER * n + tensor)
    parameter_ptr = elements(address_p, start, PARAMETER, ALIGNED)
    offset = tl.multiple_of(tl.load(tensors_ptr + _OFFSET * n + tensor), SEGMENT_ALIGN) + start
    moments_ptr += offset
    masters_ptr += offset
    ACC: tl.constexpr = moments_ptr.dtype.element_ty
    # shadows[1 + j] is that of average j, if it has one
    averages = ()
    shadows = ()
    if SHADOWED:
        shadows += (elements(tl.load(shadows_ptr), offset, SHADOW, True),)
        shadows_ptr += 1
    for j in tl.static_range(AVERAGES):
        averages += (elements(tl.load(averages_ptr + j), offset, ACC, True),)
        if SHADOWED:
            shadows += (elements(tl.load(shadows_ptr), offset, SHADOW, True),)
            if (MASK >> j) & 1:
                shadows_ptr += 1
    total = total.to(tl.int64)

    rows_ptr += 8 * tensor
    w1 = tl.load(rows_ptr)
    w2 = tl.load(rows_ptr + 1)
    decay = tl.load(rows_ptr + 2)
    size = tl.load(rows_ptr + 3)
    a = tl.load(rows_ptr + 4)
    b = tl.load(rows_ptr + 5)
    l2 = tl.load(rows_ptr + 6)
    clip = tl.load(shared_ptr)
    rates = ()
    for j in tl.static_range(AVERAGES):
        rates += (tl.load(shared_ptr + 2 + j),)

    cols = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    if left >= CHUNK:
        for begin in range(0, CHUNK, BLOCK):
            sweep_block(
                parameter_ptr, gradient_ptr, moments_ptr, masters_ptr, averages, shadows, total,
                address != 0,
                w1, w2, decay, size, a, b, l2, clip, rates, begin + cols, CHUNK,
                MASK, AVERAGES, MASTER, SHADOWED, True,
            )  # fmt: skip
    else:
        end = left.to(tl.int32)
        begin = 0
        while begin < end:
            sweep_block(
                parameter_ptr, gradient_ptr, moments_ptr, masters_ptr, averages, shadows, total,
                address != 0,
                w1, w2, decay, size, a, b, l2, clip, rates, begin + cols, end,
                MASK, AVERAGES, MASTER, SHADOWED, False,
            )  # fmt: skip
            begin += BLOCK


def launch_tick(
    tensors: Tensor,
    hyper: Tensor,
    limit: Tensor,
    sums: Tensor | None,
    steps: Tensor,
    rows: Tensor,
    shared: Tensor,
    norm: Tensor,
    counts: Tensor,
    *,
    radam: bool,
    kernel: Kernel = tick_kernel,
) -> None:
    """The scalars of one step; the steps of each tensor and of the optimizer advance.

    Args:
        tensors: see `tables`.
        hyper: float64 ``[groups, 6]``: lr, beta1, beta2, eps, decoupled weight decay, L2 decay.
        limit: float64 ``[1]``, the norm to clip to, may be inf.
        sums: float64 ``[classes]``, squared norms; None: no clipping, and every step is applied.
        steps: float32 ``[n]``, updates that each tensor has had.
        rows: dtype of the state ``[n, 8]``: w1, w2, decay, size, a, b, l2, 0.
        shared: dtype of the state ``[2 + k]``; clip coefficient and 1 or 0 for applied are written.
        norm: dtype of the state ``[1]``, of all gradients; not written without `sums`.
        counts: int64 ``[3]``: steps attempted, skipped, skipped in a row.
        radam: RAdam, else AdamW.
    """
    n = tensors.shape[1]
    assert tensors.dtype == torch.int64 and tensors.is_contiguous()
    for value in (hyper, limit, limit if sums is None else sums):
        assert value.dtype == torch.float64 and value.is_contiguous(), value.dtype
    assert steps.dtype == torch.float32 and steps.shape == (n,) and hyper.shape[1] == 6
    assert rows.shape == (n, 8) and rows.is_contiguous() and rows.dtype == shared.dtype
    assert counts.dtype == torch.int64 and counts.shape == (3,)
    kernel[(max(1, launch.ceil_div(n, TICK_BLOCK)),)](
        tensors,
        hyper,
        limit,
        limit if sums is None else sums,
        steps,
        rows,
        shared,
        norm,
        counts,
        n,
        NORM=sums is not None,
        CLASSES=0 if sums is None else sums.numel(),
        RADAM=radam,
        BLOCK=TICK_BLOCK,
        num_warps=TICK_BLOCK // launch.target(tensors).warp_size,
    )


def launch_sweep(
    tensors: Tensor,
    chunks: Tensor,
    segment: Segment,
    moments: Tensor,
    averages: Tensor,
    rows: Tensor,
    shared: Tensor,
    *,
    masters: Tensor | None = None,
    shadows: Tensor | None = None,
    shadow_dtype: torch.dtype | None = None,
    mask: int = 0,
    config: LaunchConfig | None = None,
    kernel: Kernel = sweep_kernel,
) -> None:
    """The whole update of the chunks of one segment, in place.

    Args:
        tensors, chunks, moments, averages: see `tables`.
        rows, shared: of `launch_tick`; the rates of the averages stand in `shared` already.
        masters: the dtype of `moments` ``[total]``, where parameters have less precision.
        shadows: int64 ``[1 + bits of mask]``: addresses of the copies of the parameters and of
            the averages of `mask`, of `shadow_dtype`; in order.
        shadow_dtype: bfloat16 or float16; None: there are none.
        mask: bit j: average j has a shadow.
    """
    check_tables(tensors, chunks, segment)
    total, count = moments.shape[1], averages.numel()
    assert moments.dtype == rows.dtype == shared.dtype and moments.is_contiguous(), moments.dtype
    assert total % tables.SEGMENT_ALIGN == 0, f"rows of {total} elements"
    assert averages.dtype == torch.int64 and shared.shape == (2 + count,)
    assert masters is None or (masters.shape == (total,) and masters.dtype == moments.dtype)
    assert 0 <= mask < 2**count and (mask == 0 or shadow_dtype is not None), mask
    if shadow_dtype is not None:
        assert shadows is not None and shadows.dtype == torch.int64
        assert shadows.shape == (1 + mask.bit_count(),), shadows.shape
    if segment.count == 0:
        return
    config = config or launch.streamed(moments.element_size(), launch.target(moments).warp_size)
    assert CHUNK % config.BLOCK == 0, f"blocks of {config.BLOCK} in chunks of {CHUNK}"
    kernel[(segment.count,)](
        tensors,
        chunks,
        moments,
        moments if masters is None else masters,
        averages,
        averages if shadows is None else shadows,
        rows,
        shared,
        segment.first,
        tensors.shape[1],
        chunks.shape[1],
        total,
        PARAMETER=ELEMENTS[segment.parameter],
        GRADIENT=ELEMENTS[segment.gradient],
        ALIGNED=segment.aligned,
        AVERAGES=count,
        MASK=mask,
        MASTER=masters is not None,
        SHADOWED=shadow_dtype is not None,
        SHADOW=ELEMENTS[shadow_dtype or moments.dtype],
        SEGMENT_ALIGN=tables.SEGMENT_ALIGN,
        CHUNK=CHUNK,
        BLOCK=config.BLOCK,
        VECTOR=config.VECTOR,
        num_warps=config.num_warps,
    )
