"""Samplers: one step, multi-step with fresh noise, and the probability-flow ODE.

Sample i is a pure function of (seed, first_sample + i, times): the same on every device, in any
batch size or order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastcm import ops, rng, solvers
from fastcm.objectives.base import Network, check_output, unconditional
from fastcm.parameterization import Parameterization
from fastcm.paths import Path
from fastcm.reference import lift
from fastcm.rng import NoiseKey

SOLVERS: dict[str, solvers.Solver] = {"euler": solvers.euler, "heun": solvers.heun}


def predict(
    net: Network,
    p: Parameterization,
    x: Tensor,
    t: Tensor,
    cond: Tensor | None = None,
    *,
    guidance: float | None = None,
    null_condition: Tensor | int | None = None,
) -> Tensor:
    """The network's output F at (x, t), with guidance F_u + w (F_c - F_u) if asked.

    Guidance evaluates conditional and unconditional rows in one call; denoiser and velocity are
    affine in F, so guiding F guides both.

    Args:
        net: ``net(x, t, cond) -> F``.
        p: its parameterization.
        x: ``[B, ...]``.
        t: ``[B]``, float64.
        cond: tensor of B rows, or None.
        guidance: the weight w.
        null_condition: what stands for "no condition".
    """
    c_in = p.c_in(t)
    inputs, noise_level = x if c_in is None else lift(c_in, x) * x, p.c_noise(t)
    if guidance is None:
        return check_output("net", net(inputs, noise_level, cond), x)
    if cond is None:
        raise ValueError("guidance needs cond, got None")
    inputs = torch.cat([inputs, inputs])
    cond = torch.cat([cond, unconditional(cond, null_condition)])
    F = check_output("net", net(inputs, noise_level.repeat(2), cond), inputs)
    F_cond, F_uncond = F.chunk(2)
    return torch.lerp(F_uncond, F_cond, guidance)


def _prior(p: Parameterization, z: Tensor, t: Tensor) -> Tensor:
    sigma = p.path.at(t).sigma
    return lift(sigma, z) * z


def multistep(
    net: Network,
    path: Path | Parameterization,
    z: Tensor,
    key: NoiseKey,
    *,
    times: Sequence[float],
    cond: Tensor | None = None,
    guidance: float | None = None,
    null_condition: Tensor | int | None = None,
    first_sample: int = 0,
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
        cond, guidance, null_condition: see `predict`.
        first_sample: global index of row 0.

    Returns:
        Samples ``[B, ...]``.

    Source: seed eq. 11; Song et al. 2023, algorithm 1 (noise sqrt(t^2 - t_min^2) where
    sigma(t_min) > 0).
    """
    p = as_parameterization(path)
    check_descending(p.path, times)

    def at(t: float) -> Tensor:
        return torch.full(z.shape[:1], t, dtype=torch.float64, device=z.device)

    floor = p.path.at(at(p.path.t_min)).sigma
    x = _prior(p, z, at(times[0]))
    for j, t in enumerate(times):
        F = predict(net, p, x, at(t), cond, guidance=guidance, null_condition=null_condition)
        a, b, _, _ = p.coefficients(at(t))
        if j + 1 == len(times):
            return ops.boundary(x, F, a, b)
        alpha, sigma, _, _ = p.path.at(at(times[j + 1]))
        sigma = (sigma.square() - floor.square()).clamp_min(0.0).sqrt()
        x = ops.sampler_update(
            x, F, a, b, alpha, sigma, key, stream=rng.SAMPLE + j + 1, first_sample=first_sample
        )
    raise AssertionError("times is not empty")


def one_step(
    net: Network,
    path: Path | Parameterization,
    z: Tensor,
    *,
    cond: Tensor | None = None,
    guidance: float | None = None,
    null_condition: Tensor | int | None = None,
) -> Tensor:
    """x0 = f(sigma(t_max) z, t_max): one network evaluation. See `multistep`."""
    p = as_parameterization(path)
    key = NoiseKey(0, device=z.device)
    return multistep(
        net,
        p,
        z,
        key,
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
    solver: Literal["euler", "heun"] = "euler",
    cond: Tensor | None = None,
    guidance: float | None = None,
    null_condition: Tensor | int | None = None,
) -> Tensor:
    """Integrate the probability-flow ODE from times[0] down to t_min.

    Args:
        net, path, z, cond, guidance, null_condition: see `multistep`.
        times: descending, in (t_min, t_max]; t_min is appended as the end.
        solver: "euler": ``len(times)`` evaluations; "heun": twice that less one.

    Returns:
        Samples ``[B, ...]``.
    """
    p = as_parameterization(path)
    check_descending(p.path, times)
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {sorted(SOLVERS)}, got {solver!r}")

    def velocity(x: Tensor, t: float) -> Tensor:
        at = torch.full(x.shape[:1], t, dtype=torch.float64, device=x.device)
        F = predict(net, p, x, at, cond, guidance=guidance, null_condition=null_condition)
        _, _, c, d = p.coefficients(at)
        return ops.boundary(x, F, c, d)

    first = torch.full(z.shape[:1], times[0], dtype=torch.float64, device=z.device)
    return SOLVERS[solver](velocity, _prior(p, z, first), [*times, p.path.t_min])


def as_parameterization(path: Path | Parameterization) -> Parameterization:
    """The path with its own prediction type, or what was given."""
    return path if isinstance(path, Parameterization) else Parameterization(path)


def check_descending(path: Path, times: Sequence[float]) -> None:
    """Raise ValueError unless `times` descend within (t_min, t_max] and number at least one."""
    if not times:
        raise ValueError("times must name at least one evaluation, got none")
    if len(times) > rng.NUM_STREAMS - rng.SAMPLE:
        raise ValueError(
            f"times may name at most {rng.NUM_STREAMS - rng.SAMPLE} evaluations, got {len(times)}"
        )
    path.check_times(times)
    if any(t <= s for t, s in zip(times, [*times[1:], path.t_min])):
        raise ValueError(f"times must descend and end above {path.t_min}, got {list(times)}")
