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
from pathlib import Path

import torch
from torch import Tensor

OPTIMIZER, NOISE = (Path(__file__).with_name(name) for name in ("adam_ema.cpp", "philox.cpp"))
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
    """The optimizer for `dtype`, or None, with one warning, where it cannot be compiled."""
    library = _library(OPTIMIZER)
    return None if library is None else Library(library, dtype)


def has_uniforms() -> bool:
    """Whether `uniforms` can be had; warns once where it cannot be compiled."""
    return _library(NOISE) is not None


def uniforms(samples: int, quads: int, key: Tensor, stream: int, first_sample: int) -> Tensor:
    """Uniforms for radii and angles, bit for bit those of `fastcm.rng.uniforms`.

    Args:
        samples, quads: B and Q.
        key: int64 ``[3]`` on the CPU: seed, step, first sample.
        stream: 0..255.
        first_sample: added to the key's.

    Returns:
        float32 ``[2, B, Q, 2]``.
    """
    library = _library(NOISE)
    assert library is not None
    key = key.contiguous()
    out = torch.empty(2, samples, quads, 2)
    library.uniforms(
        address(out),
        ctypes.c_int64(samples),
        ctypes.c_int64(quads),
        address(key),
        ctypes.c_int64(first_sample),
        ctypes.c_int64(stream),
        torch.get_num_threads(),
    )
    return out


@functools.cache
def _library(source: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(_build(source)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        what = "the optimizer" if source == OPTIMIZER else "noise"
        warnings.warn(
            f"{what} is computed by plain torch operations, which is slower: the C++ kernel could "
            f"not be compiled ({reason.strip()[:300]}). Install a C++ compiler such as g++, or "
            "name one in CXX",
            stacklevel=2,
        )
        return None


def _build(source: Path) -> Path:
    """The path of the library, compiled if it is not in the cache."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise OSError("no C++ compiler found")
    isa = _ISA.get(torch.backends.cpu.get_cpu_capability(), ())
    for openmp in (("-fopenmp",), ()):  # Apple's compiler has none: one thread
        command = [compiler, *_FLAGS, *isa, *openmp]
        name = hashlib.sha256(
            source.read_bytes() + " ".join([*command, platform.machine()]).encode()
        )
        path = _cache() / f"{source.stem}-{name.hexdigest()[:20]}.so"
        if path.exists():
            return path
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            try:
                subprocess.run(
                    [*command, str(source), "-o", str(built)],
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
