"""Softmax attention and its tangent in one pass over the keys: six products instead of two.

With S = q k^T, tS = tq k^T + q tk^T, P the unnormalised softmax, l its row sums, H = P tS and
r the row sums of H:

    o = P v / l        to = (H v + P tv - r o) / l

Any constant may be taken off a row of tS, since H v and r o then lose the same: the tangent of the
first score is. And l and r are sums of P and H as they are rounded for the products, so that what
is constant in v cancels to the last bit. The logarithm of the sum has an exact l of its own: the
backward pass makes P anew from it. A head of D = 72, 80 or 96 is two pieces, 64 and the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastcm.kernels import launch
from fastcm.kernels.launch import ceil_div, power_of_two

MAX_HEAD = 128
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class AttentionConfig:
    """One launch: rows of q to a program, keys to an iteration, and what hides their latency."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


def pieces(D: int) -> tuple[int, int]:
    """Powers of two, the second perhaps 0, that cover a head with the least to pad."""
    whole = power_of_two(D, 16, MAX_HEAD)
    first = whole // 2
    second = power_of_two(D - first, 16, whole)
    return (first, second) if first >= 16 and first + second < whole else (whole, 0)


def configure(D: int, major: int, shared: int, warp_size: int) -> AttentionConfig:
    """The largest tile that compiles without spilling, found by compiling for each target.

    Args:
        D: head size.
        major, shared: see `launch.resources`.
        warp_size: threads of a warp.
    """
    first, second = pieces(D)
    wide = first + second > 64
    if warp_size == 64:  # CDNA: 64 KiB
        return AttentionConfig(64 if wide else 128, 32, 4, 1)
    if shared >= 200 * 1024:
        if major > 9 and not second:
            return AttentionConfig(128, 32, 8, 2 if wide else 3)
        return AttentionConfig(128, 64, 8, 3 if D <= 96 else 2)
    if not wide:
        return AttentionConfig(128, 32, 8, 3)
    return AttentionConfig(64, 64 if second == 0 and shared >= 120 * 1024 else 32, 8, 2)


@triton.jit
def load_rows(ptr, rows, stride, bound, D: tl.constexpr, WIDE: tl.constexpr):
    """Rows of a head, WIDE columns of which D exist, 0 beyond; beyond `bound` the last row."""
    # a row that is there needs no mask, which would keep four pointers in registers
    rows = tl.minimum(rows, bound - 1)
    cols = tl.arange(0, WIDE)
    at = ptr + rows[:, None] * stride + cols[None, :]
    if D < WIDE:
        return tl.load(at, cols[None, :] < D, 0.0)
    else:
        return tl.load(at)


@triton.jit
def store_rows(ptr, rows, stride, bound, value, D: tl.constexpr, WIDE: tl.constexpr):
    cols = tl.arange(0, WIDE)
    at = ptr + rows[:, None] * stride + cols[None, :]
    tl.store(at, value.to(ptr.dtype.element_ty), (rows[:, None] < bound) & (cols[None, :] < D))


@triton.jit
def products(
    q1, q2, k_ptr, keys, stride, M, total,
    D1: tl.constexpr, D2: tl.constexpr, END1: tl.constexpr, END2: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """total + q k^T of one block of keys."""
    k1 = load_rows(k_ptr, keys, stride, M, END1, D1)
    total = tl.dot(q1, tl.trans(k1), total, input_precision=PRECISION)
    if D2 > 0:
        k2 = load_rows(k_ptr + D1, keys, stride, M, END2, D2)
        total = tl.dot(q2, tl.trans(k2), total, input_precision=PRECISION)
    return total


@triton.jit
def attention_jvp_kernel(
    q_ptr, k_ptr, v_ptr, tq_ptr, tk_ptr, tv_ptr, o_ptr, to_ptr, lse_ptr,
    q_z, q_h, q_n, k_z, k_h, k_n, v_z, v_h, v_n, tq_z, tq_h, tq_n, tk_z, tk_h, tk_n,
    tv_z, tv_h, tv_n, o_z, o_h, o_n,
    heads, N, M, lse_length, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, HAS_TV: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one head: o, its tangent, and the logarithm of the sum of exp(S)."""
    END1: tl.constexpr = D if D2 == 0 else D1
    END2: tl.constexpr = D - END1
    blocks = tl.cdiv(lse_length, BLOCK_M)
    pid = tl.program_id(0)
    head, block = (pid // blocks).to(tl.int64), pid % blocks
    if CAUSAL:
        block = blocks - 1 - block  # the longest rows first
    z, h = head // heads, head % heads
    scale = tl.cast(scale, tl.float32)  # compiled code passes float64
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)

    q_ptr += (z * q_z + h * q_h) * VECTOR
    k_ptr += (z * k_z + h * k_h) * VECTOR
    v_ptr += (z * v_z + h * v_h) * VECTOR
    q1 = load_rows(q_ptr, rows, q_n * VECTOR, N, END1, D1)
    q2, tq1, tq2 = q1, q1, q1
    if D2 > 0:
        q2 = load_rows(q_ptr + D1, rows, q_n * VECTOR, N, END2, D2)
    first = tl.arange(0, 1)
    center = tl.zeros([BLOCK_M], dtype=tl.float32)
    if HAS_TQ:
        tq_ptr += (z * tq_z + h * tq_h) * VECTOR
        tq1 = load_rows(tq_ptr, rows, tq_n * VECTOR, N, END1, D1)
        center += tl.sum(tq1.to(tl.float32) * load_rows(k_ptr, first, 0, M, END1, D1), 1)
        if D2 > 0:
            tq2 = load_rows(tq_ptr + D1, rows, tq_n * VECTOR, N, END2, D2)
            k2 = load_rows(k_ptr + D1, first, 0, M, END2, D2)
            center += tl.sum(tq2.to(tl.float32) * k2, 1)
    if HAS_TK:
        tk_ptr += (z * tk_z + h * tk_h) * VECTOR
        center += tl.sum(q1.to(tl.float32) * load_rows(tk_ptr, first, 0, M, END1, D1), 1)
        if D2 > 0:
            k2 = load_rows(tk_ptr + D1, first, 0, M, END2, D2)
            center += tl.sum(q2.to(tl.float32) * k2, 1)
    if HAS_TV:
        tv_ptr += (z * tv_z + h * tv_h) * VECTOR
    center *= scale

    o1 = tl.zeros([BLOCK_M, D1], dtype=tl.float32)
    to1 = o1
    o2, to2 = o1, o1
    if D2 > 0:
        o2 = tl.zeros([BLOCK_M, D2], dtype=tl.float32)
        to2 = o2
    exact = tl.zeros([BLOCK_M], dtype=tl.float32)
    total, r = exact, exact
    peak = exact - float("inf")
    end, last = M, M - 1
    if CAUSAL:
        end = tl.minimum(M, (block + 1) * BLOCK_M)
        last = tl.minimum(rows, M - 1)[:, None]
    for start in range(0, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        none = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        S = products(q1, q2, k_ptr, keys, k_n * VECTOR, M, none, D1, D2, END1, END2, PRECISION)
        tS = none
        if HAS_TQ:
            tS = products(tq1, tq2, k_ptr, keys, k_n * VECTOR, M, tS, D1, D2, END1, END2, PRECISION)
        if HAS_TK:
            tS = products(q1, q2, tk_ptr, keys, tk_n * VECTOR, M, tS, D1, D2, END1, END2, PRECISION)
        S *= scale * _LOG2_E
        if MASKED:
            S = tl.where(keys[None, :] <= last, S, float("-inf"))
        higher = tl.maximum(peak, tl.max(S, 1))
        keep = tl.exp2(peak - higher)
        peak = higher
        P = tl.exp2(S - peak[:, None])
        exact = exact * keep + tl.sum(P, 1)
        Q = P.to(v_ptr.dtype.element_ty)
        total = total * keep + tl.sum(Q.to(tl.float32), 1)
        if HAS_TQ or HAS_TK:
            H = (P * (tS * scale - center[:, None])).to(v_ptr.dtype.element_ty)
            r = r * keep + tl.sum(H.to(tl.float32), 1)
        to1 = to1 * keep[:, None]
        if D2 > 0:
            to2 = to2 * keep[:, None]
        v1 = load_rows(v_ptr, keys, v_n * VECTOR, M, END1, D1)
        o1 = tl.dot(Q, v1, o1 * keep[:, None], input_precision=PRECISION)
        if D2 > 0:
            v2 = load_rows(v_ptr + D1, keys, v_n * VECTOR, M, END2, D2)
            o2 = tl.dot(Q, v2, o2 * keep[:, None], input_precision=PRECISION)
        if HAS_TV:
            tv1 = load_rows(tv_ptr, keys, tv_n * VECTOR, M, END1, D1)
            to1 = tl.dot(Q, tv1, to1, input_precision=PRECISION)
            if D2 > 0:
                tv2 = load_rows(tv_ptr + D1, keys, tv_n * VECTOR, M, END2, D2)
                to2 = tl.dot(Q, tv2, to2, input_precision=PRECISION)
        if HAS_TQ or HAS_TK:
            to1 = tl.dot(H, v1, to1, input_precision=PRECISION)
            if D2 > 0:
                to2 = tl.dot(H, v2, to2, input_precision=PRECISION)

    at = (z * o_z + h * o_h) * VECTOR
    o1 /= total[:, None]
    to1 = (to1 - r[:, None] * o1) / total[:, None]
    store_rows(o_ptr + at, rows, o_n * VECTOR, N, o1, END1, D1)
    store_rows(to_ptr + at, rows, o_n * VECTOR, N, to1, END1, D1)
    if D2 > 0:
        o2 /= total[:, None]
        to2 = (to2 - r[:, None] * o2) / total[:, None]
        store_rows(o_ptr + at + D1, rows, o_n * VECTOR, N, o2, END2, D2)
        store_rows(to_ptr + at + D1, rows, o_n * VECTOR, N, to2, END2, D2)
    lse = tl.where(rows < N, (peak + tl.log2(exact)) * _LN_2, float("inf"))
    tl.store(lse_ptr + head * lse_length + rows, lse, rows < lse_length)


def launch_attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    o: Tensor,
    to: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
    config: AttentionConfig | None = None,
    kernel: Any = attention_jvp_kernel,
) -> None:
    """Write o and its tangent, ``[Z, H, N, D]``, and lse, float32 ``[Z, H, >= N]``.

    Args:
        q, tq: ``[Z, H, N, D]``, D <= 128, with any strides but 1 in the last dimension.
        k, v, tk, tv: ``[Z, H, M, D]``, M >= 1, likewise.
        o, to: of equal strides.
        lse: contiguous; infinite beyond N.
        causal: row i sees the keys up to i.
        scale: of the scores.
    """
    Z, H, N, D = q.shape
    M = k.shape[2]
    given = [x for x in (tq, tk, tv) if x is not None]
    assert 0 < D <= MAX_HEAD and M > 0 and given, (D, M, len(given))
    for x in (q, k, v, o, to, *given):
        assert x.dtype == q.dtype and x.stride(3) == 1, (x.dtype, x.stride())
        assert x.stride(2) * max(N, M) < 2**31, "rows of a head exceed 32 bits"
    assert o.stride() == to.stride() and lse.is_contiguous() and lse.shape[2] >= N
    if Z * H * N == 0:
        return
    if config is None:
        config = configure(D, *launch.resources(q.device), launch.target(q).warp_size)
    D1, D2 = pieces(D)
    operands = [q, k, v, *(q if t is None else t for t in (tq, tk, tv))]
    strides = [n for x in (*operands, o) for n in x.stride()[:3]]
    whole = 16 // q.element_size()
    # in 16 bytes where they are whole numbers of them, which the type of a number does not say
    vector = whole if all(n % whole == 0 for n in strides) else 1
    programs = Z * H * ceil_div(lse.shape[2], config.BLOCK_M)
    assert programs < 2**31, f"{programs} programs exceed the grid"
    kernel[(programs,)](
        *operands, o, to, lse, *(n // vector for n in strides), H, N, M, lse.shape[2], scale,
        D=D, D1=D1, D2=D2, BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N,
        HAS_TQ=tq is not None, HAS_TK=tk is not None, HAS_TV=tv is not None,
        CAUSAL=causal, MASKED=causal or M % config.BLOCK_N > 0, PRECISION="ieee", VECTOR=vector,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
