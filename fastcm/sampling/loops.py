"""The loops of the samplers, on arguments that are valid: from noise z to samples.

``levels`` are those of the evaluations and then the end; see `fastcm.sampling.functions`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor

from fastcm import ops, rng
from fastcm.rng import NoiseKey
from fastcm.sampling.guidance import Evaluator
from fastcm.sampling.held import Rows
from fastcm.sampling.levels import Level, fresh_sigma
from fastcm.sampling.solvers import Solver
from fastcm.sampling.steps import Step

Method = Literal["multistep", "ode", "flow-map"]

Constraint = Callable[[Tensor], Tensor]
"""``constraint(x0) -> x0``: the nearest samples ``[B, ...]`` that meet a condition."""


def multistep(
    evaluate: Evaluator,
    z: Tensor,
    key: NoiseKey,
    levels: Sequence[Level],
    *,
    first_sample: int = 0,
    start: Tensor | None = None,
    constraint: Constraint | None = None,
) -> Tensor:
    """Denoise, add fresh noise, denoise again; the key is for that noise."""
    *steps, end = levels
    rows = evaluate.rows
    x, inputs = _first_state(z, steps[0], rows, start), None  # the network's, where it is not x
    for j, (at, to) in enumerate(pairwise(steps)):
        out, ahead = evaluate(x, at, j, inputs=inputs), evaluate.ahead(x, to)
        alpha, sigma, stream = rows(x, to.alpha), rows(x, fresh_sigma(to, end)), rng.SAMPLE + j + 1
        if constraint is None:
            made = ops.sampler_update(
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
                guidance=None if out.F_uncond is None else out.weights(x),
                **ahead,
            )
            x, inputs = made if isinstance(made, tuple) else (made, None)
        else:
            x0 = _constrained(constraint, out.map(x, at.a, at.b))
            state = ops.noising(x0, alpha, sigma, key, stream=stream, first_sample=first_sample)
            assert isinstance(state, Tensor)
            x = state
    out = evaluate(x, steps[-1], len(steps) - 1, inputs=inputs)
    x0 = out.map(x, steps[-1].a, steps[-1].b)
    return x0 if constraint is None else _constrained(constraint, x0)


def ode(
    evaluate: Evaluator,
    z: Tensor,
    key: NoiseKey | None,
    steps: Sequence[Step],
    start: Level,
    solver: Solver,
    *,
    first_sample: int = 0,
) -> Tensor:
    """Integrate the probability-flow ODE from z at `start`; the key is for steps with noise."""
    rows = evaluate.rows

    def renoise(x: Tensor, step: Step) -> Tensor:
        assert key is not None and step.noise is not None
        k, s = (rows(x, c) for c in step.noise)
        stream = rng.SAMPLE + 1 + step.i
        out = ops.noising(x, k, s, key, stream=stream, first_sample=first_sample)
        assert isinstance(out, Tensor)
        return out

    return solver(evaluate, _first_state(z, start, rows), steps, renoise)


def flow_map(evaluate: Evaluator, z: Tensor, levels: Sequence[Level]) -> Tensor:
    """Walk down by mean velocities."""
    x = _first_state(z, levels[0], evaluate.rows)
    for i, (at, to) in enumerate(pairwise(levels)):
        x = evaluate(x, at, i, to).map(x, 1.0, to.t - at.t)
    return x


def _first_state(z: Tensor, at: Level, rows: Rows, start: Tensor | None = None) -> Tensor:
    if start is not None:
        return ops.boundary(start, z, rows(z, at.alpha), rows(z, at.sigma))
    return z if at.sigma == 1.0 else at.sigma * z


def _constrained(constraint: Constraint, x0: Tensor) -> Tensor:
    out = constraint(x0)
    if not isinstance(out, Tensor) or out.shape != x0.shape:
        shown = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"constraint must return the shape of x0, {list(x0.shape)}, got {shown}")
    return out
