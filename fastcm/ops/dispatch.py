"""The one place where the implementation of an operator is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum

import torch
from torch import Tensor
from torch._C import _functorch as _C
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils import _python_dispatch

from fastcm.kernels import native as native_code

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
    NATIVE = "native code"
    REFERENCE = "plain torch"


_meta_as_gpu = ContextVar("meta_as_gpu", default=False)


@contextmanager
def meta_as_gpu() -> Iterator[None]:
    """Inside, tensors of the meta device go the way of a GPU's: whoever counts that runs nothing.

    There must be a dispatch mode that takes the registered operators, which have no other
    implementation there.
    """
    token = _meta_as_gpu.set(True)
    try:
        yield
    finally:
        _meta_as_gpu.reset(token)


def on_gpu(x: Tensor) -> bool:
    """Whether kernels of this package take a tensor, as far as its device counts."""
    return (HAS_KERNELS and x.is_cuda) or (x.is_meta and _meta_as_gpu.get())


def door(*operands: Tensor | None, differentiable: bool = True, noisy: bool = False) -> Door:
    """The way of these operands, which are on one device. This is the rule, and there is no other.

    - On a GPU the kernel, a registered operator that autograd, torch.compile and torch.export know.
    - On a CPU native code: always in eager code, and in compiled code where noise is made, which
      it does more than twice as fast as Inductor. What else is compiled for a CPU is plain torch,
      since Inductor fuses it with what surrounds it (benchmarks/test_ops.py has both).
    - Else plain torch: in float64, without Triton or a C++ compiler, where autograd is to
      differentiate, and where code is exported or traced.

    Args:
        operands: tensors; None does not count.
        differentiable: whether plain torch is needed for a gradient of these operands; False where
            the native code brings its own.
        noisy: whether the operator makes noise.

    Raises:
        RuntimeError: an operand is mapped by vmap.
    """
    compiling = torch.compiler.is_compiling()
    kernels, native, tracked = True, True, differentiable and torch.is_grad_enabled()
    for t in operands:
        if t is None:
            continue
        if not compiling and _C.is_batchedtensor(t):
            raise RuntimeError(
                "the operators of fastcm cannot be mapped by vmap: their coefficients are per "
                "sample and their noise depends on the index of the sample; make the mapped "
                "dimension part of the batch"
            )
        kernels = kernels and not t.is_cpu and on_gpu(t) and t.dtype != torch.float64
        native = native and t.is_cpu and t.dtype in _NATIVE and not (tracked and t.requires_grad)
    if kernels:
        return Door.KERNEL
    if not native:
        return Door.REFERENCE
    if compiling:
        native = noisy and not torch.compiler.is_exporting()
    else:
        native = not is_traced(*operands)
    return Door.NATIVE if native and _has_native() else Door.REFERENCE


def makes_natively() -> bool:
    """What `door` says of plain float32 tensors that eager code is about to make on the CPU."""
    return not (torch.compiler.is_compiling() or is_traced()) and _has_native()


_NATIVE = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64)


def is_traced(*operands: Tensor | None) -> bool:
    """Whether somebody looks over torch's shoulder, and would not see native code."""
    for t in operands:  # any() of a generator costs more than all the rest here
        if t is not None and type(t) is not Tensor and type(t) is not Parameter:
            return True
    return (
        _C.peek_interpreter_stack() is not None
        or _python_dispatch.is_in_torch_dispatch_mode()
        or forward_ad._current_level >= 0
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_native() -> bool:
    return native_code.pointwise("noise") is not None
