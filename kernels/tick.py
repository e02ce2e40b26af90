"""The scalars of one optimizer step, from hyperparameters, squared norm and each tensor's step.

All on the device: a captured step needs nothing from the host. AdamW and RAdam differ in these
scalars alone. A step whose norm is not finite changes nothing but its counts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcm.kernels import launch, tables
from fastcm.kernels.noising import Kernel, store

TICK_BLOCK = 128
"""Tensors per program, each with a thread of its own."""

_GRADIENT = tl.constexpr(tables.GRADIENT)
_GROUP = tl.constexpr(tables.GROUP)


@triton.jit
def power(base, exponent):
    """base^exponent for 0 <= base < 1 and exponent >= 1, in float64."""
    # log 0 times an exponent must not become a NaN; 1e-300 is 0 next to 1
    return tl.exp(exponent * tl.log(tl.maximum(base, 1e-300)))


@triton.jit(do_not_specialize=["averages", "n"])
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
    ramps_ptr,
    averages,
    n,
    NORM: tl.constexpr,
    CLASSES: tl.constexpr,
    RADAM: tl.constexpr,
    LANES: tl.constexpr,
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
        if LANES > 0:
            average = tl.arange(0, LANES)
            there = average < averages
            ramp_ptr = ramps_ptr + 4 * average
            largest = tl.load(ramp_ptr, mask=there, other=0.0)
            attempts = tl.load(counts_ptr).to(tl.float64)
            base = attempts + tl.load(ramp_ptr + 1, mask=there, other=0.0)
            base /= attempts + tl.load(ramp_ptr + 2, mask=there, other=1.0)
            exponent = tl.load(ramp_ptr + 3, mask=there, other=1.0)
            decay = tl.minimum(power(base, exponent), largest)
            store(shared_ptr + 2, average, 1.0 - decay, there & (largest > 0.0))
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
    ramps: Tensor | None = None,
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
        ramps: float64 ``[k, 4]``, of averages whose decay at attempt n, from 0, is
            min(first, ((n + second) / (n + third))^fourth); of others the first is 0, and their
            number in `shared` stays.
        radam: RAdam, else AdamW.
    """
    n = tensors.shape[1]
    assert tensors.dtype == torch.int64 and tensors.is_contiguous()
    for value in (hyper, limit, limit if sums is None else sums):
        assert value.dtype == torch.float64 and value.is_contiguous(), value.dtype
    assert steps.dtype == torch.float32 and steps.shape == (n,) and hyper.shape[1] == 6
    assert rows.shape == (n, 8) and rows.is_contiguous() and rows.dtype == shared.dtype
    assert counts.dtype == torch.int64 and counts.shape == (3,)
    if ramps is not None:
        assert ramps.dtype == torch.float64 and ramps.shape == (len(shared) - 2, 4)
        assert ramps.is_contiguous()
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
        limit if ramps is None else ramps,
        0 if ramps is None else len(ramps),
        n,
        NORM=sums is not None,
        CLASSES=0 if sums is None else sums.numel(),
        RADAM=radam,
        LANES=0 if ramps is None else launch.power_of_two(len(ramps), 1, 2**20),
        BLOCK=TICK_BLOCK,
        num_warps=TICK_BLOCK // launch.target(tensors).warp_size,
    )
