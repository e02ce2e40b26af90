"""Times of a multi-step sampler, searched for."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from fastcm.parameterization import Parameterization
from fastcm.paths import Path
from fastcm.sampling.functions import as_parameterization
from fastcm.schedules import Grid, UniformGrid


def search_times(
    score: Callable[[list[float]], float],
    path: Path | Parameterization,
    *,
    steps: int,
    n: int = 64,
    grid: Grid = UniformGrid(),
) -> list[float]:
    """Times of a multi-step sampler, found one after another, each by ternary search.

    The first is t_max; each further one is the best, with those before it fixed, among the n - 1
    inner points of a grid. Exact where the score has one minimum along the grid; elsewhere the best
    of the at most 2 log(n) / log(1.5) + 2 candidates that were scored.

    Args:
        score: ``score(times)``: what to minimise, say a distance of ``multistep(..., times=times)``
            from held-out data. Use one seed for all calls.
        path: the path, or path and prediction type.
        steps: number of times, 1 <= steps <= n.
        n: intervals of the grid.
        grid: where the candidates lie.

    Returns:
        `steps` descending times.

    Raises:
        ValueError: steps or n out of range, a score that is NaN.

    Source: Song et al. 2023, "Consistency models", section 6.1 (greedy ternary search).
    """
    if not 1 <= steps <= n:
        raise ValueError(f"steps must be >= 1 and <= n = {n}, got {steps}")
    p = as_parameterization(path)
    candidates: list[float] = grid.time(torch.arange(n + 1), n, p.path).tolist()
    k, found = n, [p.path.t_max]
    while len(found) < steps:
        k = _ternary(lambda j: score([*found, candidates[j]]), steps - len(found), k - 1)
        found.append(candidates[k])
    return found


def _ternary(score: Callable[[int], float], low: int, high: int) -> int:
    """The best of the integers low..high that a ternary search looks at."""
    seen: dict[int, float] = {}

    def at(k: int) -> float:
        if k not in seen:
            seen[k] = float(score(k))
            if math.isnan(seen[k]):
                raise ValueError("score must return a number, got nan")
        return seen[k]

    while high - low > 2:
        third = (high - low) // 3
        if at(low + third) <= at(high - third):
            high -= third
        else:
            low += third
    best: int = min({*range(low, high + 1), *seen}, key=lambda k: (at(k), k))
    return best
