"""The one-sweep optimizer on a CPU: adam_ema.cpp, compiled once by the machine's C++ compiler.

torch.compile is no match here: it would be called once for each tensor, and a call costs as much
as the update of 50,000 parameters. The library is kept in the user's cache directory under a name
that follows from the source, the compiler's flags and the instruction set.
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
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("adam_ema.cpp")
_FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_ISA = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"),
}


class Table(ctypes.Structure):
    """The tables of `fastcm.kernels.tables` as adam_ema.cpp reads them."""

    _fields_ = (
        ("tensors", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("chunks", ctypes.c_void_p),
        ("num_chunks", ctypes.c_int64),
        ("chunk", ctypes.c_int64),
    )


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """Of the first element; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class Library:
    """The compiled functions for one dtype, float32 or float64."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        suffix = str(dtype).removeprefix("torch.")
        self.grad_norm = getattr(library, f"grad_norm_{suffix}")
        self.tick = getattr(library, f"tick_{suffix}")
        self.sweep = getattr(library, f"sweep_{suffix}")


def load(dtype: torch.dtype) -> Library | None:
    """The functions for `dtype`, or None, with one warning, where they cannot be compiled."""
    library = _library()
    return None if library is None else Library(library, dtype)


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(_build()))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            "the optimizer runs in plain torch operations, which is slower: its C++ kernel could "
            f"not be compiled ({reason.strip()[:300]}). Install a C++ compiler such as g++, or "
            "name one in CXX",
            stacklevel=2,
        )
        return None


def _build() -> Path:
    """The path of the library, compiled if it is not in the cache."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise OSError("no C++ compiler found")
    isa = _ISA.get(torch.backends.cpu.get_cpu_capability(), ())
    source = SOURCE.read_bytes()
    for openmp in (("-fopenmp",), ()):  # Apple's compiler has none: one thread
        command = [compiler, *_FLAGS, *isa, *openmp]
        name = hashlib.sha256(source + " ".join([*command, platform.machine()]).encode())
        path = _cache() / f"adam_ema-{name.hexdigest()[:20]}.so"
        if path.exists():
            return path
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            try:
                subprocess.run(
                    [*command, str(SOURCE), "-o", str(built)],
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
