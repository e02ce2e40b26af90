"""Precision and recall of samples, by balls around their features and those of data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastcm.evaluation.gaussians import Estimate

_ENTRIES = 2**25  # of a matrix of distances, 256 MiB
_QUANTILE = 1.95996  # of a normal, 0.975


def precision_recall(
    samples: Tensor, reference: Tensor, *, neighbours: int = 3
) -> tuple[Estimate, Estimate]:
    """How many samples look like data, and how much of the data the samples cover.

    Precision is the share of the samples within a ball around any row of the reference, out to its
    `neighbours`-th neighbour in the reference; recall the same with the two exchanged. The
    intervals are Wilson's for a share: they take the balls as known. Distances are float64, a part
    of all pairs at a time.

    Args:
        samples: features ``[N, D]``, N > `neighbours`.
        reference: features ``[M, D]``, M > `neighbours`. Figures compare for equal N and M.
        neighbours: k of the nearest neighbours, >= 1.

    Raises:
        ValueError: too few rows for `neighbours`.

    Source: Kynkaanniemi et al. 2019, eq. 1 and 2, whose k is 3; Wilson 1927.
    """
    for name, rows in (("samples", samples), ("reference", reference)):
        if not 1 <= neighbours < len(rows):
            raise ValueError(
                f"precision and recall with {neighbours} neighbours need more {name} than that "
                f"and at least one neighbour, got {len(rows)} {name}"
            )
    mean = reference.double().mean(0)  # a large one would cost the distances digits
    x, y = samples.double() - mean, reference.double() - mean
    return (
        wilson(_inside(x, y, _radii(y, neighbours)), len(x)),
        wilson(_inside(y, x, _radii(x, neighbours)), len(y)),
    )


def wilson(count: int, n: int) -> Estimate:
    """The share count / n with its interval of 95 %."""
    share, z2 = count / n, _QUANTILE**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _QUANTILE / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return Estimate(share, max(middle - half, 0.0), min(middle + half, 1.0))


def _radii(x: Tensor, neighbours: int) -> Tensor:
    """Squared distance of each row to its nearest neighbours' last; the row is not one of them."""
    radii = []
    for first, rows in _blocks(x, len(x)):
        distance = _squared(rows, x)
        own = torch.arange(len(rows), device=x.device)
        distance[own, own + first] = -1
        radii.append(distance.kthvalue(neighbours + 1, dim=1).values)
    return torch.cat(radii)


def _inside(x: Tensor, centres: Tensor, radii: Tensor) -> int:
    """How many rows lie within any of the balls."""
    blocks = _blocks(x, len(centres))
    return sum(int((_squared(rows, centres) <= radii).any(1).sum()) for _, rows in blocks)


def _blocks(x: Tensor, columns: int) -> list[tuple[int, Tensor]]:
    size = max(1, _ENTRIES // columns)
    return [(first, x[first : first + size]) for first in range(0, len(x), size)]


def _squared(x: Tensor, y: Tensor) -> Tensor:
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    return torch.addmm(norms, x, y.T, alpha=-2).clamp_min_(0)
