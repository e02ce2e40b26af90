"""Two outputs of a network as one: classifier-free guidance F_u + w (F - F_u), also rescaled."""

from __future__ import annotations

from torch import Tensor

from fastcm import ops
from fastcm.ops.reference import lift


def guided(F: Tensor, F_uncond: Tensor, w: Tensor, rescale: float | None = None) -> Tensor:
    """F_u + w (F - F_u), with a share of its standard deviation that of F again.

    The deviations are over each sample, so large weights no longer lead to samples of too much
    contrast. A guided output that is constant over its sample stays as it is.

    Args:
        F, F_uncond: outputs ``[B, ...]`` with and without condition.
        w: the weight, floats ``[B]``.
        rescale: the share phi in [0, 1] of G (1 - phi + phi std(F) / std(G)), where G is guided;
            None: 0.

    Returns:
        ``[B, ...]``, float32 (float64 if an output is).

    Source: Ho & Salimans 2022; Lin et al. 2023, "Common diffusion noise schedules and sample steps
    are flawed", eq. 15-16, as diffusers' ``guidance_rescale``.
    """
    combined = ops.boundary(F, F_uncond, w, 1.0 - w)
    if not rescale:
        return combined
    wanted, found = (f.to(combined.dtype).flatten(1).std(1, correction=0) for f in (F, combined))
    ratio = (wanted / found).where(found > 0.0, 1.0)
    return lift(1.0 + rescale * (ratio - 1.0), combined) * combined


def check_rescale(rescale: object) -> None:
    """Raise TypeError or ValueError unless it is None or a share in [0, 1]."""
    if rescale is None:
        return
    if not isinstance(rescale, int | float):
        raise TypeError(f"guidance_rescale must be a number in [0, 1] or None, got {rescale!r}")
    if not 0.0 <= rescale <= 1.0:
        raise ValueError(f"guidance_rescale must be in [0, 1], got {rescale}")
