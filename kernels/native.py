"""Kernels for the CPU: the .cpp files here, compiled once by the machine's C++ compiler.

torch.compile is no match in eager code: for the optimizer it would be called once for each tensor,
and a call costs as much as the update of 50,000 parameters; for noise it would take seconds before
the first sample. A library is kept in the user's cache directory under a name that follows from
the source, the compiler's flags and the instruction set.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

_HERE = Path(__file__).parent
OPTIMIZER = ("adam_ema.cpp",)
POINTWISE = ("noising.cpp", "affine.cpp", "consistency_loss.cpp")
_FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_ISA = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"),
}


_REFUSALS = (  # the errors of operands.h
    "a tensor of the wrong dtype",
    "a tensor of the wrong size",
    "a tensor without memory",
    "noise that two tensors share is in closed form",
)


class Table(ctypes.Structure):
    """The tables of `fastcm.kernels.tables` as adam_ema.cpp reads them."""

    _fields_ = (
        ("tensors", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("chunks", ctypes.c_void_p),
        ("num_chunks", ctypes.c_int64),
        ("chunk", ctypes.c_int64),
    )


class Refused(ValueError):
    """A native function was given a tensor of another dtype or size than it can read."""


def address(tensor: Tensor | None, dtype: torch.dtype, numel: int) -> ctypes.c_void_p:
    """Of the first of `numel` elements; null for None.

    Raises:
        Refused: a tensor that native code would take for another.
    """
    if tensor is None:
        return ctypes.c_void_p(None)
    right = tensor.dtype == dtype and tensor.numel() >= numel
    if not (right and tensor.is_cpu and tensor.is_contiguous()):
        raise Refused(
            f"native code needs {numel} elements of {dtype} in a row on the CPU, got "
            f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())} on "
            f"{tensor.device}"
        )
    return ctypes.c_void_p(tensor.data_ptr())


class Library:
    """The compiled functions for one dtype, float32 or float64."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        suffix = str(dtype).removeprefix("torch.")
        self.grad_norm = getattr(library, f"grad_norm_{suffix}")
        self.tick = getattr(library, f"tick_{suffix}")
        self.sweep = getattr(library, f"sweep_{suffix}")


def load(dtype: torch.dtype) -> Library | None:
    """The optimizer for `dtype`, or None, with one warning, where it cannot be compiled."""
    library = _library(OPTIMIZER)
    return None if library is None else Library(library, dtype)


@functools.cache
def pointwise(name: str) -> Callable[[bytes], int] | None:
    """A function of the pointwise kernels, or None, with one warning, where there is no compiler.

    It takes the bytes of the structure that its .cpp declares as its arguments, and checks dtypes
    and sizes itself, before it touches memory: what it returns is 0, or for `refuse`.
    """
    library = _library(POINTWISE)
    if library is None:
        return None
    function: Callable[[bytes], int] = getattr(library, name)
    function.argtypes = (ctypes.c_char_p,)  # type: ignore[attr-defined]
    return function


def refuse(name: str, error: int) -> NoReturn:
    """Raise what a function of the pointwise kernels returned.

    Raises:
        Refused: always.
    """
    raise Refused(f"{name}: {_REFUSALS[error - 1]}")


@functools.cache
def _library(sources: tuple[str, ...]) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(_build(sources)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        what = "the optimizer" if sources == OPTIMIZER else "the arithmetic around the network"
        warnings.warn(
            f"{what} is computed by plain torch operations, which is slower: the C++ kernel could "
            f"not be compiled ({reason.strip()[:300]}). Install a C++ compiler such as g++, or "
            "name one in CXX",
            stacklevel=2,
        )
        return None


def _build(sources: tuple[str, ...]) -> Path:
    """The path of the library, compiled if it is not in the cache."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise OSError("no C++ compiler found")
    isa = _ISA.get(torch.backends.cpu.get_cpu_capability(), ())
    text = b"".join(p.read_bytes() for p in sorted(_HERE.glob("*.h")))
    text += b"".join((_HERE / name).read_bytes() for name in sources)
    for openmp in (("-fopenmp",), ()):  # Apple's compiler has none: one thread
        command = [compiler, *_FLAGS, *isa, *openmp]
        name = hashlib.sha256(text + " ".join([*command, platform.machine()]).encode())
        path = _cache() / f"{Path(sources[0]).stem}-{name.hexdigest()[:20]}.so"
        if path.exists():
            return path
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            try:
                subprocess.run(
                    [*command, *(str(_HERE / name) for name in sources), "-o", str(built)],
                    check=True,
                    capture_output=True,
                    text=True,
                )
            except subprocess.CalledProcessError:
                if not openmp:
                    raise
                continue
            built.replace(path)  # another process may have done the same: both are complete
            return path
    raise AssertionError("unreachable")


def _cache() -> Path:
    """A directory that only this user can write to."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        folder = root / "fastcm"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # no home, or one that cannot be written
        pass
    return Path(_temporary_cache())


@functools.cache
def _temporary_cache() -> str:
    return tempfile.mkdtemp(prefix="fastcm-")
