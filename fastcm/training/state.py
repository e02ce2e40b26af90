"""What a training changes from step to step: live objects, which a checkpoint restores in place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastcm.rng import NoiseKey
from fastcm.runs.checkpoint import digest, weights_of
from fastcm.runs.frozen import LeftOut
from fastcm.sharding import dtensors
from fastcm.training.data_state import DataState
from fastcm.training.gradients import Gradients
from fastcm.training.update import Update


@dataclass
class State:
    """A training at some step.

    Args:
        net: the student.
        optimizer: over its parameters.
        update: what applies gradients; holds the averages' networks and the counts.
        gradients: what computes them; holds whether they are compiled.
        key: where the noise stands.
        data: where data with an order of its own stands.
        left_out: of the student's parameters, what checkpoints lack.
        step: how many were taken.

    Attributes:
        base_lr: the learning rates that a schedule scales.
    """

    net: nn.Module
    optimizer: Optimizer
    update: Update
    gradients: Gradients
    key: NoiseKey
    data: DataState
    left_out: LeftOut = LeftOut()
    step: int = 0
    base_lr: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.base_lr = [float(group["lr"]) for group in self.optimizer.param_groups]

    @property
    def device(self) -> torch.device:
        return self.key.device

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Every network with weights of its own, by its name in a checkpoint."""
        averages = {f"average_{i}": net for i, net in enumerate(self.update.networks)}
        return {"model": self.net, **averages}

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The live tensors of the same networks, by group and name in a checkpoint."""
        count = len(self.update.averages)
        averages = {f"average_{i}": self.update.weights(i) for i in range(count)}
        return {
            group: {name: w for name, w in held.items() if name not in self.left_out.names}
            for group, held in {"model": weights_of(self.net), **averages}.items()
        }

    def summary(self) -> dict[str, Any]:
        """The step, and a fingerprint of the student's weights if this process has them all."""
        weights = self.net.state_dict()
        if any(map(dtensors.is_dtensor, weights.values())):
            return {"step": self.step}
        return {"step": self.step, "weights": digest(weights)}

    def scale_lr(self, factor: float) -> None:
        """Set the learning rates to `factor` times their base."""
        for group, lr in zip(self.optimizer.param_groups, self.base_lr):
            group["lr"] = lr * factor
