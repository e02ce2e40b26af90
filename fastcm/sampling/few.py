"""A sampler's loop for few samples on a CPU: all that does not depend on the call is prepared.

There a call of the network is short, and after it has streamed its weights through the caches a
line of Python costs as much as hundreds of elements. The samples have the bits of
`fastcm.sampling.loops`, which does everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcm import rng
from fastcm.networks.protocol import Network, check_output
from fastcm.ops import prepared
from fastcm.ops.reference import lift
from fastcm.sampling.levels import Level, fresh_sigma
from fastcm.sampling.loops import Method
from fastcm.sampling.solvers import ddim_map, euler_map
from fastcm.sampling.steps import Step

MAPS: dict[str, Callable[[Step], tuple[float, float]]] = {"euler": euler_map, "ddim": ddim_map}
"""Solvers whose step is one map of (x, F)."""


class Fresh(NamedTuple):
    """Noise that is added: alpha x + sigma z, of which the network then reads c_in times."""

    alpha: float
    sigma: float
    stream: int
    c_in: float | None


class Move(NamedTuple):
    """An evaluation without guidance, and the next state a x + b F of it."""

    at: Level
    a: float
    b: float
    c_noise_to: float | None = None
    """What a network of two times is told of the other one."""
    fresh: Fresh | None = None


def moves_of(
    method: Method,
    levels: Sequence[Level],
    steps: Sequence[Step],
    solver: str,
) -> list[Move] | None:
    """What the method's loop in `fastcm.sampling.loops` does without guidance; None if it is more.

    Args:
        levels: of the evaluations, and then the end.
        steps, solver: of the ODE.
    """
    if method == "ode":
        if solver not in MAPS or any(step.noise for step in steps):
            return None
        return [Move(step.at, *MAPS[solver](step)) for step in steps]
    if method == "flow-map":
        return [Move(at, 1.0, to.t - at.t, to.c_noise) for at, to in pairwise(levels)]
    *evaluations, end = levels
    moves = [Move(at, at.a, at.b) for at in evaluations]
    for j, to in enumerate(evaluations[1:]):
        fresh = Fresh(to.alpha, fresh_sigma(to, end), rng.SAMPLE + j + 1, to.c_in)
        moves[j] = moves[j]._replace(fresh=fresh)
    return moves


class FewSamples:
    """Samples of one shape.

    Args:
        moves: from noise to samples.
        shape: ``[B, ...]``.
    """

    def __init__(self, moves: Sequence[Move], shape: tuple[int, ...]) -> None:
        self._noise, self._sigma = prepared.noise(shape, rng.SAMPLE), moves[0].at.sigma
        self._moves = [_prepared(move, shape) for move in moves]

    def __call__(self, net: Network, seed: int, first_sample: int, cond: Any) -> Tensor | None:
        """Samples ``[B, ...]`` float32, under no_grad; None if native code cannot read the output.

        Args:
            net: ``net(x, t, cond) -> F``, of a flow map ``net(x, t, cond, s=s)``.
            seed, first_sample: of the noise, in the range of a `NoiseKey`'s.
            cond: B rows, or None.

        Raises:
            ValueError, TypeError: the network returns anything but a tensor of the shape of x.
        """
        x, inputs = self._noise(seed, first_sample), None
        x = x if self._sigma == 1.0 else self._sigma * x
        for t, s, c_in, step in self._moves:
            if inputs is None:
                inputs = x if c_in is None else lift(c_in, x) * x
            # a network may write to its times, so they are its own each time
            second = {} if s is None else {"s": s.clone()}
            F = check_output("net", net(inputs, t.clone(), cond, **second), inputs)
            moved = step(x, F, seed, first_sample)
            if moved is None:
                return None
            x, inputs = moved
        return x


def _prepared(
    move: Move, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None, prepared.Step]:
    """The network's times and what its input is multiplied by, ``[B]``, and the map."""

    def rows(value: float) -> Tensor:
        return torch.full(shape[:1], value, dtype=torch.float32, device="cpu")

    def optional(value: float | None) -> Tensor | None:
        return None if value is None else rows(value)

    a, b, fresh = rows(move.a), rows(move.b), move.fresh
    if fresh is None:
        step = prepared.boundary(shape, a, b)
    else:
        alpha, sigma, scale = rows(fresh.alpha), rows(fresh.sigma), optional(fresh.c_in)
        step = prepared.sampler_update(shape, a, b, alpha, sigma, fresh.stream, input_scale=scale)
    return rows(move.at.c_noise), optional(move.c_noise_to), optional(move.at.c_in), step
