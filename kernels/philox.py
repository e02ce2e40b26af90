"""Counter-based normals in registers: one Philox4x32-10 call makes four of them.

The counter is (element // 4, sample, step low, stream << 24 | step high), the key the seed: see
`fastcm.rng`, whose words these are bit for bit. The four normals of a call become elements 4i to
4i + 3 of the same thread, so that no shared memory is needed to store them in 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def multiply(a, M: tl.constexpr):
    """High and low words of a 32 x 32 bit product: one widening multiplication, not two."""
    product = a.to(tl.uint64) * M
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1, ROUNDS: tl.constexpr = 10):
    """Philox4x32: four counter words and two key words, uint32, to four random words."""
    for _ in tl.static_range(ROUNDS):
        high0, low0 = multiply(c0, 0xD2511F53)
        high1, low1 = multiply(c2, 0xCD9E8D57)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def load_counter(key_ptr, stream, first_sample, sample):
    """The words that all elements of a sample share: c1, c2, c3, k0, k1."""
    seed = tl.load(key_ptr)
    step = tl.load(key_ptr + 1)
    c1 = (tl.load(key_ptr + 2) + first_sample + sample).to(tl.uint32)
    c2 = step.to(tl.uint32)
    c3 = (((step >> 32) & 0xFFFFFF) | (stream << 24)).to(tl.uint32)
    return c1, c2, c3, seed.to(tl.uint32), (seed >> 32).to(tl.uint32)


@triton.jit
def circle(u, FAST: tl.constexpr):
    """(cos, sin) of 2 pi u for u in (0, 1]."""
    if FAST:
        # half a turn back, into [-pi, pi] where the hardware's sin and cos are accurate
        angle = tl.fma(u, 6.283185307179586, -3.141592653589793)
        c = -libdevice.fast_cosf(angle)
        s = -libdevice.fast_sinf(angle)
    else:
        # 4 u is quarter + rest without rounding; polynomials in rest, exact to 3e-9
        quarter = tl.floor(u * 4.0 + 0.5)
        rest = u * 4.0 - quarter
        y = rest * rest
        sine = tl.fma(y, -0.004602149212814176, 0.07968021764775542)
        sine = tl.fma(y, sine, -0.6459634776648118)
        sine = tl.fma(y, sine, 1.5707963219532366) * rest
        cosine = tl.fma(y, 0.0009067398984032665, -0.020861528342199967)
        cosine = tl.fma(y, cosine, 0.2536694103571085)
        cosine = tl.fma(y, cosine, -1.2337005493742192)
        cosine = tl.fma(y, cosine, 1.0)
        index = quarter.to(tl.int32)
        odd = (index & 1) != 0
        c = tl.where(odd, sine, cosine)
        s = tl.where(odd, cosine, sine)
        c = tl.where(((index + 1) & 2) != 0, -c, c)
        s = tl.where((index & 2) != 0, -s, s)
    return c, s


@triton.jit
def box_muller(w0, w1, FAST: tl.constexpr):
    """Two words to two normals."""
    # (w + 1/2) / 2^32
    u0 = tl.fma(w0.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    u1 = tl.fma(w1.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    if FAST:
        log2 = libdevice.fast_log2f(u0)
    else:
        log2 = tl.log2(u0)
    # -2 ln u0; an approximate log2 may be a little above 0 next to u0 = 1
    radius = tl.sqrt(tl.maximum(log2 * -1.3862943611198906, 0.0))
    c, s = circle(u1, FAST)
    return radius * c, radius * s


@triton.jit
def four_normals(c0, c1, c2, c3, k0, k1, FAST: tl.constexpr):
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1)
    n0, n1 = box_muller(w0, w1, FAST)
    n2, n3 = box_muller(w2, w3, FAST)
    return n0, n1, n2, n3


@triton.jit
def normals(
    key_ptr,
    stream,
    first_sample,
    sample,
    start,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    FAST: tl.constexpr,
):
    """Normals of elements start .. start + BLOCK - 1 of one sample; start is a multiple of 4."""
    c1, c2, c3, k0, k1 = load_counter(key_ptr, stream, first_sample, sample)
    WORDS: tl.constexpr = 2 if VECTOR >= 8 else 1
    c0 = (start // 4 + tl.arange(0, BLOCK // (4 * WORDS)) * WORDS).to(tl.uint32)
    n0, n1, n2, n3 = four_normals(c0, c1, c2, c3, k0, k1, FAST)
    if WORDS == 2:
        # a second call in the same thread: eight neighbours, 16 bytes of a 2-byte float
        m0, m1, m2, m3 = four_normals(c0 + 1, c1, c2, c3, k0, k1, FAST)
        n0 = tl.join(n0, m0)
        n1 = tl.join(n1, m1)
        n2 = tl.join(n2, m2)
        n3 = tl.join(n3, m3)
    # join puts its two operands on a new last axis: this order makes element 4i + j normal j
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [BLOCK])
