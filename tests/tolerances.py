"""The one tolerance policy: an operation may err twice as much as plain torch in its dtype.

max |op - ref64| <= 2 max |torch_same_dtype - ref64| + atol, with atol relative to the magnitude of
the result once that exceeds 1. Both sides are measured against the same float64 reference.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fastcm import rng

ATOL = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 1e-6,
    torch.bfloat16: 1e-6,
}

BF16_ULP = 2.0**-7

NORMAL = 4e-6
"""Contract of the normals where u0 <= 1 - 2^-10."""

NORMAL_NEAR_ZERO = 1e-3
"""Contract above, where an approximate logarithm loses relative accuracy."""


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") != "0"


def rounding_slack(reference: Tensor, dtype: torch.dtype) -> Tensor | float:
    """One ulp for bfloat16 under the interpreter, which truncates where hardware rounds."""
    if dtype == torch.bfloat16 and interpreted():
        return reference.abs() * BF16_ULP
    return 0.0


def noise_slack(shape: torch.Size, key: rng.NoiseKey, stream: int, first_sample: int = 0) -> Tensor:
    """How far each normal of an operation may be from the reference's, ``[B, ...]``."""
    D = shape[1:].numel()
    quad = rng.blocks(shape[0], (D + 3) // 4, key.tensor, stream, first_sample)
    sliver = 2**32 - 2**22
    near = torch.stack([quad[0] > sliver] * 2 + [quad[2] > sliver] * 2, dim=-1).flatten(1)
    slack = torch.where(near, NORMAL if interpreted() else NORMAL_NEAR_ZERO, NORMAL)
    return slack[:, :D].reshape(shape)


def assert_close(
    actual: Tensor, reference: Tensor, baseline: Tensor, slack: Tensor | float = 0.0
) -> None:
    """Assert the policy.

    Args:
        actual: the result under test.
        reference: float64.
        baseline: plain torch in the dtype of `actual`.
        slack: an allowance on top, a number or the shape of `actual`.
    """
    assert reference.dtype == torch.float64
    assert actual.shape == reference.shape == baseline.shape
    assert actual.dtype == baseline.dtype, f"{actual.dtype}, torch gives {baseline.dtype}"
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), "not finite, or not written"
    error = (actual.double() - reference).abs()
    error = error - slack - rounding_slack(reference, actual.dtype)
    atol = ATOL[actual.dtype] * max(1.0, reference.abs().max().item())
    allowed = 2 * (baseline.double() - reference).abs().max().item() + atol
    assert error.max().item() <= allowed, f"error {error.max().item():.3g} > {allowed:.3g}"
