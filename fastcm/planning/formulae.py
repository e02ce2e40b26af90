"""Bytes that a step moves, sends and holds where they follow from sizes alone."""

from __future__ import annotations

from collections.abc import Sequence


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
