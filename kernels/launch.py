"""How the kernels are launched: configurations as pure functions of sizes, and address arithmetic.

Nothing is tuned at run time. A configuration follows from the elements per sample, the narrowest
float that is read or written and the warp size, for the loss also from the samples of the batch, so
the same call compiles to the same code and adds in the same order on every machine; a measured
better one is passed as ``config=``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

PER_THREAD = 16
"""Elements per thread: amortises the scalar work of a program over four Philox calls."""

MAX_BLOCK = 2048
MAX_SAMPLE = 16384
"""Largest sample that one program of the consistency loss keeps in registers."""

LOSS_BLOCK = 4096
MIN_LOSS_BLOCK = 1024
FEW_PROGRAMS = 128
"""Programs that leave multiprocessors idle. A constant, and not the number of those that a device
has: on that the order of a sum, and with it the bits of a run, would depend."""

MAX_CHUNKS = 512
"""Largest number of partial sums per sample: it bounds what each program adds up again."""

MAX_ELEMENTS = 2**30
"""Largest sample: its columns, rounded up to whole blocks, stay within 32 bits."""


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Inside, the tensor's device is the current one, on which Triton launches."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


@dataclass(frozen=True)
class LaunchConfig:
    """One launch of one kernel.

    Args:
        BLOCK: elements of a sample per program and loop iteration, a power of two.
        num_warps: warps per program.
        VECTOR: neighbouring elements that one thread owns: 16 bytes of the narrowest float.
            Wider types exchange through shared memory to be stored in 16 bytes too.
        TAIL: loss only: elements beyond BLOCK, a power of two or 0.
        STEPS: loss in two launches only: iterations of BLOCK per program.
    """

    BLOCK: int
    num_warps: int
    VECTOR: int = 4
    TAIL: int = 0
    STEPS: int = 1


@dataclass(frozen=True)
class Target:
    """What a launcher must know of the device.

    Args:
        warp_size: threads per warp.
        fast: the hardware's approximate log2, sin and cos can be called.
    """

    warp_size: int
    fast: bool


def target(x: Tensor) -> Target:
    """The target that a tensor lives on; the interpreter counts as 32 wide without fast maths."""
    if torch.version.hip is not None:
        return Target(warp_size=64, fast=False)
    return Target(warp_size=32, fast=x.is_cuda)


@functools.cache
def resources(device: torch.device) -> tuple[int, int]:
    """Major compute capability, 0 if not NVIDIA's, and shared memory of a program in bytes."""
    if device.type == "cuda" and torch.version.hip is None:
        properties = torch.cuda.get_device_properties(device)
        return properties.major, properties.shared_memory_per_block_optin
    return 0, 2**16


def narrowest(*tensors: Tensor | None) -> int:
    """Bytes of the narrowest float among `tensors`.

    uint8 does not count: owning 16 pixels would cost every other operand an exchange, and pixels
    are the smallest part of the traffic. They are read VECTOR bytes at a time.
    """
    return min(t.element_size() for t in tensors if t is not None and t.is_floating_point())


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, low: int, high: int) -> int:
    """The smallest power of two >= n, clipped to [low, high] (themselves powers of two)."""
    power = low
    while power < high and power < n:
        power *= 2
    return power


def warps(elements: int, warp_size: int, per_thread: int = PER_THREAD) -> int:
    """Warps that give each thread about `per_thread` of `elements`, up to 512 threads.

    With 1024 threads the 64 registers of each would not hold a residual and its operands.
    """
    return power_of_two(elements // (per_thread * warp_size), 1, 512 // warp_size)


def pointwise(D: int, width: int, warp_size: int = 32) -> LaunchConfig:
    """For maps of single elements: the largest block that wastes at most 1/8 of its lanes."""
    block = power_of_two(D, 128, MAX_BLOCK)
    while block > 512 and 8 * (ceil_div(D, block) * block - D) > D:
        block //= 2
    return LaunchConfig(block, warps(block, warp_size), VECTOR=16 // width)


def per_sample(D: int, width: int, warp_size: int = 32) -> LaunchConfig:
    """For one program per sample: D covered by one or two powers of two, 3072 = 2048 + 1024.

    The largest samples are halved although they are one power of two: a thread then works on 16
    elements at a time, and its registers hold the residual of all 32.
    """
    block, tail = power_of_two(D, 128, MAX_SAMPLE), 0
    if block > 128 and (3 * block >= 4 * D or block > MAX_SAMPLE // 2):
        block //= 2
        tail = power_of_two(D - block, 128, block)
    return LaunchConfig(block, warps(block, warp_size), VECTOR=16 // width, TAIL=tail)


def split(B: int, D: int) -> bool:
    """Whether the loss spreads a sample over several programs, in two launches.

    Above MAX_SAMPLE it has to. Below, the second launch makes every residual again: k programs do
    the work of one in 2 / k of its time where multiprocessors are idle, and what they save must
    pay for a launch. So only the largest samples are split, of batches that leave room for 8
    programs each. One of 16384 then costs its multiprocessor 1400 cycles of issue instead of 5200,
    one of 3072 as a whole 1000 (counted in the code for sm_90).
    """
    return D > MAX_SAMPLE or (D > MAX_SAMPLE // 2 and 8 * B <= FEW_PROGRAMS)


def chunked(B: int, D: int, width: int, warp_size: int = 32) -> LaunchConfig:
    """For samples of many programs that reduce in a fixed order, at most MAX_CHUNKS of them."""
    block = LOSS_BLOCK
    while block > MIN_LOSS_BLOCK and B * ceil_div(D, block) < FEW_PROGRAMS:
        block //= 2
    steps = ceil_div(D, LOSS_BLOCK * MAX_CHUNKS)
    return LaunchConfig(block, warps(block, warp_size), VECTOR=16 // width, STEPS=steps)


def streamed(width: int, warp_size: int = 32) -> LaunchConfig:
    """For the sweep: each of 256 threads takes one vector of every operand at a time.

    Compiled for sm_90 this holds 48 registers with one average and 58 with three: four programs
    or more per multiprocessor, each thread with five to nine vectors in flight. Two vectors at a
    time take 79 and 106 registers for the same bytes in flight. Operands narrower than `width`
    move 8 bytes per thread: 16 would take an exchange of all others.
    """
    vector = 16 // width
    return LaunchConfig(256 * vector, 256 // warp_size, VECTOR=vector)


def reduced(n: int, width: int, warp_size: int = 32) -> LaunchConfig:
    """For n elements that one program adds up: all its loads are in flight at once."""
    return LaunchConfig(n, warps(n, warp_size), VECTOR=16 // width)


def chunks(D: int, config: LaunchConfig) -> int:
    """Programs per sample."""
    return ceil_div(D, config.BLOCK * config.STEPS)


def grid(B: int, D: int, config: LaunchConfig) -> tuple[int]:
    """One flat axis: the other axes of a grid end at 65535."""
    # chunks of one sample are neighbours, so programs that run together read memory in order
    programs = B * chunks(D, config)
    assert programs < 2**31, f"{programs} programs exceed the grid"
    return (programs,)


def extent(like: Tensor, *others: Tensor | None) -> tuple[int, int]:
    """(B, D) of `like`; every tensor must be contiguous and of its shape.

    Contiguous, because the noise is a function of the logical element index.
    """
    for tensor in (like, *others):
        if tensor is not None:
            assert tensor.shape == like.shape, f"{tensor.shape} != {like.shape}"
            assert tensor.is_contiguous(), "kernels take contiguous samples"
    D = math.prod(like.shape[1:])
    assert D <= MAX_ELEMENTS, f"samples of {D} elements exceed 32-bit columns"
    return like.shape[0], D


def check_coefficients(B: int, coefficients: Sequence[Tensor | None]) -> None:
    """Per-sample coefficients are float32 or float64 and contiguous, one for each sample."""
    for value in coefficients:
        if value is not None:
            assert value.dtype in (torch.float32, torch.float64), value.dtype
            assert value.is_contiguous(), value.stride()
            assert value.numel() == B, f"{value.numel()} coefficients for {B} samples"


def check_key(key: Tensor) -> None:
    assert key.dtype == torch.int64 and key.numel() == 3 and key.is_contiguous()


@triton.jit
def locate(pid, D, CHUNK: tl.constexpr):
    """Program -> (sample, first column, offset of the row); the offset needs 64 bits."""
    # a 64-bit division would cost more than the rest: only the products leave 32 bits
    chunks = tl.cdiv(D, CHUNK)
    sample = (pid // chunks).to(tl.int64)
    start = (pid % chunks) * CHUNK
    return sample, start, sample * D


@triton.jit
def columns(start, D, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Columns of a block and which of them exist; a thread is given VECTOR neighbours."""
    # the hint stands on the range itself: on a sum with a constant 0 it would be folded away
    cols = start + tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)
    return cols, cols < D
