"""How a program finds its chunk in the tables of the optimizer, and reads and writes it.

A pointer out of a table carries no alignment, and a mask splits vectors: 16-byte access takes a
hint on the pointer and a body without masks. Only the end of a tensor has one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcm.kernels import tables
from fastcm.kernels.noising import store
from fastcm.kernels.tables import Segment

ELEMENTS = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}

_NUMEL = tl.constexpr(tables.NUMEL)


@triton.jit
def locate_chunk(tensors_ptr, chunks_ptr, chunk, n, C, CHUNK: tl.constexpr):
    """Chunk -> (tensor, its first element in it, elements of the tensor from there on)."""
    tensor = tl.load(chunks_ptr + chunk).to(tl.int64)
    start = tl.load(chunks_ptr + C + chunk).to(tl.int64) * CHUNK
    return tensor, start, tl.load(tensors_ptr + _NUMEL * n + tensor) - start


@triton.jit
def elements(address, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer that an address in a table means, `start` elements on."""
    ptr = address.to(tl.pointer_type(DTYPE)) + start
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def load_part(ptr, cols, left, ACC: tl.constexpr, FULL: tl.constexpr):
    """A block in the dtype of the arithmetic, masked unless it is FULL."""
    if FULL:
        value = tl.load(ptr + cols)
    else:
        value = tl.load(ptr + cols, mask=cols < left, other=0.0)
    return value.to(ACC)


@triton.jit
def store_part(ptr, cols, left, value, FULL: tl.constexpr):
    if FULL:
        store(ptr, cols, value, None)
    else:
        store(ptr, cols, value, cols < left)


def check_tables(tensors: Tensor, chunks: Tensor, segment: Segment) -> None:
    assert tensors.dtype == torch.int64 and tensors.shape[0] == 5 and tensors.is_contiguous()
    assert chunks.dtype == torch.int32 and chunks.shape[0] == 2 and chunks.is_contiguous()
    assert 0 <= segment.first <= segment.first + segment.count <= chunks.shape[1], segment
