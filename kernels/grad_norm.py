"""The squared norm of all gradients: partial sums of chunks, then sums of them, in a fixed order.

No atomics: each chunk is one tree of lanes, and its sum has its own place. The same gradients give
the same bits in every run, on every rank and in every replay of a graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcm.kernels import launch, tables
from fastcm.kernels.chunks import ELEMENTS, check_tables, elements, load_part, locate_chunk
from fastcm.kernels.launch import LaunchConfig
from fastcm.kernels.noising import Kernel
from fastcm.kernels.tables import CHUNK, Segment

FINISH = LaunchConfig(BLOCK=4096, num_warps=8)
"""One program adds all partial sums of a class: what it keeps in flight is its speed."""

_GRADIENT = tl.constexpr(tables.GRADIENT)


@triton.jit(do_not_specialize=["first", "n", "C"])
def grad_norm_kernel(
    tensors_ptr,
    chunks_ptr,
    partial_ptr,
    first,
    n,
    C,
    GRADIENT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    chunk = first + tl.program_id(0).to(tl.int64)
    tensor, start, left = locate_chunk(tensors_ptr, chunks_ptr, chunk, n, C, BLOCK)
    address = tl.load(tensors_ptr + _GRADIENT * n + tensor)
    cols = tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    g = tl.zeros([BLOCK], ACC)
    if address != 0:
        gradient_ptr = elements(address, start, GRADIENT, ALIGNED)
        if left >= BLOCK:
            g = load_part(gradient_ptr, cols, left, ACC, True)
        else:
            g = load_part(gradient_ptr, cols, left, ACC, False)
    tl.store(partial_ptr + chunk, tl.sum(g * g).to(tl.float64))


@triton.jit
def grad_norm_finish_kernel(partial_ptr, bounds_ptr, sums_ptr, BLOCK: tl.constexpr):
    """One program per class; lane i adds the partial sums i, i + BLOCK, ... of it."""
    c = tl.program_id(0)
    last = tl.load(bounds_ptr + c + 1)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    start = tl.load(bounds_ptr + c)
    while start < last:
        sums += tl.load(partial_ptr + start + lanes, mask=start + lanes < last, other=0.0)
        start += BLOCK
    tl.store(sums_ptr + c, tl.sum(sums))


def launch_grad_norm(
    tensors: Tensor,
    chunks: Tensor,
    segments: Sequence[Segment],
    partial: Tensor,
    *,
    config: LaunchConfig | None = None,
    kernel: Kernel = grad_norm_kernel,
) -> None:
    """The sum of squares of each chunk's gradient into `partial`, 0 where there is none.

    Args:
        tensors, chunks: see `tables`.
        segments: what to cover; other elements of `partial` stay.
        partial: float64 ``[C]``.
    """
    assert partial.dtype == torch.float64 and partial.shape == chunks.shape[1:], partial.shape
    for segment in segments:
        check_tables(tensors, chunks, segment)
        if segment.count == 0:
            continue
        made = config or launch.reduced(
            CHUNK, segment.gradient.itemsize, launch.target(tensors).warp_size
        )
        assert made.BLOCK == CHUNK, f"a program adds a chunk of {CHUNK}, not {made.BLOCK}"
        kernel[(segment.count,)](
            tensors,
            chunks,
            partial,
            segment.first,
            tensors.shape[1],
            chunks.shape[1],
            GRADIENT=ELEMENTS[segment.gradient],
            ACC=tl.float64 if segment.gradient == torch.float64 else tl.float32,
            ALIGNED=segment.aligned,
            BLOCK=made.BLOCK,
            VECTOR=made.VECTOR,
            num_warps=made.num_warps,
        )


def launch_grad_norm_finish(
    partial: Tensor,
    bounds: Tensor,
    sums: Tensor,
    *,
    config: LaunchConfig = FINISH,
    kernel: Kernel = grad_norm_finish_kernel,
) -> None:
    """The sum of partial[bounds[c]:bounds[c + 1]] into sums[c].

    Args:
        partial: float64 ``[C]``.
        bounds: int64 ``[classes + 1]``, ascending, from 0 to C.
        sums: float64 ``[classes]``.
    """
    assert partial.dtype == sums.dtype == torch.float64 and bounds.dtype == torch.int64
    assert bounds.numel() == sums.numel() + 1, f"{bounds.numel()} bounds, {sums.numel()} sums"
    if sums.numel():
        kernel[(sums.numel(),)](
            partial, bounds, sums, BLOCK=config.BLOCK, num_warps=config.num_warps
        )
