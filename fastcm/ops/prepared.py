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

Moved = tuple[Tensor, Tensor | None]
"""The next state, and the network's input there where it is not the state itself."""

Step = Callable[[Tensor, Tensor, int, int], Moved | None]
"""A function of x, F and the seed and first sample of a key whose step is 0.

x is one of our own: float32, contiguous, on the CPU. Autograd is off. For an F that is no plain
tensor of the CPU in float32 or half precision the function returns None.
"""

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


def boundary(shape: Sequence[int], a: Tensor, b: Tensor) -> Step:
    """`fastcm.ops.boundary` for given coefficients.

    Args:
        shape: ``[B, ...]``.
        a, b: float32 ``[B]``, contiguous, which must stay as they are.
    """
    function = native.pointwise("boundary")
    assert function is not None
    B, D, n = shape[0], math.prod(shape[1:]), math.prod(shape)
    rows, held = (*packed(a), *packed(b)), (a, b)
    pack = struct.Struct(f"{3 + 3 + len(NO_NOISE) + 4 * 3}q").pack

    def call(x: Tensor, F: Tensor, seed: int, first_sample: int) -> Moved | None:
        code = _code(F)
        if code is None:
            return None
        F = F.contiguous()
        assert held  # for as long as their addresses are used
        out, threads = torch.empty_like(x), torch.get_num_threads()
        operands = (x.data_ptr(), _FLOAT32, n, *NO_NOISE, F.data_ptr(), code, n, *rows)
        error = function(pack(B, D, threads, *operands, out.data_ptr(), _FLOAT32, n))
        if error:
            native.refuse("boundary", error)
        return out, None

    return call


def sampler_update(
    shape: Sequence[int],
    a: Tensor,
    b: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    stream: int,
    *,
    input_scale: Tensor | None = None,
) -> Step:
    """`fastcm.ops.sampler_update` for given coefficients, without guidance.

    Args:
        shape: ``[B, ...]``.
        a, b, alpha, sigma, input_scale: float32 ``[B]``, contiguous, which must stay as they are.
            With the last, the network's input is made too, float32.
        stream: of the noise.
    """
    function = native.pointwise("numbered_sampler_update")
    assert function is not None
    B, D, n = shape[0], math.prod(shape[1:]), math.prod(shape)
    held = (a, b, alpha, sigma, input_scale)
    rows = tuple(number for c in held[:4] for number in packed(c))
    rest = (*NOTHING, *NOTHING, *NOTHING, *packed(input_scale), stream, 0)
    pack = struct.Struct(f"{3 + 3 + 6 * 3 + 4 * 3 + 2 + 2 * 3}q").pack

    def call(x: Tensor, F: Tensor, seed: int, first_sample: int) -> Moved | None:
        code = _code(F)
        if code is None:
            return None
        F = F.contiguous()
        assert held  # for as long as their addresses are used
        out, threads = torch.empty_like(x), torch.get_num_threads()
        second = None if input_scale is None else torch.empty_like(x)
        operands = (x.data_ptr(), _FLOAT32, n, F.data_ptr(), code, n, *rows, *rest)
        result = (out.data_ptr(), _FLOAT32, n, *packed(second))
        error = function(pack(seed, 0, first_sample, B, D, threads, *operands, *result))
        if error:
            native.refuse("sampler_update", error)
        return out, second

    return call


def _code(F: Tensor) -> int | None:
    """Of the dtype of F, where native code can read it."""
    return _OUTPUTS.get(F.dtype) if type(F) is Tensor and F.is_cpu else None
