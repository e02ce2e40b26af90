"""Native operators with all but their samples given once.

They are for few samples, whose arithmetic takes less time than what surrounds it, where
`fastcm.ops.dispatch.door` sends a tensor of the CPU to native code and no profiler records.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastcm.kernels import native
from fastcm.ops.native import CODES, NO_NOISE, NOTHING, packed

_FLOAT32 = CODES[torch.float32]
_OUTPUTS = {dtype: CODES[dtype] for dtype in (torch.float32, torch.bfloat16, torch.float16)}
"""Of a network."""


def noise(shape: Sequence[int], stream: int) -> Callable[[int, int], Tensor]:
    """`fastcm.ops.noise` of this shape, float32, of keys whose step is 0.

    Args:
        shape: ``[B, ...]``.
        stream: see `fastcm.ops.noise`.

    Returns:
        A function of a key's seed and first sample, numbers that are valid.
    """
    function, size = native.pointwise("numbered_noise"), tuple(shape)
    assert function is not None
    B, D, n = size[0], math.prod(size[1:]), math.prod(size)
    pack, like = struct.Struct("11q").pack, torch.empty(0, dtype=torch.float32, device="cpu")

    def call(seed: int, first_sample: int) -> Tensor:
        out, threads = like.new_empty(size), torch.get_num_threads()
        at = (seed, 0, first_sample, stream, 0, out.data_ptr(), _FLOAT32, n)
        error = function(pack(B, D, threads, *at))
        if error:
            native.refuse("numbered_noise", error)
        return out

    return call


def boundary(
    shape: Sequence[int], a: Tensor, b: Tensor
) -> Callable[[Tensor, Tensor], Tensor | None]:
    """`fastcm.ops.boundary` for given coefficients.

    Args:
        shape: ``[B, ...]``.
        a, b: ``[B]``, contiguous, which must stay as they are.

    Returns:
        A function of x and F; None where they are not contiguous, x is not float32, F is no plain
        tensor of the CPU in float32 or half precision, or autograd is to differentiate.
    """
    function = native.pointwise("boundary")
    assert function is not None
    B, D, n = shape[0], math.prod(shape[1:]), math.prod(shape)
    rows, held = (*packed(a), *packed(b)), (a, b)
    pack = struct.Struct(f"{3 + 3 + len(NO_NOISE) + 4 * 3}q").pack

    def call(x: Tensor, F: Tensor) -> Tensor | None:
        code = _code(x, F)
        if code is None:
            return None
        assert held  # for as long as their addresses are used
        out, threads = torch.empty_like(x), torch.get_num_threads()
        operands = (x.data_ptr(), _FLOAT32, n, *NO_NOISE, F.data_ptr(), code, n, *rows)
        error = function(pack(B, D, threads, *operands, out.data_ptr(), _FLOAT32, n))
        if error:
            native.refuse("boundary", error)
        return out

    return call


def sampler_update(
    shape: Sequence[int], a: Tensor, b: Tensor, alpha: Tensor, sigma: Tensor, stream: int
) -> Callable[[Tensor, Tensor, Tensor, int], Tensor | None]:
    """`fastcm.ops.sampler_update` for given coefficients, without guidance or a second result.

    Args:
        shape: ``[B, ...]``.
        a, b, alpha, sigma: ``[B]``, contiguous, which must stay as they are.
        stream: of the noise.

    Returns:
        A function of x, F, the key's tensor and the first sample; None as `boundary`.
    """
    function = native.pointwise("sampler_update")
    assert function is not None
    B, D, n = shape[0], math.prod(shape[1:]), math.prod(shape)
    held = (a, b, alpha, sigma)
    rows = tuple(number for c in held for number in packed(c))
    pack, int64 = struct.Struct(f"{3 + 7 * 3 + 3 * 3 + 2 + 2 * 3}q").pack, CODES[torch.int64]
    absent, second = 3 * NOTHING, NOTHING

    def call(x: Tensor, F: Tensor, key: Tensor, first_sample: int) -> Tensor | None:
        code = _code(x, F)
        if code is None or not key.is_contiguous():
            return None
        assert held  # for as long as their addresses are used
        out, threads = torch.empty_like(x), torch.get_num_threads()
        operands = (x.data_ptr(), _FLOAT32, n, F.data_ptr(), code, n, *rows)
        noise = (key.data_ptr(), int64, 3, *absent, stream, first_sample)
        result = (out.data_ptr(), _FLOAT32, n, *second)
        error = function(pack(B, D, threads, *operands, *noise, *result))
        if error:
            native.refuse("sampler_update", error)
        return out

    return call


def _code(x: Tensor, F: Tensor) -> int | None:
    """Of the dtype of F, where native code can read both and nobody else has to see them."""
    code = _OUTPUTS.get(F.dtype)
    if code is None or x.dtype is not torch.float32:
        return None
    if torch.is_grad_enabled() and (x.requires_grad or F.requires_grad):
        return None
    plain = type(F) is Tensor and F.is_cpu and x.is_contiguous() and F.is_contiguous()
    return code if plain else None
