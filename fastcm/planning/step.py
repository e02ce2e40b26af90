"""What a training step takes of a device: FLOPs, bytes and time by part, memory by kind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastcm.objectives.base import Objective
from fastcm.planning import formulae
from fastcm.planning.ceilings import Ceilings
from fastcm.planning.counting import Counts, count, units
from fastcm.planning.ledger import AROUND, Work
from fastcm.planning.meta import META
from fastcm.precision import Precision

Sharing = Literal["ddp", "fsdp"]

_NETWORKS = {
    "forward": "student, forward",
    "backward": "student, backward",
    "target": "without gradient: target",
    "teacher": "teacher",
    "metric": "metric, forward",
    "metric backward": "metric, backward",
}


@dataclass(frozen=True)
class Part:
    """A part of a step, as one device does it.

    Args:
        name: of the part.
        flops: of matrix products and convolutions.
        bytes: that it moves: in memory, to other devices, or from the host.
        seconds: at the ceilings, None where one of them is not known.
    """

    name: str
    flops: int
    bytes: int
    seconds: float | None


@dataclass(frozen=True)
class Plan:
    """One step of training, per device.

    Args:
        parameters: of the network, how many; `trained` of them receive a gradient.
        rows: of a micro-batch on one device.
        parts: of the step.
        memory: bytes by kind, for "whole" and "sharded" state, each without and with activation
            checkpointing: ``memory["sharded"][True]["activations"]``.
        counts: of one micro-batch.
        settings: what was asked for.
    """

    parameters: int
    trained: int
    rows: int
    parts: tuple[Part, ...]
    memory: dict[str, dict[bool, dict[str, int]]]
    counts: Counts
    settings: dict[str, Any]
    ceilings: Ceilings

    @property
    def seconds(self) -> float:
        """Of all parts whose time is known, one after the other."""
        return sum(part.seconds for part in self.parts if part.seconds is not None)

    @property
    def unknown(self) -> tuple[str, ...]:
        """The parts whose time is not known."""
        return tuple(part.name for part in self.parts if part.seconds is None)

    def share(self, part: Part) -> float | None:
        """Of the time that is known."""
        return None if part.seconds is None or not self.seconds else part.seconds / self.seconds

    @property
    def peak(self) -> int:
        """Bytes of memory on one device, as the step was asked for."""
        kind = "sharded" if self.settings["parallel"] == "fsdp" else "whole"
        return sum(self.memory[kind][self.settings["checkpointing"]].values())


def plan(
    net: nn.Module,
    objective: Objective,
    *,
    shape: tuple[int, ...],
    batch: int,
    gpus: int = 1,
    parallel: Sharing | None = None,
    accumulate: int = 1,
    precision: Precision = "fp32",
    checkpointing: bool = False,
    data_dtype: torch.dtype = torch.float32,
    labels: bool = False,
    averages: int = 1,
    clipped: bool = True,
    ceilings: Ceilings | None = None,
    device_type: str = "cuda",
) -> Plan:
    """Plan one step without taking it; nothing is allocated.

    Args:
        net: the student, on any device; `fastcm.planning.sizes` makes named ones without memory.
        objective: the method, with its teacher if it has one.
        shape: of a sample.
        batch: rows a step, of all devices and micro-batches.
        gpus: devices; more than one need `parallel`.
        parallel: "ddp": every device holds everything; "fsdp": parameters, gradients, moments and
            averages are sharded, and a block's weights gathered where they are used.
        accumulate: micro-batches that the rows of a device are cut into.
        precision: "fp32" or "bf16".
        checkpointing: whether blocks of the student keep their inputs alone, and are computed again
            in the backward pass.
        data_dtype: of the data, uint8 or float32.
        labels: whether there is an int64 label for each row.
        averages: of the weights, beside the objective's own.
        clipped: whether the gradient's norm is measured.
        ceilings: rates of a device; those that are None leave times unknown.
        device_type: "cuda" or "cpu", whose autocast differ.

    Raises:
        ValueError: the batch cannot be cut; several devices without `parallel`; a network that does
            not run on meta tensors.
    """
    ceilings = ceilings or Ceilings()
    rows = _rows(batch, gpus, parallel, accumulate)
    x0, cond, paired = _micro_batch(objective, rows, shape, data_dtype, labels)
    options: dict[str, Any] = {"precision": precision, "device_type": device_type}
    try:
        counts = count(net, objective, x0, cond, paired=paired, **options)
    except (ValueError, TypeError):
        raise
    except Exception as error:
        raise ValueError(
            f"{type(net).__name__} cannot be planned, since it does not run on meta tensors, which "
            f"have shapes but no values: {error!s:.200}"
        ) from error
    target = objective.target_average is not None
    size, kept = _state(net, objective, averages + target), averages + target
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    swept = formulae.sweep(
        math.ceil(trained / (gpus if parallel == "fsdp" else 1)),
        kept,
        clipped=clipped,
        refreshed=int(target and parallel == "fsdp"),
    )
    element, data = (2 if precision == "bf16" else 4), data_dtype.itemsize * (1 + paired)
    elements, of_device = math.prod(shape), rows * accumulate
    uploaded = (elements * data + 8 * labels) * of_device
    parts = [
        *_networks(counts, checkpointing, accumulate, ceilings),
        _moving(AROUND, accumulate * counts.bytes(AROUND), ceilings.bandwidth),
        _moving("clip, Adam, averages", swept, ceilings.bandwidth),
        *_communication(parallel, gpus, size, counts, accumulate, ceilings),
        _moving("data", uploaded, ceilings.upload),
    ]
    evaluated = [(e.rows, e.differentiated) for e in counts.evaluations]
    samples = formulae.samples_in_memory(evaluated, elements, data, element)
    return Plan(
        sum(p.numel() for p in net.parameters()),
        trained,
        rows,
        tuple(parts),
        _memory(net, size, {"batch": samples}, counts, gpus, target),
        counts,
        {
            "method": type(objective).__name__,
            "batch": batch,
            "gpus": gpus,
            "parallel": parallel,
            "accumulate": accumulate,
            "precision": precision,
            "checkpointing": checkpointing,
            "shape": tuple(shape),
        },
        ceilings,
    )


def _rows(batch: int, gpus: int, parallel: str | None, accumulate: int) -> int:
    for name, value in (("batch", batch), ("gpus", gpus), ("accumulate", accumulate)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if parallel not in (None, "ddp", "fsdp"):
        raise ValueError(f'parallel must be None, "ddp" or "fsdp", got {parallel!r}')
    if gpus > 1 and parallel is None:
        raise ValueError(f'{gpus} devices need parallel="ddp" or "fsdp"')
    rows, ragged = divmod(batch, gpus * accumulate)
    if ragged or not rows:
        raise ValueError(
            f"batch {batch} is not a multiple of {gpus} devices x accumulate {accumulate}"
        )
    return rows


def _micro_batch(
    objective: Objective, rows: int, shape: tuple[int, ...], dtype: torch.dtype, labels: bool
) -> tuple[Tensor, Tensor | None, bool]:
    period = getattr(objective, "period", 1)
    if rows % period:
        raise ValueError(
            f"{type(objective).__name__} needs micro-batches of a multiple of {period} rows, "
            f"got {rows}"
        )
    paired = type(objective).__name__ == "PairDistillation"
    x0 = torch.empty((rows, 2, *shape) if paired else (rows, *shape), dtype=dtype, device=META)
    cond = torch.empty(rows, dtype=torch.int64, device=META) if labels else None
    return x0, cond, paired


def _bytes(tensors: list[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _state(net: nn.Module, objective: Objective, averages: int) -> dict[str, int]:
    """Bytes by kind of what a whole step leaves behind, and of the teacher."""
    trained = [p for p in net.parameters() if p.requires_grad]
    numbers, teacher = sum(p.numel() for p in trained), getattr(objective, "teacher", None)
    return {
        "parameters": _bytes([*net.parameters(), *net.buffers()]),
        "gradients": _bytes(trained),
        "moments": 2 * 4 * numbers,
        "averages": 4 * averages * numbers,
        "teacher": _bytes([*teacher.parameters()]) if isinstance(teacher, nn.Module) else 0,
    }


def _networks(
    counts: Counts, checkpointing: bool, accumulate: int, ceilings: Ceilings
) -> list[Part]:
    names = {**_NETWORKS, "blocks": "blocks again"} if checkpointing else _NETWORKS
    return [
        _network_part(name, counts.work[key], accumulate, ceilings)
        for key, name in names.items()
        if counts.work.get(key)
    ]


def _network_part(name: str, work: Work, times: int, ceilings: Ceilings) -> Part:
    """Operators one after the other, each at the ceiling that it meets first."""
    flops, moved = (times * sum(column) for column in zip(*work))
    if ceilings.tflops is None:
        return Part(name, flops, moved, None)
    rate, bandwidth = 1e12 * ceilings.tflops, 1e9 * (ceilings.bandwidth or math.inf)
    return Part(name, flops, moved, times * sum(max(f / rate, b / bandwidth) for f, b in work))


def _moving(name: str, size: int, rate: float | None) -> Part:
    """A part that takes as long as its bytes do, at a rate of 1e9 bytes a second."""
    if size == 0:
        return Part(name, 0, 0, 0.0)
    return Part(name, 0, size, None if rate is None else size / 1e9 / rate)


def _communication(
    parallel: str | None,
    gpus: int,
    size: dict[str, int],
    counts: Counts,
    accumulate: int,
    ceilings: Ceilings,
) -> list[Part]:
    """What travels between devices.

    With shards, the weights of a network are gathered for every pass over it, and gradients are
    averaged after every micro-batch; without, once a step.
    """
    if parallel is None or gpus == 1:
        return []
    gathered = accumulate * sum(
        size["teacher" if e.network == "teacher" else "parameters"] * (1 + e.differentiated)
        for e in counts.evaluations
        if e.network != "metric"
    )
    times = accumulate if parallel == "fsdp" else 1
    averaged, gathered = formulae.traffic(parallel, gpus, times * size["gradients"], gathered)
    rate = None if ceilings.interconnect is None else ceilings.interconnect / 8
    name = "all-reduce of gradients" if parallel == "ddp" else "reduce-scatter of gradients"
    parts = [_moving(name, averaged, rate)]
    if gathered:
        parts.append(_moving("all-gather of weights", gathered, rate))
    return parts


def _memory(
    net: nn.Module,
    size: dict[str, int],
    rest: dict[str, int],
    counts: Counts,
    gpus: int,
    target: bool,
) -> dict[str, dict[bool, dict[str, int]]]:
    root, block = units(net)
    sharded = {name: math.ceil(value / gpus) for name, value in size.items()}
    # the network of the target has shards of its own
    sharded["averages"] += sharded["gradients"] if target and gpus > 1 else 0
    # what is outside of blocks, weights of a block and of the next one, gradients of a block
    sharded["gathered"] = 0 if gpus == 1 else root + 3 * block
    kinds = {"whole": size, "sharded": sharded}
    return {
        kind: {
            again: {
                **state,
                **rest,
                "activations": counts.checkpointed if again else counts.activations,
            }
            for again in (False, True)
        }
        for kind, state in kinds.items()
    }
