"""What a trainer does with networks that are on the meta device: the student, a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from fastcm.objectives.base import Objective
from fastcm.sharding import Init, is_hollow, materialise


@dataclass(frozen=True)
class Filling:
    """Networks without values, and where these come from.

    Args:
        net: the student.
        teacher: of the objective, or None.
        init, teacher_init: see `fastcm.sharding.Init`; None for a network that has its values.
        device: where they are to be.
        seed: of values that are drawn; the teacher's are drawn from the next one.
    """

    net: nn.Module
    teacher: nn.Module | None
    init: Init | None
    teacher_init: Init | None
    device: torch.device
    seed: int

    @classmethod
    def of(
        cls,
        net: nn.Module,
        objective: Objective,
        init: Init | None,
        teacher_init: Init | None,
        *,
        device: torch.device,
        seed: int,
    ) -> Filling:
        """Of the networks of a training.

        Raises:
            ValueError: one on the meta device without init, or init for one that is not.
        """
        teacher = getattr(objective, "teacher", None)
        teacher = teacher if isinstance(teacher, nn.Module) else None
        for argument, given, network in (
            ("init", init, net),
            ("teacher_init", teacher_init, teacher),
        ):
            hollow = network is not None and is_hollow(network)
            if hollow and given is None:
                raise ValueError(
                    f'the network on the meta device has no values: give {argument}="reset", for '
                    "its modules' own reset_parameters(), a function of a module, or safetensors"
                )
            if given is not None and not hollow:
                raise ValueError(
                    f"{argument} is for a network on the meta device, and this one has its values "
                    f"or is none: leave it out, got {given!r:.80}"
                )
        return cls(net, teacher, init, teacher_init, device, seed)

    @property
    def hollow(self) -> tuple[nn.Module, ...]:
        """The networks that are to be filled."""
        return tuple(network for network, _, _ in self._wanted())

    def fill(self, network: nn.Module) -> None:
        """Give one of them its values, in the shards that it may consist of by now."""
        for mine, init, seed in self._wanted():
            if network is mine:
                materialise(network, init, device=self.device, seed=seed)

    def place(self, optimizer: Optimizer | None, *, as_shards: bool) -> None:
        """Put the student on its device, and fill networks, unless they are to be shards first.

        Args:
            optimizer: holds the new parameters afterwards, if it held the old ones.
            as_shards: what is on the meta device stays there.
        """
        before = dict(self.net.named_parameters())
        for network in () if as_shards else self.hollow:
            self.fill(network)
        if self.net not in self.hollow:
            self.net.to(self.device)
        elif optimizer is not None and not as_shards:
            rebind(optimizer, before, self.net)

    def _wanted(self) -> Iterator[tuple[nn.Module, Init, int]]:
        if self.init is not None:
            yield self.net, self.init, self.seed
        if self.teacher is not None and self.teacher_init is not None:
            yield self.teacher, self.teacher_init, self.seed + 1


def rebind(optimizer: Optimizer, before: dict[str, nn.Parameter], net: nn.Module) -> None:
    """Have an optimizer hold the parameters that a network has now, by their names."""
    after = dict(net.named_parameters())
    now = {id(parameter): after[name] for name, parameter in before.items()}
    for group in optimizer.param_groups:
        group["params"] = [now[id(p)] for p in group["params"]]
