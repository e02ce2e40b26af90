"""Samplers: one step, multi-step with fresh noise, and the probability-flow ODE.

Sample i is a pure function of (seed, first_sample + i, times): the same on every device, in any
batch size or order. Arithmetic is float32, or float64 where z is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastcm import rng
from fastcm.networks.conditions import Null, check_rows
from fastcm.networks.protocol import Network
from fastcm.parameterization import Parameterization, check_velocity
from fastcm.paths import Path
from fastcm.rng import NoiseKey
from fastcm.sampling import loops, solvers
from fastcm.sampling.guidance import Evaluator, guidance_weights
from fastcm.sampling.guidance import Guidance as Guidance
from fastcm.sampling.guidance import predict as predict
from fastcm.sampling.levels import levels
from fastcm.sampling.loops import Constraint as Constraint
from fastcm.sampling.steps import Churn, ode_steps

SolverName = Literal["euler", "heun", "midpoint", "rk4", "ddim", "dpmpp_2m"]

SOLVERS: dict[str, solvers.Solver] = {
    "euler": solvers.stepwise(solvers.euler),
    "heun": solvers.stepwise(solvers.heun),
    "midpoint": solvers.stepwise(solvers.midpoint),
    "rk4": solvers.stepwise(solvers.rk4),
    "ddim": solvers.stepwise(solvers.ddim),
    "dpmpp_2m": solvers.dpmpp_2m,
}


def multistep(
    net: Network,
    path: Path | Parameterization,
    z: Tensor,
    key: NoiseKey,
    *,
    times: Sequence[float],
    cond: Any = None,
    guidance: Guidance | None = None,
    null_condition: Null = None,
    guide: Network | None = None,
    guidance_rescale: float | None = None,
    first_sample: int = 0,
    start: Tensor | None = None,
    constraint: Constraint | None = None,
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
        cond, null_condition, guide: see `fastcm.sampling.guidance.Evaluator`.
        guidance: a weight, of all samples or ``[B]`` of each; a sequence of one per time, or
            ``[times, B]``; or a function of t that returns one.
        guidance_rescale: share in [0, 1] of the guided output's standard deviation that is the
            conditional one's again; see `fastcm.networks.guidance.guided`.
        first_sample: global index of row 0.
        start: data ``[B, ...]`` that is edited: the first state is alpha start + sigma z; default
            pure noise.
        constraint: applied to every x0, also the last; see `fastcm.editing`.

    Returns:
        Samples ``[B, ...]``; for B = 0 an empty tensor, without a call.

    Raises:
        ValueError, TypeError: times that do not descend or leave the path, cond or guidance that
            does not fit, start or a constraint's result of another shape than z.

    Source: seed eq. 11; Song et al. 2023, algorithms 1 and 4 (noise sqrt(t^2 - t_min^2) where
    sigma(t_min) > 0).
    """
    p = as_parameterization(path)
    check_descending(p.path, times, fresh_noise=True)
    evaluate = _evaluator(net, z, times, cond, guidance, null_condition, guide, guidance_rescale)
    if start is not None and (not isinstance(start, Tensor) or start.shape != z.shape):
        shown = list(start.shape) if isinstance(start, Tensor) else type(start).__name__
        raise ValueError(f"start must have the shape of z, {list(z.shape)}, got {shown}")
    if z.shape[0] == 0:
        return torch.empty_like(z)
    return loops.multistep(
        evaluate,
        z,
        key,
        levels(p, times),
        first_sample=first_sample,
        start=start,
        constraint=constraint,
    )


def one_step(
    net: Network,
    path: Path | Parameterization,
    z: Tensor,
    *,
    cond: Any = None,
    guidance: Guidance | None = None,
    null_condition: Null = None,
    guide: Network | None = None,
    guidance_rescale: float | None = None,
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
        guide=guide,
        guidance_rescale=guidance_rescale,
    )


def ode(
    net: Network,
    path: Path | Parameterization,
    z: Tensor,
    *,
    times: Sequence[float],
    solver: SolverName = "euler",
    cond: Any = None,
    guidance: Guidance | None = None,
    null_condition: Null = None,
    guide: Network | None = None,
    guidance_rescale: float | None = None,
    churn: Churn | None = None,
    key: NoiseKey | None = None,
    first_sample: int = 0,
) -> Tensor:
    """Integrate the probability-flow ODE from times[0] down to data.

    Args:
        net, path, z, cond, guidance, null_condition, guide, guidance_rescale: see `multistep`. The
            evaluation at the end of a step (heun, rk4) takes the weight of the time it is at, one
            in the middle (midpoint, rk4) that of the step's beginning.
        times: descending, in (t_min, t_max]; data is appended as the end, sigma = 0 also on
            `VarianceExploding`. No solver evaluates there.
        solver: "euler", "ddim" or "dpmpp_2m": one evaluation a step; "heun" or "midpoint": two;
            "rk4": four; the last step, down to data, is of first order and one evaluation. On
            `VariancePreserving` take "ddim" or "dpmpp_2m": in its t the velocity is infinite at
            the data.
        churn: fresh noise before the steps, of stream SAMPLE + 1 + i before step i; None: the
            samples are a function of z. Not for "dpmpp_2m".
        key: for the noise of `churn`.
        first_sample: global index of row 0.

    Returns:
        Samples ``[B, ...]``; for B = 0 an empty tensor, without a call.

    Raises:
        ValueError, TypeError: an unknown solver; churn without key, or with a solver that it is
            not defined for; see `multistep`.

    Source: `fastcm.sampling.solvers`.
    """
    p = as_parameterization(path)
    check_descending(p.path, times, fresh_noise=False)
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {sorted(SOLVERS)}, got {solver!r}")
    if churn is not None and key is None:
        raise ValueError("churn needs key, the NoiseKey of its noise, got None")
    steps = ode_steps(p, times, solver, churn)
    start = levels(p, times[:1])[0]
    evaluate = _evaluator(net, z, times, cond, guidance, null_condition, guide, guidance_rescale)
    if z.shape[0] == 0:
        return torch.empty_like(z)
    return loops.ode(evaluate, z, key, steps, start, SOLVERS[solver], first_sample=first_sample)


def flow_map(
    net: Network,
    path: Path | Parameterization,
    z: Tensor,
    *,
    times: Sequence[float],
    cond: Any = None,
    guidance: Guidance | None = None,
    null_condition: Null = None,
    guide: Network | None = None,
    guidance_rescale: float | None = None,
) -> Tensor:
    """Walk down with a network of two times: x_s = x_t - (t - s) u(x_t, t, s).

    Args:
        net: ``net(x, t, cond, s=s) -> u``.
        path: `Linear`, with prediction "v".
        times: descending, in (0, 1]; 0 is appended as the end. One evaluation each.
        z, cond, guidance, null_condition, guide, guidance_rescale: see `multistep`.

    Returns:
        Samples ``[B, ...]``; for B = 0 an empty tensor, without a call.

    Raises:
        ValueError, TypeError: another path; see `multistep`.

    Source: Frans et al. 2024, "One step diffusion via shortcut models", algorithm 2.
    """
    p = as_parameterization(path)
    check_velocity(p)
    check_descending(p.path, times, fresh_noise=False)
    evaluate = _evaluator(net, z, times, cond, guidance, null_condition, guide, guidance_rescale)
    if z.shape[0] == 0:
        return torch.empty_like(z)
    return loops.flow_map(evaluate, z, levels(p, times))


def _evaluator(
    net: Network,
    z: Tensor,
    times: Sequence[float],
    cond: Any,
    guidance: Guidance | None,
    null_condition: Null,
    guide: Network | None,
    rescale: float | None,
) -> Evaluator:
    check_rows(cond, len(z))
    weights = None if guidance is None else guidance_weights(guidance, times, z)
    others: dict[str, Any] = {"guide": guide, "rescale": rescale}
    return Evaluator(net, z, cond=cond, weights=weights, null_condition=null_condition, **others)


def as_parameterization(path: Path | Parameterization) -> Parameterization:
    """The path with its own prediction type, or what was given."""
    if not isinstance(path, (Path, Parameterization)):
        raise TypeError(f"path must be a Path or a Parameterization, got {path!r:.80}")
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
