"""Where the state of the parameters lies: flat memory, one segment for each of them."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcm.kernels.tables import SEGMENT_ALIGN
from fastcm.sharding import dtensors
from fastcm.sharding.dtensors import Mesh


def same_order(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two strides agree, but in dimensions of size 1, where they mean nothing."""
    return all(n == 1 or i == j for n, i, j in zip(shape, a, b))


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a piece of memory, each once, in any order of dimensions."""
    if tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


@dataclass(frozen=True)
class Slot:
    """One parameter and its place.

    Args:
        parameter: as the user gave it, perhaps a DTensor.
        group: index of its parameter group.
        offset: its first element in the flat state.
        shape, stride, dtype: of its local shard; the state has the same strides if it is dense.
        dense: the shard fills its memory, so that kernels can work on it in place.
        mesh: what the squares of its gradient are summed over.
    """

    parameter: Tensor
    group: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    dense: bool
    mesh: Mesh

    @property
    def numel(self) -> int:
        return self.shape.numel()

    def still_fits(self, shard: Tensor) -> bool:
        """Whether a parameter whose memory moved still has the form that it had."""
        return (
            shard.shape == self.shape
            and shard.dtype == self.dtype
            and is_dense(shard) == self.dense
            and (not self.dense or same_order(self.shape, shard.stride(), self.stride))
        )

    def view(self, flat: Tensor) -> Tensor:
        """The segment of a flat tensor in the shape and strides of the parameter."""
        return flat.as_strided(self.shape, self.stride, flat.storage_offset() + self.offset)


class Layout:
    """Flat memory for the state of parameters: moments, averages, masters, shadows.

    Segments start at multiples of 64 elements. Each kind of state is an allocation of its own, so
    that saving one average does not save the moments with it.

    Args:
        parameters: with the index of the group of each.
        averages: how many.
        shadow_dtype: of low-precision copies, or None.
        shadow_averages: the averages that have such a copy.

    Attributes:
        moments: ``[2, total]``: exp_avg, exp_avg_sq.
        averages: of ``[total]`` each.
        masters: ``[total]``, if some parameter is not dense or not of the state's dtype.
        shadows: of ``[total]`` each: the parameters, then the chosen averages; may be empty.
        steps: float32 ``[n]``, updates of each parameter.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[Tensor, int]],
        averages: int,
        shadow_dtype: torch.dtype | None,
        shadow_averages: Sequence[int],
    ) -> None:
        shards = [dtensors.local(p) for p, _ in parameters]
        self.device = shards[0].device
        double = any(s.dtype == torch.float64 for s in shards)
        self.dtype = torch.float64 if double else torch.float32
        self.slots: list[Slot] = []
        total = 0
        for (parameter, group), shard in zip(parameters, shards):
            dense = is_dense(shard)
            stride = tuple(shard.stride()) if dense else _contiguous(shard.shape)
            mesh = dtensors.mesh_of(parameter)
            self.slots.append(
                Slot(parameter, group, total, shard.shape, stride, shard.dtype, dense, mesh)
            )
            total += -(-shard.numel() // SEGMENT_ALIGN) * SEGMENT_ALIGN
        self.total = total

        def flat(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.zeros(*shape, total, dtype=dtype, device=self.device)

        self.moments = flat(2)
        self.averages = [flat() for _ in range(averages)]
        own = all(s.dense and s.dtype == self.dtype for s in self.slots)
        self.masters = None if own else flat()
        chosen = sorted(set(shadow_averages))
        copies = 0 if shadow_dtype is None else 1 + len(chosen)
        self.shadows = [flat(dtype=shadow_dtype or self.dtype) for _ in range(copies)]
        self.shadow_sources = [-1, *chosen][:copies]
        self.steps = torch.zeros(len(self.slots), dtype=torch.float32, device=self.device)
        self._parameters = [slot.parameter for slot in self.slots]
        self._sizes = Counter(slot.group for slot in self.slots)
        self._by_id = {id(slot.parameter): slot for slot in self.slots}

    def find(self, parameter: Tensor) -> Slot | None:
        """The slot of a parameter, if it has one."""
        return self._by_id.get(id(parameter))

    def holds(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether these are still the groups that it was made for: they may be edited."""
        parameters = [p for group in groups for p in group["params"]]
        return (
            len(parameters) == len(self.slots)
            and all(map(operator.is_, parameters, self._parameters))
            and all(len(group["params"]) == self._sizes[i] for i, group in enumerate(groups))
        )

    def follow(self, slot: Slot) -> Tensor:
        """The master copy of a parameter; what was written to the parameter from outside wins."""
        assert self.masters is not None
        master, shard = slot.view(self.masters), dtensors.local(slot.parameter)
        if slot.dtype == self.dtype:
            master.copy_(shard)
        else:
            torch.where(master.to(slot.dtype) == shard, master, shard.to(self.dtype), out=master)
        return master

    @torch.no_grad()
    def initialise(self, slot: Slot) -> None:
        """Averages and shadows of a parameter that has no state yet: the parameter itself."""
        shard = dtensors.local(slot.parameter)
        if self.masters is not None:
            slot.view(self.masters).copy_(shard)
        for flat in (*self.averages, *self.shadows):
            slot.view(flat).copy_(shard)

    @torch.no_grad()
    def take(self, state: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Start from the state of the same parameters in another layout; what it lacks is new."""
        for index, slot in enumerate(self.slots):
            self.initialise(slot)
            old = state.get(slot.parameter, {})
            for name, view in self.entries(index):
                if name in old:
                    value = dtensors.local(torch.as_tensor(old[name]))
                    if value.shape != view.shape:
                        raise ValueError(
                            f"parameter {index} is {list(view.shape)}, its {name} "
                            f"{list(value.shape)}: make another optimizer after a change of shape"
                        )
                    view.copy_(value)

    def entries(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """The state of parameter `index` by the names of its state_dict, as local views."""
        slot = self.slots[index]
        yield "step", self.steps[index]
        yield "exp_avg", slot.view(self.moments[0])
        yield "exp_avg_sq", slot.view(self.moments[1])
        for j, flat in enumerate(self.averages):
            yield f"ema_{j}", slot.view(flat)
        if slot.dtype != self.dtype:
            assert self.masters is not None
            yield "master", slot.view(self.masters)

    @torch.no_grad()
    def copy_shadows(self) -> None:
        """Write every shadow anew."""
        for flat, source in zip(self.shadows, self.shadow_sources):
            if source >= 0:
                flat.copy_(self.averages[source])
            else:
                targets = [slot.view(flat) for slot in self.slots]
                torch._foreach_copy_(targets, [dtensors.local(s.parameter) for s in self.slots])


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    stride, size = [], 1
    for n in reversed(shape):
        stride.append(size)
        size *= max(n, 1)
    return tuple(reversed(stride))
