"""Networks of which every process holds a part (FSDP2): the student, its averages, a teacher.

They are sharded block by block (`fastcm.sharding.spread`), or as a whole where the objective takes
derivatives through them. The optimizer's state follows the shards of the parameters, and so do the
averages in it. The network of an average has shards of its own, copied from there after a step.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastcm.objectives.base import Objective
from fastcm.optim.one_sweep import OneSweep
from fastcm.runs.checkpoint import digest
from fastcm.runs.description import describe
from fastcm.sharding.dtensors import local, reshard
from fastcm.sharding.spread import check_network, forget, spread
from fastcm.training.filling import Filling, rebind
from fastcm.training.parallel import Parallel, shards
from fastcm.training.processes import Processes

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
        filling: of networks on the meta device, which get their values as shards.

    Attributes:
        mesh: of the processes.
        objective: description of the objective, by the weights of the whole teacher.

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
        filling: Filling,
    ) -> None:
        check(net, objective, optimizer)
        self._device = filling.device
        self.mesh = mesh_of(parallel, processes.count, self._device)
        if net not in filling.hollow:
            processes.agree(lambda: {"weights": digest(net.state_dict())})
        self._hollow = _hollow(net)
        self._frozen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        whole, teacher = dict(net.named_parameters()), filling.teacher
        if teacher not in filling.hollow:
            self.objective: Any = describe(objective)
        # of a block, FSDP2 stands in the way of forward derivatives (pytorch issue 182641)
        self._spread(net, trained=True, blocks=not getattr(objective, "derives", False))
        filling.fill(net)
        _copy_buffers(net, self._hollow)
        rebind(optimizer, whole, net)
        if teacher is not None:
            self._spread(teacher, trained=False)
            filling.fill(teacher)
        if teacher in filling.hollow:
            self.objective = describe(objective)
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
        """Let go of what FSDP2 notes of frozen networks; see `fastcm.sharding.spread.forget`."""
        for network in self._frozen:
            forget(network)

    def _spread(self, net: nn.Module, *, trained: bool, blocks: bool = True) -> None:
        spread(net, self.mesh, trained=trained, blocks=blocks)
        if not trained:
            self._frozen.add(net)


def sharding(
    net: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    parallel: Parallel | None,
    processes: Processes,
    filling: Filling,
) -> Sharding | None:
    """The `Sharding` that `parallel` asks for; None for none."""
    if not shards(parallel):
        return None
    return Sharding(net, objective, optimizer, parallel, processes, filling)


def mesh_of(parallel: Parallel, count: int, device: torch.device) -> DeviceMesh:
    """The mesh over which networks are sharded: of all processes, or the one that was given.

    Raises:
        ValueError: it is of other dimensions, processes or another kind of device.
    """
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


def _copy_buffers(net: nn.Module, hollow: nn.Module) -> None:
    """Those of a network that has its values now into a copy from before."""
    for module, copied in zip(net.modules(), hollow.modules()):
        for name, buffer in module._buffers.items():
            old = copied._buffers[name]
            if buffer is not None and old is not None:
                copied._buffers[name] = buffer.detach().clone().to(old.dtype)


def check(net: nn.Module, objective: Objective, optimizer: Optimizer) -> None:
    """Raise ValueError unless student, teacher and optimizer can be sharded."""
    check_network("net", net)
    teacher = getattr(objective, "teacher", None)
    if isinstance(teacher, nn.Module):
        check_network("the teacher", teacher)
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
