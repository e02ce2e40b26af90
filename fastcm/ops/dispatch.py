"""The one place where the implementation of an operator is chosen."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

try:
    import fastcm.kernels.noising  # noqa: F401

    HAS_KERNELS = True
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "triton":
        raise
    HAS_KERNELS = False


class Door(Enum):
    """Where a public operator goes, once its arguments are valid."""

    KERNEL = "a Triton kernel, as a registered operator"
    REFERENCE = "plain torch"


def door(*operands: Tensor | None) -> Door:
    """The way of these operands, which are on one device.

    On a GPU the kernel, but for float64 and where Triton lacks. Elsewhere plain torch: autograd
    differentiates it, and under torch.compile Inductor fuses it with what surrounds it.

    Raises:
        RuntimeError: an operand is mapped by vmap.
    """
    present = [t for t in operands if t is not None]
    traced = torch.compiler.is_compiling()
    if not traced and any(torch._C._functorch.is_batchedtensor(t) for t in present):
        raise RuntimeError(
            "the operators of fastcm cannot be mapped by vmap: their coefficients are per sample "
            "and their noise depends on the index of the sample; make the mapped dimension part "
            "of the batch"
        )
    if HAS_KERNELS and all(t.is_cuda and t.dtype != torch.float64 for t in present):
        return Door.KERNEL
    return Door.REFERENCE
