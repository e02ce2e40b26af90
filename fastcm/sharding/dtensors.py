"""DTensor parameters (FSDP2): the local shard to work on, and what a norm is reduced over."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Mesh = tuple[Any, tuple[int, ...]] | None
"""Where the squares of a gradient are spread: a device mesh and its dimensions; None: nowhere."""


def is_dtensor(tensor: Tensor) -> bool:
    # whoever has one has imported the module, which costs a second
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The tensor itself, or the shard of a DTensor on this rank; detached, the same memory."""
    if is_dtensor(tensor):
        shard: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
        return shard.detach()
    return tensor.detach()


def gradient(parameter: Tensor) -> Tensor | None:
    """The gradient of the local shard."""
    found = parameter.grad
    if found is None or not is_dtensor(parameter):
        return found
    sharded: Any = found
    placements = parameter.placements  # type: ignore[attr-defined]
    if sharded.placements != placements:
        sharded = sharded.redistribute(placements=placements)
    shard: Tensor = sharded._local_tensor
    return shard


def reshard(module: nn.Module) -> None:
    """Let the modules of FSDP2 forget gathered parameters, which the next forward gathers anew."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for part in module.modules():
            if isinstance(part, fsdp.FSDPModule):
                part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a DTensor, for which every process has to ask."""
    if is_dtensor(tensor):
        full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
        return full
    return tensor


def first_element(tensor: Tensor) -> int:
    """Where the local shard begins in the flattened DTensor, one that is sharded by rows."""
    sharded: Any = tensor
    coordinate = sharded.device_mesh.get_coordinate()
    start, rows = 0, sharded.shape[0]
    for i, placement in enumerate(sharded.placements):
        if placement.is_replicate():
            continue
        assert placement.is_shard(0), f"{placement} is not by rows"
        each = -(-rows // sharded.device_mesh.size(i))
        skipped = min(each * coordinate[i], rows)
        start, rows = start + skipped, min(each, rows - skipped)
    return int(start) * tensor.shape[1:].numel()


def is_first_replica(tensor: Tensor) -> bool:
    """Whether the local shard is the one that counts where several processes hold it."""
    sharded: Any = tensor
    coordinate = sharded.device_mesh.get_coordinate()
    return not any(c for c, p in zip(coordinate, sharded.placements) if p.is_replicate())


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """State of a shard as a DTensor, as distributed checkpoints want it."""
    if not is_dtensor(parameter):
        return value
    sharded: Any = parameter
    # a DTensor takes over the offset of its shard into memory that it does not have, and deepcopy
    # fails if it is not 0: so the view of the flat state is put in afterwards
    wrapped: Any = type(sharded).from_local(
        torch.empty_like(value),
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=sharded.shape,
        stride=sharded.stride(),
    )
    wrapped._local_tensor = value
    found: Tensor = wrapped
    return found


def local_of(parameter: Tensor, value: Tensor) -> Tensor:
    """The local shard of a loaded value, which may be a full tensor."""
    if is_dtensor(parameter) and not is_dtensor(value):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = parameter
        mesh, placements = sharded.device_mesh, sharded.placements
        value = distribute_tensor(value.to(local(parameter).device), mesh, placements)
    return local(value)


def mesh_of(parameter: Tensor) -> Mesh:
    """What the squared norm of its gradient is summed over: sharded dimensions, not replicas."""
    if not is_dtensor(parameter):
        return None
    sharded: Any = parameter
    dims = tuple(i for i, p in enumerate(sharded.placements) if not p.is_replicate())
    return (sharded.device_mesh, dims) if dims else None


def all_reduce(sums: Tensor, meshes: Sequence[Mesh]) -> None:
    """Sum entry i of `sums` over the ranks of meshes[i], in place."""
    for i, mesh in enumerate(meshes):
        if mesh is not None:
            for dim in mesh[1]:
                torch.distributed.all_reduce(sums[i : i + 1], group=mesh[0].get_group(dim))
