"""The half of a step after the gradients: clip, optimizer, averages."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastcm import ema
from fastcm.ema import EMA, Average
from fastcm.objectives.base import Objective
from fastcm.optim.one_sweep import OneSweep
from fastcm.runs.checkpoint import load_weights, weights_of
from fastcm.sharding import dtensors
from fastcm.tracing import part


class Update(ABC):
    """Applies gradients, unless their norm is not finite.

    Attributes:
        averages: of the weights.
        networks: one for each average, live; made when asked for where they are sharded.
        max_grad_norm: of the clipping; None for none.
    """

    averages: tuple[Average, ...]
    networks: Sequence[nn.Module]
    max_grad_norm: float | None

    @property
    @abstractmethod
    def grad_norm(self) -> Tensor:
        """Before clipping, a 0-d device tensor; the next step overwrites it."""

    @property
    @abstractmethod
    def counts(self) -> Tensor:
        """int64 ``[3]`` on the device: steps attempted, skipped, skipped in a row."""

    @abstractmethod
    def step(self) -> None:
        """One update of parameters and averages."""

    def weights(self, i: int) -> dict[str, Tensor]:
        """The i-th average by the names of the network: live tensors, to be saved."""
        return weights_of(self.networks[i])

    def load_weights(self, i: int, weights: Mapping[str, Tensor]) -> None:
        """Set the i-th average, in place."""
        load_weights(self.networks[i], weights)

    def network_of(self, average: Average | None) -> nn.Module | None:
        """The network with this average of the weights; None for none."""
        return None if average is None else self.networks[self.averages.index(average)]


class Sweep(Update):
    """By an optimizer of this package: one pass for everything.

    Args:
        net: the student.
        optimizer: of its parameters; given the averages that it lacks, and a norm if it has none.
        averages, max_grad_norm: see `Trainer`.
        networks: of the averages; None has the optimizer make them.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OneSweep,
        averages: Sequence[Average],
        max_grad_norm: float | None,
        networks: Sequence[nn.Module] | None = None,
    ) -> None:
        for average in averages:
            if average not in optimizer.averages:
                optimizer.add_ema(average)
        if optimizer.max_grad_norm is None:
            optimizer.max_grad_norm = math.inf if max_grad_norm is None else max_grad_norm
        self.max_grad_norm = optimizer.max_grad_norm
        self.averages = optimizer.averages
        if networks is None:
            networks = [optimizer.ema_module(i, net) for i in range(len(self.averages))]
        self.networks = networks
        self._optimizer = optimizer

    @property
    def grad_norm(self) -> Tensor:
        return self._optimizer.grad_norm

    @property
    def counts(self) -> Tensor:
        return self._optimizer.counts

    def step(self) -> None:
        self._optimizer.step()


class Stock(Update):
    """By any other optimizer: clipping and averages around its step.

    Args:
        net: the student, perhaps sharded.
        optimizer: of its parameters.
        averages, max_grad_norm: see `Trainer`.
        copied: makes the network of an average, which holds the weights of `net`.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Optimizer,
        averages: Sequence[Average],
        max_grad_norm: float | None,
        copied: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        self.averages = tuple(averages)
        self.networks = [(copied or _average_of)(net) for _ in self.averages]
        self.max_grad_norm = max_grad_norm
        self._net = net
        self._parameters = list(net.parameters())
        self._optimizer = optimizer
        device = self._parameters[0].device
        self._norm = torch.full((), math.nan, dtype=torch.float32, device=device)
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)

    @property
    def grad_norm(self) -> Tensor:
        return self._norm

    @property
    def counts(self) -> Tensor:
        return self._counts

    @torch.no_grad()
    def step(self) -> None:
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        parameters = [p for p in self._parameters if p.requires_grad]
        with part("norm"):
            self._norm = dtensors.whole(nn.utils.clip_grad_norm_(parameters, limit))
        finite = torch.isfinite(self._norm)
        self._apply(finite)
        for average, network in zip(self.averages, self.networks):
            decay = average.decay(self._counts[0])
            keep = torch.where(finite, decay, torch.ones_like(decay))
            pairs = zip(network.parameters(), self._parameters)
            own = [(theirs, ours) for theirs, ours in pairs if theirs is not ours]
            mine = [dtensors.local(p) for _, p in own]
            ema.update_([dtensors.local(p) for p, _ in own], mine, keep)
            for theirs, ours in zip(network.buffers(), self._net.buffers()):
                theirs.copy_(ours)
        self._counts[0] += 1
        self._counts[1:] += ~finite
        self._counts[2] *= ~finite

    def _apply(self, finite: Tensor) -> None:
        sharded = any(map(dtensors.is_dtensor, self._parameters))
        if getattr(self._optimizer, "_step_supports_amp_scaling", False) and not sharded:
            # fused optimizers take the flag on the device
            self._optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self._optimizer.grad_scale = None  # type: ignore[attr-defined]
            self._optimizer.step()
        elif finite:  # others cannot: this waits for the device
            self._optimizer.step()


def with_target(
    averages: Sequence[Average] | None, optimizer: Optimizer, objective: Objective
) -> tuple[Average, ...]:
    """The averages asked for, else the optimizer's or a default; and that of the target.

    Raises:
        TypeError: they are none.
    """
    if averages is None:
        averages = getattr(optimizer, "averages", ()) or (EMA(0.999, warmup=True),)
    if not isinstance(averages, Sequence) or not all(hasattr(a, "decay") for a in averages):
        raise TypeError(
            f"averages must be a sequence such as (fastcm.EMA(0.999),), got {averages!r:.80}"
        )
    target = objective.target_average
    return tuple(averages) if target is None or target in averages else (*averages, target)


def _average_of(net: nn.Module) -> nn.Module:
    """A copy in float32; what is frozen is shared, unless others have to be cast."""
    memo: dict[int, object] = {}
    if all(p.dtype == torch.float32 for p in net.parameters() if p.requires_grad):
        memo = {id(p): p for p in net.parameters() if not p.requires_grad}
    average = copy.deepcopy(net, memo).requires_grad_(False).eval()
    if not memo:
        for parameter in average.parameters():
            parameter.data = parameter.data.float()
    return average
