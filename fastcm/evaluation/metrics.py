"""How good samples are: distances to held-out data in fixed, deterministic feature spaces.

No downloaded weights: projections and features are made of the counter-based noise, so figures of
different runs, machines and years compare.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcm import ops, rng
from fastcm.data import to_unit
from fastcm.evaluation.gaussians import Gaussian, frechet_distance
from fastcm.networks.modes import eval_mode
from fastcm.parameterization import Parameterization
from fastcm.rng import NoiseKey
from fastcm.sampling import predict
from fastcm.schedules import Grid, UniformGrid

_PROJECTIONS, _FEATURES = 0, 1  # seeds


def sliced_wasserstein(x: Tensor, y: Tensor, *, projections: int = 512) -> float:
    """Sliced 2-Wasserstein distance: root mean square over random directions of the 1-D distance.

    Args:
        x, y: samples ``[N, ...]`` and ``[M, ...]`` of one shape; uint8 means x / 127.5 - 1.
        projections: number of unit directions.

    Source: Bonneel et al. 2015, "Sliced and Radon Wasserstein barycenters of measures".
    """
    x, y = _flat(x, y)
    directions = ops.noise(
        (projections, x.shape[1]), NoiseKey(_PROJECTIONS), stream=rng.NOISE, dtype=torch.float64
    )
    directions = directions / directions.norm(dim=1, keepdim=True)
    # both quantile functions are steps: constant between the union of their breakpoints
    breaks = torch.cat([torch.arange(len(s) + 1, dtype=torch.float64) / len(s) for s in (x, y)])
    breaks = torch.unique(breaks)
    width, middle = breaks.diff(), (breaks[1:] + breaks[:-1]) / 2
    a, b = (
        (s @ directions.T).sort(dim=0).values[(middle * len(s)).long().clamp_max(len(s) - 1)]
        for s in (x, y)
    )
    return float((width @ (a - b).square()).mean().sqrt())


def features(x: Tensor, *, width: int = 1024, count: int = 64) -> Tensor:
    """A fixed random two-layer ReLU network, float64 ``[N, count]``."""
    (x,) = _flat(x)
    key = NoiseKey(_FEATURES)
    first = ops.noise((x.shape[1], width), key, stream=rng.NOISE, dtype=torch.float64)
    second = ops.noise((width, count), key, stream=rng.TIME, dtype=torch.float64)
    hidden = (x @ first / math.sqrt(x.shape[1])).relu()
    return hidden @ second / math.sqrt(width)


def frechet(x: Tensor, y: Tensor) -> float:
    """Frechet distance between Gaussians fitted to the `features` of two sets of samples.

    Source: Heusel et al. 2017 (FID), with this feature space instead of Inception's.
    """
    return frechet_distance(features(x), Gaussian.of(features(y)))


def _flat(*sets: Tensor) -> tuple[Tensor, ...]:
    shapes = {tuple(x.shape[1:]) for x in sets}
    if len(shapes) > 1 or any(x.dim() < 2 or len(x) == 0 for x in sets):
        raise ValueError(
            "sample sets must be [N, ...] with N > 0 and one sample shape, got "
            + ", ".join(str(list(x.shape)) for x in sets)
        )
    return tuple(to_unit(x).cpu().double().flatten(1) for x in sets)


@dataclass(frozen=True)
class ConsistencyGap:
    """How far neighbouring outputs along one path differ.

    Args:
        times: grid times t_1..t_n.
        gaps: E |f(x_{t_k}) - f(x_{t_{k-1}})|, one per time.
    """

    times: list[float]
    gaps: list[float]

    @property
    def mean(self) -> float:
        return sum(self.gaps) / len(self.gaps)

    @property
    def sum(self) -> float:
        """Bounds E |f(x_T) - x0| by the triangle inequality (seed eq. 10)."""
        return sum(self.gaps)


@torch.no_grad()
def consistency_gap(
    net: nn.Module,
    p: Parameterization,
    x0: Tensor,
    *,
    n: int = 40,
    grid: Grid = UniformGrid(),
    seed: int = 0,
    cond: Any = None,
) -> ConsistencyGap:
    """Measure the `ConsistencyGap` over a grid of `n` intervals, same (x0, z) at all times.

    Args:
        net: ``net(x, t, cond) -> F``.
        p: its parameterization.
        x0: data ``[N, ...]``.
        n: >= 1.
        grid: of the times.
        seed: of the noise.
        cond: N rows, or None.
    """
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n}")
    key = NoiseKey(seed, device=x0.device)
    grid_times = grid.time(torch.arange(n + 1), n, p.path).tolist()
    gaps = []
    before: Tensor | None = None
    for t in grid_times:
        at = torch.full((len(x0),), t, dtype=torch.float64, device=x0.device)
        point = p.path.at(at)
        x = ops.noising(x0, point.alpha, point.sigma, key, out_dtype=torch.float32)
        assert isinstance(x, Tensor)
        a, b, _, _ = p.coefficients(at)
        with eval_mode(net):
            f = ops.boundary(x, predict(net, p, x, at, cond), a, b)
        if before is not None:
            gaps.append((f - before).flatten(1).norm(dim=1).mean().item())
        before = f
    return ConsistencyGap(grid_times[1:], gaps)
