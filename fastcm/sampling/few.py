"""A sampler's loop for few samples on a CPU: all that does not depend on the call is prepared.

There a call of the network is short, and after it has streamed its weights through the caches a
line of Python costs as much as hundreds of elements. The samples have the bits of
`fastcm.sampling.loops`, which does everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastcm import rng
from fastcm.networks.protocol import Network, check_output
from fastcm.ops import prepared
from fastcm.ops.reference import lift
from fastcm.sampling.levels import Level, fresh_sigma


class Move(NamedTuple):
    """One evaluation, and what makes the next state of it."""

    t: Tensor
    s: Tensor | None
    c_in: Tensor | None
    step: prepared.Step


class FewSamples:
    """Samples of one shape, without guidance.

    Args:
        method: of the `Sampler`.
        levels: of the evaluations, and then the end.
        shape: ``[B, ...]``.
    """

    def __init__(
        self,
        method: Literal["multistep", "flow-map"],
        levels: Sequence[Level],
        shape: tuple[int, ...],
    ) -> None:
        self._noise, self._sigma = prepared.noise(shape, rng.SAMPLE), levels[0].sigma
        self._moves = (_means if method == "flow-map" else _steps)(levels, shape)

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


def _steps(levels: Sequence[Level], shape: tuple[int, ...]) -> list[Move]:
    """As `fastcm.sampling.loops.multistep`."""
    *steps, end = levels
    rows, moves = partial(_rows, shape), []
    for j, (at, to) in enumerate(pairwise(steps)):
        a, b, alpha, sigma = map(rows, (at.a, at.b, to.alpha, fresh_sigma(to, end)))
        scale, stream = _c_in(to, shape), rng.SAMPLE + j + 1
        step = prepared.sampler_update(shape, a, b, alpha, sigma, stream, input_scale=scale)
        moves.append(Move(rows(at.c_noise), None, _c_in(at, shape), step))
    last = steps[-1]
    return [*moves, _mapped(shape, last, None, last.a, last.b)]


def _means(levels: Sequence[Level], shape: tuple[int, ...]) -> list[Move]:
    """As `fastcm.sampling.loops.flow_map`."""
    return [_mapped(shape, at, to, 1.0, to.t - at.t) for at, to in pairwise(levels)]


def _mapped(shape: tuple[int, ...], at: Level, to: Level | None, a: float, b: float) -> Move:
    s = None if to is None else _rows(shape, to.c_noise)
    step = prepared.boundary(shape, _rows(shape, a), _rows(shape, b))
    return Move(_rows(shape, at.c_noise), s, _c_in(at, shape), step)


def _c_in(at: Level, shape: tuple[int, ...]) -> Tensor | None:
    return None if at.c_in is None else _rows(shape, at.c_in)


def _rows(shape: tuple[int, ...], value: float) -> Tensor:
    return torch.full(shape[:1], value, dtype=torch.float32, device="cpu")
