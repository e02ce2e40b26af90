"""Bytes that a step must move where no network does: the one place for these formulae.

Samples are counted in elements, each of which is read or written in one of three sizes: that of
the data, that of the networks' inputs and outputs, and float32. Every tensor counts once for each
kernel that reads or writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastcm.objectives import (
    ConsistencyDistillation,
    ConsistencyTraining,
    EasyConsistency,
    FlowMatching,
    Stepwise,
)
from fastcm.objectives.base import Objective


class Passes(NamedTuple):
    """How often an element is read or written, in each of the three sizes."""

    data: int = 0
    network: int = 0
    float32: int = 0

    def plus(self, other: Passes) -> Passes:
        return Passes(*(a + b for a, b in zip(self, other)))

    def bytes(self, data_size: int, network_size: int) -> int:
        """Of one element."""
        return self.data * data_size + self.network * network_size + 4 * self.float32


NOISING = Passes(data=1, network=1)
"""x0 to the input at t."""
NOISING_PAIR = Passes(data=1, network=2)
"""x0 to the inputs at t and at s."""
EULER = Passes(data=1, network=2, float32=1)
"""x_t again from x0, with the teacher's F, to x_s and to the input at s."""
HEUN = EULER.plus(Passes(network=1, float32=2)).plus(Passes(data=1, network=1, float32=2))
"""Euler's step; x_s and F to the end of a second one; and from x_t half of the way there."""
GUIDANCE = Passes(network=5)
"""A batch of twice the rows from inputs that are read twice, and the second F of the teacher."""
GUIDANCE_AGAIN = Passes(network=7)
"""The same, where the guided F is written first."""
LOSS = Passes(data=1, network=2)
"""x_t and a target out of x0, with F, to the gradient of F."""
LOSS_OF_PAIR = Passes(data=1, network=3)
"""The same with the target network's F."""
LOSS_OF_STEP = LOSS_OF_PAIR.plus(Passes(float32=1))
"""The same with x_s."""


def around_the_networks(objective: Objective) -> Passes | None:
    """Noising, the teacher's steps, boundary maps and loss of an objective, in its kernels.

    None for methods whose arithmetic is not all in kernels of this package.
    """
    if isinstance(objective, FlowMatching):
        return NOISING.plus(LOSS)
    if isinstance(objective, ConsistencyTraining | EasyConsistency | Stepwise):
        return NOISING_PAIR.plus(LOSS_OF_PAIR)
    if isinstance(objective, ConsistencyDistillation) and not objective.guidance_rescale:
        heun, guided = objective.solver == "heun", objective.guidance is not None
        steps = HEUN if heun else EULER
        if guided:
            steps = steps.plus(GUIDANCE)
        if guided and heun:
            steps = steps.plus(GUIDANCE_AGAIN)
        return NOISING.plus(steps).plus(LOSS_OF_STEP)
    return None


def sweep(
    parameters: int, averages: int, *, clipped: bool = True, copies: int = 0, refreshed: int = 0
) -> int:
    """Clip, Adam and every average: 40 bytes a parameter with one, 8 for each further one.

    Args:
        parameters: that are trained, float32 with gradients in float32.
        averages: how many are kept.
        clipped: whether the norm is measured, which reads the gradients once more.
        copies: in bfloat16.
        refreshed: averages that are copied to a network of shards afterwards.
    """
    gradient, state, average, copy = 4, 3 * 8, 8, 8
    each = gradient * (1 + clipped) + state + average * averages + 2 * copies + copy * refreshed
    return parameters * each


def traffic(parallel: str | None, gpus: int, gradients: int, weights: int) -> tuple[int, int]:
    """Bytes that one device sends by rings: (averaging gradients, gathering weights).

    Args:
        parallel: None, "ddp" (all-reduce) or "fsdp" (reduce-scatter, and all-gather of weights).
        gpus: devices.
        gradients: bytes that are averaged.
        weights: bytes that are gathered, of all passes over networks.
    """
    if parallel is None or gpus == 1:
        return 0, 0
    if parallel == "ddp":
        return 2 * gradients * (gpus - 1) // gpus, 0
    return gradients * (gpus - 1) // gpus, weights * (gpus - 1) // gpus


def samples_in_memory(
    networks: Sequence[tuple[int, bool]], elements: int, data_size: int, network_size: int
) -> int:
    """Bytes of a micro-batch outside the networks: data, inputs, outputs and a gradient.

    Args:
        networks: rows and whether there is a gradient, of each evaluation.
        elements: of a sample.
    """
    kept = sum(rows * 2 * network_size for rows, _ in networks)
    rows = max((rows for rows, _ in networks), default=0)
    return elements * (kept + rows * (data_size + network_size))
