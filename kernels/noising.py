"""Noisy data alpha x0 + sigma z, once or twice with the same z, made where it is needed.

A `State` is an operand that the other kernels read: a tensor, or the closed form of one, which
they regenerate in float32 so that a rounded copy never enters their arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcm.kernels import launch
from fastcm.kernels.launch import LaunchConfig, columns, locate
from fastcm.kernels.philox import load_counter, normals, philox

Kernel = Any
"""A ``triton.jit`` function, or ``torch.library.wrap_triton`` of it."""

Config = Callable[[int, int, int], LaunchConfig]


@dataclass(frozen=True)
class State:
    """An operand ``[B, ...]``: the tensor `x`, or alpha x + sigma z with regenerated noise.

    Args:
        x: float; float or uint8 (meaning x / 127.5 - 1) in the closed form.
        alpha, sigma: coefficients ``[B]``, both or none.
        key: int64 ``[3]``: seed, step, first sample.
        stream, first_sample: of the noise.
    """

    x: Tensor
    alpha: Tensor | None = None
    sigma: Tensor | None = None
    key: Tensor | None = None
    stream: int = 0
    first_sample: int = 0

    @property
    def noised(self) -> bool:
        return self.alpha is not None

    def same_noise(self, other: State) -> bool:
        """Whether both are versions of one x0 under one z. Tensors are compared by identity."""
        return (
            self.noised
            and other.noised
            and self.x is other.x
            and self.key is other.key
            and self.stream == other.stream
            and self.first_sample == other.first_sample
        )

    def check(self, B: int) -> None:
        if self.noised:
            assert self.sigma is not None and self.key is not None
            launch.check_coefficients(B, (self.alpha, self.sigma))
            launch.check_key(self.key)
        else:
            assert self.x.is_floating_point(), f"uint8 needs coefficients, got {self.x.dtype}"

    def arguments(self) -> tuple[Any, ...]:
        """x, alpha, sigma, key, stream, first_sample; x again in place of what is not there."""
        if not self.noised:
            return self.x, self.x, self.x, self.x, 0, 0
        return self.x, self.alpha, self.sigma, self.key, self.stream, self.first_sample


def as_state(x: Tensor | State) -> State:
    return x if isinstance(x, State) else State(x)


def configure(
    config: LaunchConfig | None, make: Config, D: int, *tensors: Tensor | None
) -> tuple[LaunchConfig, bool]:
    """The given configuration or that of `make` for these tensors, and whether maths is fast."""
    on = launch.target(next(t for t in tensors if t is not None))
    return config or make(D, launch.narrowest(*tensors), on.warp_size), on.fast


@triton.jit
def load_unit(x_ptr, offsets, mask):
    """Data in float32; uint8 is mapped from 0..255 to -1..1."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0).to(tl.float32)
    if x_ptr.dtype.element_ty == tl.uint8:
        x = tl.fma(x, 0.00784313725490196, -1.0)
    return x


@triton.jit
def coefficient(ptr, sample):
    """That of a sample, in float32."""
    return tl.load(ptr + sample).to(tl.float32)


@triton.jit
def affine(a_ptr, x, b_ptr, y, sample):
    """a x + b y of one sample, its rounding spelled out: the same bits from every compiler."""
    return tl.fma(coefficient(a_ptr, sample), x, coefficient(b_ptr, sample) * y)


@triton.jit
def load_state(
    x_ptr,
    alpha_ptr,
    sigma_ptr,
    key_ptr,
    stream,
    first_sample,
    sample,
    row,
    start,
    D,
    REGENERATE: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    FAST: tl.constexpr,
):
    """A block of a `State` in float32."""
    cols, mask = columns(start, D, BLOCK, VECTOR)
    x = load_unit(x_ptr, row + cols, mask)
    if REGENERATE:
        z = normals(key_ptr, stream, first_sample, sample, start, BLOCK, VECTOR, FAST)
        x = affine(alpha_ptr, x, sigma_ptr, z, sample)
    return x


@triton.jit
def store(ptr, offsets, value, mask):
    tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["noise_stream", "first_sample"])
def noising_kernel(
    x0_ptr,
    alpha_ptr,
    sigma_ptr,
    alpha2_ptr,
    sigma2_ptr,
    key_ptr,
    out_ptr,
    out2_ptr,
    noise_stream,
    first_sample,
    D,
    BARE: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    FAST: tl.constexpr,
):
    sample, start, row = locate(tl.program_id(0), D, BLOCK)
    cols, mask = columns(start, D, BLOCK, VECTOR)
    z = normals(key_ptr, noise_stream, first_sample, sample, start, BLOCK, VECTOR, FAST)
    if BARE:
        store(out_ptr, row + cols, z, mask)
    else:
        x0 = load_unit(x0_ptr, row + cols, mask)
        store(out_ptr, row + cols, affine(alpha_ptr, x0, sigma_ptr, z, sample), mask)
        if PAIR:
            store(out2_ptr, row + cols, affine(alpha2_ptr, x0, sigma2_ptr, z, sample), mask)


def launch_noising(
    x0: Tensor,
    coeffs: Tensor | Sequence[tuple[Tensor, Tensor]],
    key: Tensor,
    out: Tensor,
    out2: Tensor | None = None,
    *,
    stream: int,
    first_sample: int = 0,
    config: LaunchConfig | None = None,
    kernel: Kernel = noising_kernel,
) -> None:
    """alpha x0 + sigma z into `out`, and a second version with the same z into `out2`.

    Scaling by c_in is a factor in both coefficients; the velocity z - x0 has alpha = -1,
    sigma = 1.

    Args:
        x0: ``[B, ...]``, uint8 or float.
        coeffs: (alpha, sigma) of each of the one or two versions, ``[B]``; float32 or float64, as
            all coefficients.
        key: int64 ``[3]``: seed, step, first sample; read on the device.
        out, out2: the shape of x0, float32, bfloat16 or float16, each its own.
        stream, first_sample: of the noise.
    """
    B, D = launch.extent(x0, out, out2)
    pairs = [(alpha, sigma) for alpha, sigma in coeffs]
    assert len(pairs) == (1 if out2 is None else 2), f"{len(pairs)} pairs of coefficients"
    launch.check_coefficients(B, [c for pair in pairs for c in pair])
    launch.check_key(key)
    assert out.dtype != torch.float64
    if B == 0 or D == 0:
        return
    config, fast = configure(config, launch.pointwise, D, x0, out, out2)
    # an absent operand is stood in for by one that is only read: no None in a traced launch
    kernel[launch.grid(B, D, config)](
        x0,
        *pairs[0],
        *pairs[-1],
        key,
        out,
        x0 if out2 is None else out2,
        stream,
        first_sample,
        D,
        BARE=False,
        PAIR=out2 is not None,
        BLOCK=config.BLOCK,
        VECTOR=config.VECTOR,
        FAST=fast,
        num_warps=config.num_warps,
    )


def launch_noise(
    out: Tensor,
    key: Tensor,
    *,
    stream: int,
    first_sample: int = 0,
    config: LaunchConfig | None = None,
    kernel: Kernel = noising_kernel,
) -> None:
    """Standard normals into `out`; see `launch_noising`."""
    B, D = launch.extent(out)
    launch.check_key(key)
    assert out.dtype != torch.float64
    if B == 0 or D == 0:
        return
    config, fast = configure(config, launch.pointwise, D, out)
    kernel[launch.grid(B, D, config)](
        out,
        *[key] * 5,
        out,
        out,
        stream,
        first_sample,
        D,
        BARE=True,
        PAIR=False,
        BLOCK=config.BLOCK,
        VECTOR=config.VECTOR,
        FAST=fast,
        num_warps=config.num_warps,
    )


@triton.jit(do_not_specialize=["noise_stream", "first_sample"])
def uniform_kernel(key_ptr, out_ptr, noise_stream, first_sample, B, BLOCK: tl.constexpr):
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c1, c2, c3, k0, k1 = load_counter(key_ptr, noise_stream, first_sample, sample)
    word, second, _, _ = philox((sample * 0).to(tl.uint32), c1, c2, c3, k0, k1)
    if out_ptr.dtype.element_ty == tl.int64:
        value = (word.to(tl.int64) << 31) ^ second.to(tl.int64)
    else:
        value = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    tl.store(out_ptr + sample, value, mask=sample < B)


def launch_uniform(
    out: Tensor,
    key: Tensor,
    *,
    stream: int,
    first_sample: int = 0,
    kernel: Kernel = uniform_kernel,
) -> None:
    """One number of each sample into `out` ``[B]``: of `fastcm.rng.uniform` in float64, of
    `fastcm.rng.integers` in int64."""
    launch.check_key(key)
    assert out.dtype in (torch.float64, torch.int64) and out.dim() == 1 and out.is_contiguous()
    B, BLOCK = out.shape[0], 128
    if B == 0:
        return
    grid = (-(-B // BLOCK),)
    kernel[grid](key, out, stream, first_sample, B, BLOCK=BLOCK, num_warps=4)
