"""The tables that kernels read: addresses, chunks, and everything that changes between steps.

The chunks are fixed by the parameters. Addresses of parameters and gradients are compared in each
step and sent to the device when one of them moved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcm.ema import EMA, Average
from fastcm.kernels.tables import CHUNK, GRADIENT, PARAMETER, Segment
from fastcm.optim.layout import Layout, Slot, same_order
from fastcm.sharding import dtensors
from fastcm.sharding.dtensors import Mesh

HYPER = 6
"""lr, beta1, beta2, eps, decoupled weight decay, L2 weight decay of a parameter group."""

Kind = tuple[int, torch.dtype, torch.dtype, bool]
"""What a segment has in common: reduction, dtypes of parameter and gradient, alignment."""


def _addresses(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64, device=device)


class MovedError(RuntimeError):
    """Gradients changed their form while a CUDA graph was captured."""


class Tables:
    """Device tables of one layout.

    Args:
        layout: of the state.
        groups: number of parameter groups.
        direct: dtypes that the kernels take for parameters and gradients; others are copied.
        counts: int64 ``[3]``: steps attempted, skipped, skipped in a row.

    Attributes:
        tensors, chunks, segments: see `fastcm.kernels.tables`.
        partial, bounds, sums: of the squared gradient norm, one sum for each of `meshes`.
        hyper, limit: float64 ``[groups, 6]`` and ``[1]``.
        rows, shared, norm: scalars of the step, in the dtype of the state.
        averages, shadows: int64, addresses.
        ramps: see `fastcm.kernels.tick`; `ramped` if there is one.
        gradients: of each parameter, or None.
        version: counts the times that an address changed.
    """

    def __init__(
        self, layout: Layout, groups: int, direct: Sequence[torch.dtype], counts: Tensor
    ) -> None:
        n, device, dtype = len(layout.slots), layout.device, layout.dtype
        self.layout = layout
        self.counts = counts
        self.gradients: list[Tensor | None] = [None] * n
        self.staged: list[Slot] = []
        self.copied: list[tuple[Tensor, Tensor]] = []
        self.meshes: list[Mesh] = [None]
        for slot in layout.slots:
            if slot.mesh not in self.meshes:
                self.meshes.append(slot.mesh)
        self.hyper = torch.zeros(groups, HYPER, dtype=torch.float64, device=device)
        self.limit = torch.zeros(1, dtype=torch.float64, device=device)
        self.sums = torch.zeros(len(self.meshes), dtype=torch.float64, device=device)
        self.rows = torch.zeros(n, 8, dtype=dtype, device=device)
        self.shared = torch.zeros(2 + len(layout.averages), dtype=dtype, device=device)
        self.norm = torch.full((1,), float("nan"), dtype=dtype, device=device)
        self.averages = _addresses(layout.averages, device)
        self.shadows = _addresses(layout.shadows, device)
        columns = [(0, 0, slot.offset, slot.numel, slot.group) for slot in layout.slots]
        self.tensors = (
            torch.tensor(columns, dtype=torch.int64, device="cpu").t().contiguous().to(device)
        )
        self.segments: list[Segment] = []
        self._direct = frozenset(direct)
        self._sharded = any(dtensors.is_dtensor(slot.parameter) for slot in layout.slots)
        self._buffers: dict[int, Tensor] = {}
        self._seen: list[object] = []
        self._sent: list[object] = []
        self._kinds: list[Kind] = []
        self._addresses: list[list[int]] = []
        self._pending = False
        self.version = 0

    def refresh(self, *, upload: bool = True) -> bool:
        """Find what moved since the last step; False if a parameter changed its form or device.

        Args:
            upload: send it to the device; False while a graph is captured.
        """
        seen: list[object] = []
        shards = [slot.parameter for slot in self.layout.slots]
        gradients = [p.grad for p in shards]
        if self._sharded:
            gradients = [dtensors.gradient(p) for p in shards]
            shards = [dtensors.local(p) for p in shards]
        for p, g in zip(shards, gradients):
            # a gradient has the shape that its parameter had when it was set
            if g is None:
                seen.append((p.data_ptr(), p.stride(), p.shape, p.dtype))
                continue
            if g.layout != torch.strided:
                raise ValueError(f"the optimizer takes dense gradients, got one that is {g.layout}")
            found = g.data_ptr(), g.stride(), g.dtype
            seen.append((p.data_ptr(), p.stride(), p.shape, p.dtype, found))
        self.gradients = gradients
        if seen == self._seen and not self.copied:
            if upload:
                self._upload()
            return True
        device = self.layout.device
        fits = (
            p.device == device and slot.still_fits(p) for slot, p in zip(self.layout.slots, shards)
        )
        if not all(fits):
            return False
        self._seen = []  # of a form that is refused, nothing is kept
        self._assign(shards, gradients)
        self._seen = seen
        if upload:
            self._upload()
        return True

    def average(self, averages: Sequence[Average]) -> None:
        """Set how far those averages move whose decay is constant, and the ramps of others."""
        ramps = [getattr(average, "ramp", None) or (0.0, 0.0, 0.0, 0.0) for average in averages]
        self.ramped = any(ramp[0] > 0.0 for ramp in ramps)
        self.ramps = torch.tensor(ramps, dtype=torch.float64, device="cpu").to(self.counts.device)
        for j, average in enumerate(averages):
            if isinstance(average, EMA) and not average.warmup:
                self.shared[2 + j] = 1.0 - average.decay(self.counts[0])

    def rates(self, averages: Sequence[Average], *, ramps: bool) -> None:
        """Set how far the others move in this step; those with a ramp only if told so."""
        for j, average in enumerate(averages):
            constant = isinstance(average, EMA) and not average.warmup
            if not constant and (ramps or getattr(average, "ramp", None) is None):
                self.shared[2 + j] = 1.0 - average.decay(self.counts[0])

    def release(self) -> None:
        """Let go of the gradients: nobody else may hold them until the next step."""
        self.gradients = [None] * len(self.gradients)
        if self.copied:
            self.copied, self._seen = [], []

    def options(
        self, groups: Sequence[Mapping[str, Any]], max_grad_norm: float | None, *, upload: bool
    ) -> None:
        """Fill `hyper` and `limit` with what changed in the options of the optimizer."""
        if upload:
            hyper = []
            for group in groups:
                lr = math.nan if _on_device(group["lr"]) else float(group["lr"])
                decay = float(group["weight_decay"])
                decays = (decay, 0.0) if group["decoupled_weight_decay"] else (0.0, decay)
                hyper.append([lr, *map(float, group["betas"]), float(group["eps"]), *decays])
            limit = math.inf if max_grad_norm is None else float(max_grad_norm)
            if self._sent != [hyper, limit]:
                send(self.hyper, hyper)
                send(self.limit, [limit])
                if max_grad_norm is None:
                    self.norm.fill_(math.nan)
                self._sent = [hyper, limit]
        for i, group in enumerate(groups):
            if _on_device(group["lr"]):
                self.hyper[i, 0].copy_(group["lr"].detach())

    def _assign(self, shards: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Decide what is read in place and what is copied, and collect the addresses."""
        layout = self.layout
        self.staged, self.copied = [], []
        rows: list[list[int]] = [[], []]
        kinds: list[Kind] = []
        for i, (slot, p, g) in enumerate(zip(layout.slots, shards, gradients)):
            if slot.numel and not p.data_ptr():
                raise ValueError(f"parameter {i} of {list(p.shape)} has no memory")
            if g is not None and g.shape != slot.shape:
                raise ValueError(
                    f"the gradient of parameter {i} is {list(g.shape)}, the parameter "
                    f"{list(slot.shape)}: its data were replaced after the gradient was made"
                )
            if slot.dense and slot.dtype in self._direct:
                address, dtype = p.data_ptr(), slot.dtype
            else:
                assert layout.masters is not None
                self.staged.append(slot)
                address, dtype = slot.view(layout.masters).data_ptr(), layout.dtype
            if g is not None and slot.numel and not self._in_place(slot, g):
                g = self._copy(i, slot, g)
                # 16 for no elements: there is a gradient, and it counts as a step
            found = 0 if g is None else g.data_ptr() or 16
            aligned = address % 16 == 0 and found % 16 == 0
            gradient = layout.dtype if g is None else g.dtype
            kinds.append((self.meshes.index(slot.mesh), dtype, gradient, aligned))
            rows[PARAMETER].append(address)
            rows[GRADIENT].append(found)
        if kinds != self._kinds:
            if self._kinds and self._capturing():
                raise MovedError(
                    "the gradients of a step that is captured in a CUDA graph have another dtype, "
                    "layout or alignment than before: take a few steps on the capture stream first"
                )
            self._partition(kinds)
        if rows != self._addresses:
            self._addresses, self._pending = rows, True
            self.version += 1

    def _capturing(self) -> bool:
        return self.tensors.is_cuda and torch.cuda.is_current_stream_capturing()

    def _in_place(self, slot: Slot, g: Tensor) -> bool:
        return (
            g.dtype in self._direct
            and g.data_ptr() != 0  # a tensor of zeros may have no memory
            and not g.is_neg()
            and same_order(slot.shape, g.stride(), slot.stride)
        )

    def _copy(self, i: int, slot: Slot, g: Tensor) -> Tensor:
        """Room for a gradient in the layout of the parameter; filled in each step."""
        if i not in self._buffers:
            flat = torch.empty(slot.numel, dtype=self.layout.dtype, device=self.layout.device)
            self._buffers[i] = flat.as_strided(slot.shape, slot.stride)
        self.copied.append((self._buffers[i], g))
        return self._buffers[i]

    def _partition(self, kinds: list[Kind]) -> None:
        """Chunks in the order of their kinds, and one segment for each kind."""
        chunks: list[tuple[int, int]] = []
        self.segments = []
        bounds = [0] * (len(self.meshes) + 1)
        order = sorted(set(kinds), key=str)
        for kind in sorted(order, key=lambda kind: kind[0]):
            first = len(chunks)
            for i, (slot, mine) in enumerate(zip(self.layout.slots, kinds)):
                if mine == kind:
                    chunks += [(i, j) for j in range(-(-slot.numel // CHUNK))]
            mesh, parameter, gradient, aligned = kind
            if len(chunks) > first:
                count = len(chunks) - first
                self.segments.append(Segment(first, count, parameter, gradient, aligned))
            bounds[mesh + 1] = len(chunks)
        for i in range(1, len(bounds)):
            bounds[i] = max(bounds[i], bounds[i - 1])
        device = self.layout.device
        table = (
            torch.tensor(chunks, dtype=torch.int32, device="cpu").reshape(-1, 2).t().contiguous()
        )
        self.chunks = table.to(device)
        self.bounds = torch.tensor(bounds, dtype=torch.int64, device=device)
        self.partial = torch.zeros(len(chunks), dtype=torch.float64, device=device)
        self._kinds = kinds

    def _upload(self) -> None:
        if self._pending:
            send(self.tensors[:2], self._addresses)
            self._pending = False


def send(target: Tensor, values: object) -> None:
    """Copy host numbers into a device tensor without waiting for it."""
    # fresh pinned memory each time: one buffer would be overwritten while a copy still reads it
    source = torch.tensor(values, dtype=target.dtype, device="cpu", pin_memory=target.is_cuda)
    target.copy_(source, non_blocking=True)


def _on_device(lr: float | Tensor) -> bool:
    return isinstance(lr, Tensor) and lr.device.type != "cpu"
