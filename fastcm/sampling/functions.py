"""Samplers: one step, multi-step with fresh noise, and the probability-flow ODE.

Sample i is a pure function of (seed, first_sample + i, times): the same on every device, in any
batch size or order. Arithmetic is float32, or float64 where z is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from fastcm import ops, rng
from fastcm.networks.protocol import Network
from fastcm.parameterization import Parameterization, check_velocity
from fastcm.paths import Path
from fastcm.rng import NoiseKey
from fastcm.sampling import solvers
from fastcm.sampling.guidance import Guidance as Guidance
from fastcm.sampling.guidance import evaluator, rows
from fastcm.sampling.guidance import predict as predict
from fastcm.schedules import Grid, UniformGrid

SolverName = Literal["euler", "heun", "ddim", "dpmpp_2m"]

SOLVERS: dict[str, solvers.Solver] = {
    "euler": solvers.euler,
    "heun": solvers.heun,
    "ddim": solvers.ddim,
    "dpmpp_2m": solvers.dpmpp_2m,
}

Constraint = Callable[[Tensor], Tensor]
"""``constraint(x0) -> x0``: the nearest samples ``[B, ...]`` that meet a condition."""


def multistep(
    net: Network,
    path: Path | Parameterization,
    z: Tensor,
    key: NoiseKey,
    *,
    times: Sequence[float],
    cond: Tensor | None = None,
    guidance: Guidance | None = None,
    null_condition: Tensor | int | None = None,
    first_sample: int = 0,
    start: Tensor | None = None,
    constraint: Constraint | None = None,
    levels: Sequence[solvers.Level] | None = None,
) -> Tensor:
    """Consistency sampling: denoise, add fresh noise down to the next time, denoise again.

    ``len(times)`` network evaluations; evaluation j > 0 follows noise of stream SAMPLE + j, and no
    noise is drawn after the last.

    Args:
        net: ``net(x, t, cond) -> F``.
        path: the path, or path and prediction type.
        z: standard normals ``[B, ...]``.
        key: for the noise between evaluations.
        times: descending, in (t_min, t_max], the first usually t_max.
        cond, guidance, null_condition: see `fastcm.sampling.guidance.evaluator`.
        first_sample: global index of row 0.
        start: data ``[B, ...]`` that is edited: the first state is alpha start + sigma z; default
            pure noise.
        constraint: applied to every x0, also the last; see `fastcm.editing`.
        levels: ``solvers.levels(path, times)`` where it is known: traced code (torch.export) cannot
            read it from tensors.

    Returns:
        Samples ``[B, ...]``; for B = 0 an empty tensor, without a call.

    Raises:
        ValueError, TypeError: times that do not descend or leave the path, cond or guidance that
            does not fit, start or a constraint's result of another shape than z, levels of other
            times.

    Source: seed eq. 11; Song et al. 2023, algorithms 1 and 4 (noise sqrt(t^2 - t_min^2) where
    sigma(t_min) > 0).
    """
    p = as_parameterization(path)
    check_descending(p.path, times, fresh_noise=True)
    evaluate = evaluator(
        net, p, z, times, cond=cond, guidance=guidance, null_condition=null_condition
    )
    if start is not None and (not isinstance(start, Tensor) or start.shape != z.shape):
        shown = list(start.shape) if isinstance(start, Tensor) else type(start).__name__
        raise ValueError(f"start must have the shape of z, {list(z.shape)}, got {shown}")
    if z.shape[0] == 0:
        return torch.empty_like(z)
    *steps, end = _levels(p, times, levels)
    x = _first_state(z, steps[0], start)
    for j, (at, to) in enumerate(pairwise(steps)):
        out = evaluate(x, j)
        alpha, sigma = rows(x, to.alpha), rows(x, math.sqrt(to.sigma**2 - end.sigma**2))
        stream = rng.SAMPLE + j + 1
        if constraint is None:
            x = ops.sampler_update(
                x,
                out.F,
                rows(x, at.a),
                rows(x, at.b),
                alpha,
                sigma,
                key,
                stream=stream,
                first_sample=first_sample,
                F_uncond=out.F_uncond,
                guidance=None if out.F_uncond is None else rows(x, out.weight),
            )
        else:
            x0 = _constrained(constraint, out.map(x, at.a, at.b))
            state = ops.noising(x0, alpha, sigma, key, stream=stream, first_sample=first_sample)
            assert isinstance(state, Tensor)
            x = state
    x0 = evaluate(x, len(steps) - 1).map(x, steps[-1].a, steps[-1].b)
    return x0 if constraint is None else _constrained(constraint, x0)


def one_step(
    net: Network,
    path: Path | Parameterization,
    z: Tensor,
    *,
    cond: Tensor | None = None,
    guidance: Guidance | None = None,
    null_condition: Tensor | int | None = None,
) -> Tensor:
    """x0 = f(sigma(t_max) z, t_max): one network evaluation. See `multistep`."""
    p = as_parameterization(path)
    return multistep(
        net,
        p,
        z,
        NoiseKey(0, device=z.device),
        times=[p.path.t_max],
        cond=cond,
        guidance=guidance,
        null_condition=null_condition,
    )


def ode(
    net: Network,
    path: Path | Parameterization,
    z: Tensor,
    *,
    times: Sequence[float],
    solver: SolverName = "euler",
    cond: Tensor | None = None,
    guidance: Guidance | None = None,
    null_condition: Tensor | int | None = None,
    levels: Sequence[solvers.Level] | None = None,
) -> Tensor:
    """Integrate the probability-flow ODE from times[0] down to data.

    Args:
        net, path, z, cond, guidance, null_condition, levels: see `multistep`. Heun's second
            evaluation takes the weight of the time it is at.
        times: descending, in (t_min, t_max]; data is appended as the end, sigma = 0 also on
            `VarianceExploding`. No solver evaluates there.
        solver: "euler", "ddim" or "dpmpp_2m": ``len(times)`` evaluations; "heun": twice that less
            one. On `VariancePreserving` take "ddim" or "dpmpp_2m": in its t the velocity is
            infinite at the data.

    Returns:
        Samples ``[B, ...]``; for B = 0 an empty tensor, without a call.

    Raises:
        ValueError, TypeError: an unknown solver; see `multistep`.

    Source: `fastcm.sampling.solvers`.
    """
    p = as_parameterization(path)
    check_descending(p.path, times, fresh_noise=False)
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {sorted(SOLVERS)}, got {solver!r}")
    evaluate = evaluator(
        net, p, z, times, cond=cond, guidance=guidance, null_condition=null_condition
    )
    if z.shape[0] == 0:
        return torch.empty_like(z)
    *known, end = _levels(p, times, levels)
    return SOLVERS[solver](evaluate, _first_state(z, known[0]), [*known, solvers.at_data(end)])


def flow_map(
    net: Network,
    path: Path | Parameterization,
    z: Tensor,
    *,
    times: Sequence[float],
    cond: Tensor | None = None,
    guidance: Guidance | None = None,
    null_condition: Tensor | int | None = None,
    levels: Sequence[solvers.Level] | None = None,
) -> Tensor:
    """Walk down with a network of two times: x_s = x_t - (t - s) u(x_t, t, s).

    Args:
        net: ``net(x, t, cond, s=s) -> u``.
        path: `Linear`, with prediction "v".
        times: descending, in (0, 1]; 0 is appended as the end. One evaluation each.
        z, cond, guidance, null_condition, levels: see `multistep`.

    Returns:
        Samples ``[B, ...]``; for B = 0 an empty tensor, without a call.

    Raises:
        ValueError, TypeError: another path; see `multistep`.

    Source: Frans et al. 2024, "One step diffusion via shortcut models", algorithm 2.
    """
    p = as_parameterization(path)
    check_velocity(p)
    check_descending(p.path, times, fresh_noise=False)
    ends = [*times[1:], p.path.t_min]
    evaluate = evaluator(
        net, p, z, times, cond=cond, guidance=guidance, null_condition=null_condition, ends=ends
    )
    if z.shape[0] == 0:
        return torch.empty_like(z)
    levels = _levels(p, times, levels)
    x = _first_state(z, levels[0])
    for i, (at, to) in enumerate(pairwise(levels)):
        x = evaluate(x, i).map(x, 1.0, to.t - at.t)
    return x


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


def _levels(
    p: Parameterization, times: Sequence[float], known: Sequence[solvers.Level] | None
) -> Sequence[solvers.Level]:
    if known is None:
        return solvers.levels(p, times)
    if [level.t for level in known] != [*times, p.path.t_min]:
        raise ValueError(
            f"levels must be those of the times {list(times)} and of t_min, got levels at "
            f"{[level.t for level in known]}"
        )
    return known


def _first_state(z: Tensor, at: solvers.Level, start: Tensor | None = None) -> Tensor:
    if start is not None:
        return ops.boundary(start, z, rows(z, at.alpha), rows(z, at.sigma))
    return z if at.sigma == 1.0 else at.sigma * z


def _constrained(constraint: Constraint, x0: Tensor) -> Tensor:
    out = constraint(x0)
    if not isinstance(out, Tensor) or out.shape != x0.shape:
        shown = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"constraint must return the shape of x0, {list(x0.shape)}, got {shown}")
    return out


def as_parameterization(path: Path | Parameterization) -> Parameterization:
    """The path with its own prediction type, or what was given."""
    return path if isinstance(path, Parameterization) else Parameterization(path)


def check_descending(path: Path, times: Sequence[float], *, fresh_noise: bool) -> None:
    """Raise ValueError unless `times` descend within (t_min, t_max] and number at least one.

    With fresh noise before each, there are as many as streams of noise.
    """
    if not times:
        raise ValueError("times must name at least one evaluation, got none")
    if fresh_noise and len(times) > rng.NUM_STREAMS - rng.SAMPLE:
        raise ValueError(
            f"times may name at most {rng.NUM_STREAMS - rng.SAMPLE} evaluations, got {len(times)}"
        )
    path.check_times(times)
    if any(t <= s for t, s in zip(times, [*times[1:], path.t_min])):
        raise ValueError(f"times must descend and end above {path.t_min}, got {list(times)}")
