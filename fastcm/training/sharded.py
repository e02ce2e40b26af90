"""Networks of which every process holds a part (FSDP2): the student, its averages, a teacher.

Repeated blocks are sharded one by one, then what is left: a network is gathered a block at a time,
and forgotten block by block; as a whole where the objective takes derivatives through it. The
optimizer's state follows the shards of the parameters, and so do the averages in it. The network of
an average has shards of its own, copied from there after a step.
"""

from __future__ import annotations

import copy
import sys
import warnings
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastcm.networks.blocks import repeated_blocks
from fastcm.objectives.base import Objective
from fastcm.optim.one_sweep import OneSweep
from fastcm.optim.sharding import is_dtensor, local, reshard
from fastcm.runs.checkpoint import digest
from fastcm.runs.description import describe
from fastcm.training.parallel import Parallel, Processes, shards

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_ELEMENTWISE = (
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop",
    "SGD",
)  # fmt: skip
"""Optimizers of torch whose step is one of each shard alone."""


class Sharding:
    """Spreads the networks of a training over the processes of a mesh, in place.

    Args:
        net: the student; its parameters become DTensors, which the optimizer then holds.
        objective: its teacher is spread alike.
        optimizer: of the student, without state.
        parallel: "fsdp", or a mesh: of one dimension to shard over, or of two, where the first is
            of replicas.
        processes: all that train.

    Attributes:
        mesh: of the processes.
        objective: description of the objective, of when the teacher was whole.

    Raises:
        ValueError: what cannot be sharded, by name; see `check`.
        Disagreement: the processes have different weights.
    """

    def __init__(
        self,
        net: nn.Module,
        objective: Objective,
        optimizer: Optimizer,
        parallel: Parallel,
        processes: Processes,
    ) -> None:
        check(net, objective, optimizer)
        self._device = next(net.parameters()).device
        self.mesh = _mesh(parallel, processes.count, self._device)
        processes.agree(lambda: {"weights": digest(net.state_dict())})
        self.objective: Any = describe(objective)
        self._hollow = _hollow(net)
        self._frozen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        whole = dict(net.named_parameters())
        # of a block, FSDP2 stands in the way of forward derivatives (pytorch issue 182641)
        self._spread(net, trained=True, blocks=not getattr(objective, "derives", False))
        spread = dict(net.named_parameters())
        now = {id(whole[name]): spread[name] for name in whole}
        for group in optimizer.param_groups:
            group["params"] = [now[id(p)] for p in group["params"]]
        teacher = getattr(objective, "teacher", None)
        if isinstance(teacher, nn.Module):
            self._spread(teacher, trained=False)
        # of outputs that are changed in place, which nobody here does
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")

    def copied(self, net: nn.Module) -> nn.Module:
        """Another sharded network like the student, frozen, with its weights in full precision."""
        twin = copy.deepcopy(self._hollow)
        self._spread(twin, trained=False)
        buffers = {name: buffer.clone() for name, buffer in twin.named_buffers()}
        twin.to_empty(device=self._device)
        with torch.no_grad():
            for name, buffer in twin.named_buffers():
                buffer.copy_(buffers[name])
            reshard(net)
            for ours, theirs in zip(net.parameters(), twin.parameters()):
                local(theirs).copy_(local(ours))
        return twin

    def forget(self) -> None:
        """Let go of what FSDP2 notes of each forward pass until a backward one.

        Networks that are frozen have none, and the notes would grow with the steps.
        """
        for network in self._frozen:
            for part in network.modules():
                if not isinstance(part, _fsdp().FSDPModule):
                    continue
                group = getattr(part._get_fsdp_state(), "_fsdp_param_group", None)
                for notes in (
                    getattr(group, "_post_forward_indices", None),
                    getattr(getattr(group, "comm_ctx", None), "post_forward_order", None),
                ):
                    if isinstance(notes, list):
                        notes.clear()

    def _spread(self, net: nn.Module, *, trained: bool, blocks: bool = True) -> None:
        """Blocks whose parameters are theirs alone, then the rest.

        What a trained network gathers for its root is kept until its backward pass. A frozen one
        lets go of it at once, and gathers the weights of today at its next call.
        """
        places = _places(net)
        for block in repeated_blocks(net) if blocks else ():
            own = _places(block)
            if own and all(places[parameter] == count for parameter, count in own.items()):
                _fsdp().fully_shard(block, mesh=self.mesh, reshard_after_forward=True)
        if trained:
            _fsdp().fully_shard(net, mesh=self.mesh)
        else:
            _fsdp().fully_shard(net, mesh=self.mesh, reshard_after_forward=True)
            self._frozen.add(net)


def sharding(
    net: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    parallel: Parallel | None,
    processes: Processes,
) -> Sharding | None:
    """The `Sharding` that `parallel` asks for; None for none."""
    if parallel is None or not shards(parallel):
        return None
    return Sharding(net, objective, optimizer, parallel, processes)


def _places(net: nn.Module) -> Counter[int]:
    """In how many places of a network each parameter is, by id."""
    return Counter(id(p) for _, p in net.named_parameters(remove_duplicate=False))


def _fsdp() -> Any:
    """Half a second of imports, for those who shard."""
    from torch.distributed import fsdp

    return fsdp


def _mesh(parallel: Parallel, count: int, device: torch.device) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    if isinstance(parallel, str):
        return init_device_mesh(device.type, (count,))
    if parallel.ndim not in (1, 2):
        raise ValueError(
            "parallel must be a mesh of 1 dimension, to shard over, or of 2, replicas and shards, "
            f"got one of {parallel.ndim}: {parallel}"
        )
    if parallel.ndim == 2 and parallel.mesh_dim_names is None:
        raise ValueError(
            "a mesh of 2 dimensions needs names: init_device_mesh(..., mesh_dim_names=("
            f'"replicate", "shard")), got {parallel}'
        )
    if parallel.size() != count:
        raise ValueError(
            f"the mesh must hold all {count} processes, which train together, got {parallel}"
        )
    if parallel.device_type != device.type:
        raise ValueError(f"the network is on {device.type}, the mesh is {parallel}")
    return parallel


def _hollow(net: nn.Module) -> nn.Module:
    """A frozen copy without weights, of the dtype of averages; its parameters are on "meta"."""
    double = any(p.dtype == torch.float64 for p in net.parameters())
    dtype = torch.float64 if double else torch.float32
    # deepcopy takes what memo holds: the parameters are never copied
    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for p in net.parameters()
    }
    hollow = copy.deepcopy(net, memo).eval()
    return hollow if all(p.dtype == dtype for p in hollow.parameters()) else hollow.to(dtype)


def check(net: nn.Module, objective: Objective, optimizer: Optimizer) -> None:
    """Raise ValueError unless student, teacher and optimizer can be sharded."""
    _check_network("net", net)
    teacher = getattr(objective, "teacher", None)
    if isinstance(teacher, nn.Module):
        _check_network("the teacher", teacher)
    kind = type(optimizer)
    stock = kind.__module__.startswith("torch.optim.") and kind.__name__ in _ELEMENTWISE
    if not isinstance(optimizer, OneSweep) and not stock:
        raise ValueError(
            f"{kind.__name__} is not known to work on shards: give fastcm.AdamW or RAdam, or of "
            f"torch {', '.join(_ELEMENTWISE)}"
        )
    if optimizer.state:
        raise ValueError(
            "the optimizer has a state already, of parameters that are whole: give a new one, and "
            "continue a run with load()"
        )
    held = {id(p) for p in net.parameters()}
    if any(id(p) not in held for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("the optimizer holds parameters that are not of net, and are not sharded")


def _check_network(what: str, net: nn.Module) -> None:
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
