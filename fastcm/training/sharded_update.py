"""The half of a step after the gradients, where every process holds a part of the weights."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastcm.ema import Average
from fastcm.optim.one_sweep import OneSweep
from fastcm.sharding import dtensors
from fastcm.training.sharded import Sharding
from fastcm.training.update import Stock, Sweep, Update


class ShardedSweep(Sweep):
    """By an optimizer of this package, whose flat state holds the shards of the averages.

    The network of an average is made when it is asked for, and kept as long as somebody holds it:
    its shards are padded as FSDP2 gathers them, which those of the flat state are not, and are
    copied from there after every step.

    Args:
        net: the student, sharded.
        optimizer: of its parameters.
        averages, max_grad_norm: see `Trainer`.
        spread: what made shards of it.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OneSweep,
        averages: Sequence[Average],
        max_grad_norm: float | None,
        spread: Sharding,
    ) -> None:
        self._net, self._networks = net, _Networks(net, optimizer, spread)
        super().__init__(net, optimizer, averages, max_grad_norm, self._networks)
        optimizer.prepare()  # the state of the shards, which averages are part of

    def step(self) -> None:
        super().step()
        self._networks.refresh()

    def weights(self, i: int) -> dict[str, Tensor]:
        whole = self._net.state_dict()
        return {**whole, **self._averaged(i)}

    def load_weights(self, i: int, weights: Mapping[str, Tensor]) -> None:
        for name, average in self._averaged(i).items():
            dtensors.local(average).copy_(dtensors.local(weights[name]))
        self._networks.refresh()

    def _averaged(self, i: int) -> dict[str, Tensor]:
        """Those of the average that the optimizer keeps, by the names of the network."""
        dtensors.reshard(self._net)
        named = self._net.named_parameters(remove_duplicate=False)
        state = self._optimizer.state
        return {name: state[p][f"ema_{i}"] for name, p in named if p in state}


class _Networks(Sequence[nn.Module]):
    """The networks of the averages, those that somebody holds."""

    def __init__(self, net: nn.Module, optimizer: OneSweep, spread: Sharding) -> None:
        self._net, self._optimizer, self._spread = net, optimizer, spread
        self._made: dict[int, weakref.ref[nn.Module]] = {}
        self._parameters: dict[int, list[tuple[nn.Parameter, nn.Parameter]]] = {}

    def __len__(self) -> int:
        return len(self._optimizer.averages)

    @overload
    def __getitem__(self, i: int) -> nn.Module: ...
    @overload
    def __getitem__(self, i: slice) -> list[nn.Module]: ...
    def __getitem__(self, i: int | slice) -> nn.Module | list[nn.Module]:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        i = range(len(self))[i]
        network = self._made[i]() if i in self._made else None
        if network is None:
            network = self._spread.copied(self._net)
            pairs = zip(self._net.parameters(), network.parameters())
            self._parameters[i] = [(p, q) for p, q in pairs if p in self._optimizer.state]
            self._made[i] = weakref.ref(network)
            self.refresh()
        return network

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the averages of now, and the buffers of the student."""
        for i, reference in list(self._made.items()):
            network = reference()
            if network is None:
                del self._made[i], self._parameters[i]
                continue
            state, pairs = self._optimizer.state, self._parameters[i]
            averages = [dtensors.local(state[p][f"ema_{i}"]) for p, _ in pairs]
            torch._foreach_copy_([dtensors.local(q) for _, q in pairs], averages)
            for theirs, ours in zip(network.buffers(), self._net.buffers()):
                theirs.copy_(ours)


def update(
    net: nn.Module,
    optimizer: Optimizer,
    averages: Sequence[Average],
    max_grad_norm: float | None,
    spread: Sharding | None = None,
) -> Update:
    """The update that suits an optimizer, and shards if there are any."""
    if not isinstance(optimizer, OneSweep):
        copied = None if spread is None else spread.copied
        return Stock(net, optimizer, averages, max_grad_norm, copied)
    if spread is None:
        return Sweep(net, optimizer, averages, max_grad_norm)
    return ShardedSweep(net, optimizer, averages, max_grad_norm, spread)
