"""Whether the memory that is free holds a step, asked before the first one is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastcm.objectives.base import Objective
from fastcm.planning.counting import count
from fastcm.planning.render import size
from fastcm.precision import Precision

_CLEARLY = 10_000
"""Bytes that no network keeps for each byte of its weights and of its rows: not worth counting."""
_CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device or, for a CPU, on the host; None where that is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what the allocator holds is free, too
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + cached
    if device.type != "cpu":
        return None
    found = [n for n in (_available_on_host(), _left_in_group()) if n is not None]
    return min(found, default=None)


def _available_on_host() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def _left_in_group() -> int | None:
    """Of the limit of a container; None without one."""
    try:
        limit, used = ((_CGROUP / f"memory.{name}").read_text() for name in ("max", "current"))
        left = int(limit) - int(used)
    except (OSError, ValueError):
        return None
    return max(left, 0)


def shortage(
    net: nn.Module,
    objective: Objective,
    x0: Tensor,
    cond: Any = None,
    *,
    accumulate: int = 1,
    paired: bool = False,
    precision: Precision = "fp32",
    free: int | None = None,
) -> str | None:
    """One line on what a step needs and what to do, if less is free; None if it fits.

    None also where it cannot be said: for networks that do not run on the meta device, that have
    hooks or are sharded, and where nobody knows what is free. Never raises.

    Args:
        net, objective: as they will train.
        x0, cond: the rows of this process, of which shapes and dtypes count.
        accumulate: micro-batches that they are cut into.
        paired: see `count`.
        precision: "fp32" or "bf16".
        free: bytes; default what is free now.
    """
    try:
        if any(m._forward_hooks or m._forward_pre_hooks for m in net.modules()):
            return None
        if any(type(p) not in (nn.Parameter, Tensor) for p in net.parameters()):
            return None
        free = free_memory(x0.device) if free is None else free
        weights = sum(p.numel() * p.element_size() for p in net.parameters())
        if free is None or _CLEARLY * (weights + x0.nbytes) < free:
            return None
        rows = len(x0) // accumulate
        counts = count(
            net,
            objective,
            x0[:rows],
            pytree.tree_map_only(Tensor, lambda part: part[:rows], cond),
            paired=paired,
            precision=precision,
            device_type=x0.device.type,
            memory_only=True,
        )
    except Exception:  # a network may raise anything here, and none of it matters
        return None
    gradients = sum(p.numel() * p.element_size() for p in net.parameters() if p.requires_grad)
    needed = counts.activations + gradients
    if needed <= free:
        return None
    where = "this host" if x0.device.type == "cpu" else str(x0.device)
    text = (
        f"memory: a step on {rows} rows needs {size(needed)} at least, {size(counts.activations)} "
        f"of it activations, and {size(free)} are free on {where}"
    )
    return f"{text}: {_advice(counts.activations, gradients, free, len(x0), accumulate)}"


def _advice(activations: int, gradients: int, free: int, rows: int, accumulate: int) -> str:
    """The fewest micro-batches that fit, activations being as many as rows."""
    a_row = activations * accumulate / rows
    for parts in range(accumulate + 1, rows + 1):
        if rows % parts == 0 and gradients + a_row * rows / parts <= 0.9 * free:
            return (
                f"micro-batches of {rows // parts} rows fit, --accumulate {parts} (accumulate="
                f"{parts}), or a smaller --batch"
            )
    return "not even one row fits: a smaller network, or a device with more memory"
