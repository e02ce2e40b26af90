"""What FSDP2 makes of a network: repeated blocks sharded one by one, then what is left."""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import nn

from fastcm.networks.blocks import repeated_blocks
from fastcm.sharding.dtensors import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def spread(net: nn.Module, mesh: DeviceMesh, *, trained: bool, blocks: bool = True) -> None:
    """Shard a network in place, over the processes of a mesh.

    A network is gathered a block at a time, and forgotten block by block. What a trained network
    gathers for its root is kept until its backward pass. A frozen one lets go of it at once, and
    gathers the weights of today at its next call.

    Args:
        net: whole, on the device of the mesh or on "meta"; all processes call it together.
        mesh: of one dimension, or of two, where the first is of replicas.
        trained: whether it will have backward passes.
        blocks: whether repeated blocks are sharded on their own; those whose parameters are theirs
            alone are.
    """
    places = _places(net)
    for block in repeated_blocks(net) if blocks else ():
        own = _places(block)
        if own and all(places[parameter] == count for parameter, count in own.items()):
            fsdp().fully_shard(block, mesh=mesh, reshard_after_forward=True)
    if trained:
        fsdp().fully_shard(net, mesh=mesh)
    else:
        fsdp().fully_shard(net, mesh=mesh, reshard_after_forward=True)


def forget(net: nn.Module) -> None:
    """Let go of what FSDP2 notes of each forward pass until a backward one.

    Networks that are frozen have none, and the notes would grow with the calls.
    """
    for part in net.modules():
        if not isinstance(part, fsdp().FSDPModule):
            continue
        group = getattr(part._get_fsdp_state(), "_fsdp_param_group", None)
        for notes in (
            getattr(group, "_post_forward_indices", None),
            getattr(getattr(group, "comm_ctx", None), "post_forward_order", None),
        ):
            if isinstance(notes, list):
                notes.clear()


def check_network(what: str, net: nn.Module) -> None:
    """Raise ValueError unless FSDP2 can shard a network, by the name of what it cannot."""
    if any(map(is_dtensor, net.parameters())):
        raise ValueError(f"{what} is sharded already: give it whole, the trainer shards it")
    if any(hasattr(module, "_orig_mod") for module in net.modules()):
        raise ValueError(
            f"{what} is compiled already: give it as it was before, with compile='regional' if it "
            "is to be"
        )
    for name, p in net.named_parameters():
        if p.dim() == 0:
            raise ValueError(
                f"{what} has a parameter of no dimension, {name}, which FSDP2 cannot shard: make "
                "it one of 1 element"
            )
        if not p.is_contiguous():
            raise ValueError(
                f"{what} has a parameter that is not contiguous, {name}, which FSDP2 cannot shard"
            )
    kinds = {p.dtype for p in net.parameters() if p.requires_grad}
    if len(kinds) > 1:
        raise ValueError(f"FSDP2 takes trained parameters of one dtype, {what} has {kinds}")


def type_of(net: nn.Module) -> str:
    """The name of a network's class; FSDP2 makes one of its own out of it."""
    module = sys.modules.get("torch.distributed.fsdp")
    added = getattr(module, "FSDPModule", ())
    return next(kind.__name__ for kind in type(net).__mro__ if not issubclass(kind, added))


def fsdp() -> Any:
    """Half a second of imports, for those who shard."""
    from torch.distributed import fsdp

    return fsdp


def _places(net: nn.Module) -> Counter[int]:
    """In how many places of a network each parameter is, by id."""
    return Counter(id(p) for _, p in net.named_parameters(remove_duplicate=False))
