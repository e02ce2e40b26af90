"""The losses of the methods in plain PyTorch, as the papers and their public code have them.

Rectified-flow path x_t = (1 - t) x0 + t z, a network that predicts the velocity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Call = Callable[..., Tensor]
"""A network, ``net(x, t) -> F``."""
Times = tuple[Tensor, Tensor]
"""t > s, or t = s; ``[B]``."""


@dataclass(frozen=True)
class Networks:
    """The student, the average that serves as target, a frozen teacher; None for none."""

    net: Call
    target: Call | None = None
    teacher: Call | None = None


class Method(Protocol):
    """A loss.

    Attributes:
        target_decay: of the average that serves as target; None: there is none.
    """

    target_decay: float | None

    def times(self, count: int, device: torch.device) -> Times:
        """Of a batch, float32."""
        ...

    def losses(self, nets: Networks, x0: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Of each row, ``[B]``."""
        ...


def lift(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *[1] * (x.dim() - 1))


def state(x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    t = lift(t, x0)
    return (1 - t) * x0 + t * z


def denoised(net: Call, x: Tensor, t: Tensor) -> Tensor:
    return x - lift(t, x) * net(x, t)


def squares(difference: Tensor) -> Tensor:
    return difference.square().flatten(1).sum(1)


@dataclass(frozen=True)
class Consistency:
    """CT, and with a teacher CD: pseudo-Huber loss between neighbours of a grid.

    Song et al. 2023, algorithms 2 and 3; Song & Dhariwal 2023 for loss and weight.
    """

    intervals: int = 40
    target_decay: float | None = 0.9

    def times(self, count: int, device: torch.device) -> Times:
        k = torch.randint(1, self.intervals + 1, (count,), device=device)
        return k / self.intervals, (k - 1) / self.intervals

    def losses(self, nets: Networks, x0: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        assert nets.target is not None
        x_t = state(x0, z, t)
        with torch.no_grad():
            if nets.teacher is None:
                x_s = state(x0, z, s)
            else:
                x_s = x_t - lift(t - s, x_t) * nets.teacher(x_t, t)
            target = denoised(nets.target, x_s, s)
        c = 0.00054 * math.sqrt(x0[0].numel())
        distance = (squares(denoised(nets.net, x_t, t) - target) + c * c).sqrt() - c
        return distance / (t - s)


@dataclass(frozen=True)
class Easy:
    """ECT in its first stage: the student is its own target, at a noise level below.

    Geng et al. 2024, section 3 and its public code; q = 2, k = 8, b = 1.
    """

    target_decay: float | None = None

    def times(self, count: int, device: torch.device) -> Times:
        level = (2.0 * torch.randn(count, device=device) - 1.1).exp()
        below = (level * (1 - (1 + 8 * torch.sigmoid(-level)) / 2)).clamp(min=0)
        return level / (1 + level), below / (1 + below)

    def losses(self, nets: Networks, x0: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        with torch.no_grad():
            target = denoised(nets.net, state(x0, z, s), s)
        return squares(denoised(nets.net, state(x0, z, t), t) - target).sqrt() / (t - s)


@dataclass(frozen=True)
class Flow:
    """Rectified flow: the squared error of the velocity. Liu et al. 2022; Esser et al. 2024."""

    target_decay: float | None = None

    def times(self, count: int, device: torch.device) -> Times:
        t = torch.sigmoid(torch.randn(count, device=device))
        return t, t

    def losses(self, nets: Networks, x0: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return squares(nets.net(state(x0, z, t), t) - (z - x0))


@dataclass(frozen=True)
class Mean:
    """MeanFlow, three of four rows with s = t, all of them through torch.func.jvp.

    Geng et al. 2025, algorithm 1, and its public PyTorch code. Forward derivatives need attention
    written out.
    """

    target_decay: float | None = None

    def times(self, count: int, device: torch.device) -> Times:
        t, s = torch.sigmoid(torch.randn(2, count, device=device) - 0.4).sort(0, descending=True)[0]
        return t, torch.where(torch.arange(count, device=device) % 4 < 3, t, s)

    def losses(self, nets: Networks, x0: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        v = z - x0
        tangents = (v, torch.ones_like(t), torch.zeros_like(s))
        with sdpa_kernel(SDPBackend.MATH):
            u, slope = torch.func.jvp(
                lambda x, t, s: nets.net(x, t, s=s), (state(x0, z, t), t, s), tangents
            )
        target = v - lift(t - s, v) * slope
        squared = squares(u - target.detach())
        return squared / (squared.detach() + 0.01)
