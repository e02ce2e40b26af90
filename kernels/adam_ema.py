"""Clip, Adam, every average and every low-precision copy in one sweep over the parameters.

The scalars are those that the tick leaves on the device.
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
from fastcm.kernels.noising import Kernel
from fastcm.kernels.tables import CHUNK, Segment

_PARAMETER = tl.constexpr(tables.PARAMETER)
_GRADIENT = tl.constexpr(tables.GRADIENT)
_OFFSET = tl.constexpr(tables.OFFSET)


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
