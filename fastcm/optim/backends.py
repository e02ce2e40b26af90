"""The sweep on a GPU, on a CPU, and in plain torch; chosen in one place."""

from __future__ import annotations

import ctypes
from typing import Protocol

import torch
from torch import nn

from fastcm.kernels import native
from fastcm.kernels.tables import CHUNK, COLUMNS
from fastcm.ops import reference
from fastcm.optim.layout import Layout
from fastcm.optim.tables import HYPER, Tables
from fastcm.sharding import dtensors

try:
    from fastcm.kernels import adam_ema, grad_norm, launch, tick
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "triton":
        raise


class Backend(Protocol):
    """Three passes over the tables; none waits for the device, but for plain torch on a GPU.

    Attributes:
        shadows: whether the sweep writes the shadows too.
        ramps: whether the tick evaluates tables.ramps.
    """

    shadows: bool
    ramps: bool

    def direct(self, layout: Layout) -> tuple[torch.dtype, ...]:
        """Dtypes of parameters and gradients that need not be copied."""

    def grad_norm(self, tables: Tables) -> None:
        """Squares of the gradients into tables.sums."""

    def tick(self, tables: Tables, *, radam: bool, measured: bool) -> None:
        """The scalars of the step, from tables.sums if the norm was measured."""

    def sweep(self, tables: Tables) -> None:
        """Parameters, moments, averages and shadows."""


class Triton:
    """The Triton kernels."""

    shadows = True
    ramps = True

    def direct(self, layout: Layout) -> tuple[torch.dtype, ...]:
        if layout.dtype == torch.float64:
            return (torch.float64,)
        return (torch.float32, torch.bfloat16, torch.float16)

    def grad_norm(self, tables: Tables) -> None:
        segments = tables.segments
        with launch.device_of(tables.tensors):
            grad_norm.launch_grad_norm(tables.tensors, tables.chunks, segments, tables.partial)
            grad_norm.launch_grad_norm_finish(tables.partial, tables.bounds, tables.sums)

    def tick(self, tables: Tables, *, radam: bool, measured: bool) -> None:
        with launch.device_of(tables.tensors):
            tick.launch_tick(
                tables.tensors,
                tables.hyper,
                tables.limit,
                tables.sums if measured else None,
                tables.layout.steps,
                tables.rows,
                tables.shared,
                tables.norm,
                tables.counts,
                tables.ramps if tables.ramped else None,
                radam=radam,
            )

    def sweep(self, tables: Tables) -> None:
        layout = tables.layout
        with launch.device_of(tables.tensors):
            for segment in tables.segments:
                adam_ema.launch_sweep(
                    tables.tensors,
                    tables.chunks,
                    segment,
                    layout.moments,
                    tables.averages,
                    tables.rows,
                    tables.shared,
                    masters=layout.masters if segment.parameter != layout.dtype else None,
                    shadows=tables.shadows,
                    shadow_dtype=layout.shadows[0].dtype if layout.shadows else None,
                    mask=sum(1 << j for j in layout.shadow_sources if j >= 0),
                )


class Native:
    """The C++ kernel; `library` as `fastcm.kernels.native.load` gives it."""

    shadows = False
    ramps = False

    def __init__(self, library: native.Library) -> None:
        self._library = library

    def direct(self, layout: Layout) -> tuple[torch.dtype, ...]:
        return (layout.dtype,)

    def _table(self, tables: Tables) -> ctypes.Structure:
        n, count = tables.tensors.shape[1], tables.chunks.shape[1]
        tensors = native.address(tables.tensors, torch.int64, COLUMNS * n)
        chunks = native.address(tables.chunks, torch.int32, 2 * count)
        return native.Table(tensors, n, chunks, count, CHUNK)

    def grad_norm(self, tables: Tables) -> None:
        classes = tables.sums.numel()
        self._library.grad_norm(
            ctypes.byref(self._table(tables)),
            native.address(tables.partial, torch.float64, tables.chunks.shape[1]),
            native.address(tables.bounds, torch.int64, classes + 1),
            ctypes.c_int64(classes),
            native.address(tables.sums, torch.float64, classes),
            torch.get_num_threads(),
        )

    def tick(self, tables: Tables, *, radam: bool, measured: bool) -> None:
        layout, n, classes = tables.layout, tables.tensors.shape[1], tables.sums.numel()
        groups = 1 + max((slot.group for slot in layout.slots), default=-1)
        self._library.tick(
            ctypes.byref(self._table(tables)),
            native.address(tables.hyper, torch.float64, HYPER * groups),
            native.address(tables.limit, torch.float64, 1),
            native.address(tables.sums if measured else None, torch.float64, classes),
            ctypes.c_int64(classes),
            native.address(layout.steps, torch.float32, n),
            native.address(tables.rows, layout.dtype, 8 * n),
            native.address(tables.shared, layout.dtype, 2 + len(layout.averages)),
            native.address(tables.norm, layout.dtype, 1),
            native.address(tables.counts, torch.int64, 3),
            ctypes.c_bool(radam),
        )

    def sweep(self, tables: Tables) -> None:
        layout, count = tables.layout, len(tables.layout.averages)
        self._library.sweep(
            ctypes.byref(self._table(tables)),
            native.address(layout.moments, layout.dtype, 2 * layout.total),
            ctypes.c_int64(layout.total),
            native.address(tables.averages, torch.int64, count),
            count,
            native.address(tables.rows, layout.dtype, 8 * tables.tensors.shape[1]),
            native.address(tables.shared, layout.dtype, 2 + count),
            torch.get_num_threads(),
        )


class Plain:
    """`fastcm.ops.reference`, one parameter at a time. Waits for the device once in a step."""

    shadows = False
    ramps = False

    def direct(self, layout: Layout) -> tuple[torch.dtype, ...]:
        return (layout.dtype,)

    def grad_norm(self, tables: Tables) -> None:
        tables.sums.zero_()
        for slot, g in zip(tables.layout.slots, tables.gradients):
            if g is not None and slot.numel:
                square = g.to(tables.layout.dtype).square().flatten()
                rows = nn.functional.pad(square, (0, -slot.numel % CHUNK)).view(-1, CHUNK).sum(1)
                # a running sum has one order at any number of threads, unlike a sum
                tables.sums[tables.meshes.index(slot.mesh)] += rows.double().cumsum(0)[-1]

    def tick(self, tables: Tables, *, radam: bool, measured: bool) -> None:
        tables.shared[:2] = 1.0
        tables.counts[0] += 1
        if measured:
            norm = tables.sums.sum().sqrt()
            finite = norm.isfinite()
            tables.norm.copy_(norm)
            tables.shared[0] = (tables.limit[0] / (norm + 1e-6)).clamp(max=1.0)
            tables.shared[1] = finite
            tables.counts[1:] += ~finite
            tables.counts[2] *= ~finite
        has = [g is not None for g in tables.gradients]
        here = torch.tensor(has, dtype=torch.bool, device=tables.layout.device)
        tables.layout.steps += here * tables.shared[1].float()
        # 1 where there is no step yet: the row of such a parameter is not used
        steps = tables.layout.steps.clamp(min=1)
        groups = [slot.group for slot in tables.layout.slots]
        tables.rows.copy_(reference.adam_rows(tables.hyper[groups], steps, radam=radam))

    def sweep(self, tables: Tables) -> None:
        if not tables.shared[1]:
            return
        layout, staged = tables.layout, {id(slot) for slot in tables.staged}
        for slot, g, row in zip(layout.slots, tables.gradients, tables.rows):
            x = dtensors.local(slot.parameter)
            if id(slot) in staged:
                assert layout.masters is not None
                x = slot.view(layout.masters)
            first, second = (slot.view(flat) for flat in layout.moments)
            averages = [slot.view(flat) for flat in layout.averages]
            clip, rates = tables.shared[0], tables.shared[2:]
            reference.adam_ema_(x, g, first, second, averages, row, clip, rates)


def choose(device: torch.device, dtype: torch.dtype) -> Backend:
    """The fastest implementation for parameters on `device` and state of `dtype`."""
    if device.type == "cuda" and "adam_ema" in globals():
        return Triton()
    library = native.load(dtype) if device.type == "cpu" else None
    return Plain() if library is None else Native(library)


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured: what is sent from the host now would be frozen."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
