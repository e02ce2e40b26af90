"""Consistency training and distillation as a plain PyTorch loop: the baseline of a step.

What a good engineer writes without this package, from the papers: rectified-flow path
x_t = (1 - t) x0 + t z, a network that predicts the velocity, pseudo-Huber loss weighted by
1 / (t - s), torch's AdamW, clipping, and two averages of the weights: one to sample from, one as
target. Song et al. 2023, algorithms 2 and 3; Song & Dhariwal 2023 for loss and weight.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Given = tuple[Tensor, Tensor, Tensor]
"""Data ``[B, ...]``, grid indices k in 1..n int64 ``[B]``, noise like the data."""


@dataclass(frozen=True)
class Variant:
    """How a loop is carried out.

    Args:
        compile: torch.compile of the loss, its backward included.
        optimizer: torch's implementation of AdamW.
        foreach_ema: one call for each average instead of a loop over the parameters.
    """

    compile: bool = False
    optimizer: Literal["foreach", "fused"] = "foreach"
    foreach_ema: bool = False


class Loop:
    """Trains `net` on tensors that are resident on its device.

    Args:
        net: ``net(x, t) -> F``.
        data: ``[N, ...]``, uint8 for x / 127.5 - 1, or float.
        batch_size: rows a step, at most N.
        variant: see there.
        teacher: distil this frozen network; None trains on the data alone.
        bf16: run the networks under autocast.
        given: data, times and noise of the first steps; later ones are drawn.
        intervals: n of the time grid k / n.
        micro_batch: rows of one backward pass, where a whole batch does not fit.
        on_step: called after each step.
    """

    def __init__(
        self,
        net: nn.Module,
        data: Tensor,
        batch_size: int,
        variant: Variant = Variant(),
        *,
        teacher: nn.Module | None = None,
        bf16: bool = False,
        given: Iterable[Given] = (),
        intervals: int = 40,
        lr: float = 1e-3,
        max_grad_norm: float = 1.0,
        micro_batch: int | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> None:
        self.net, self.data, self.batch_size = net.train(), data, batch_size
        self.variant, self.teacher, self.bf16 = variant, teacher, bf16
        self.intervals, self.max_grad_norm, self.micro_batch = intervals, max_grad_norm, micro_batch
        self.on_step = on_step
        self.target = copy.deepcopy(net).requires_grad_(False).eval()
        self.average = copy.deepcopy(self.target)
        self.parameters: list[Tensor] = list(net.parameters())
        self.averages: list[list[Tensor]] = [
            list(each.parameters()) for each in (self.average, self.target)
        ]
        self.device, self.dtype = self.parameters[0].device, self.parameters[0].dtype
        which: dict[str, Any] = {variant.optimizer: True}
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0, **which)
        self.steps = 0
        self.last_loss = self.last_norm = math.nan
        self._given = deque(given)
        self._order, self._position = torch.empty(0, dtype=torch.int64), 0
        # noise and times are drawn outside: compiled for a CPU, randn goes number by number
        self._loss: Callable[..., Tensor] = (
            torch.compile(self.loss, dynamic=False) if variant.compile else self.loss
        )

    def fit(self, steps: int) -> None:
        """Train `steps` steps, and read the last one's loss and gradient norm."""
        for _ in range(steps):
            loss, norm = self.step()
            if self.on_step is not None:
                self.on_step()
        self.last_loss, self.last_norm = loss.item(), norm.item()

    def step(self) -> tuple[Tensor, Tensor]:
        """One step: loss and the norm of its gradient, on the device."""
        x0, k, z = self._given.popleft() if self._given else self._draw()
        self.optimizer.zero_grad(set_to_none=True)
        if self.micro_batch is None:
            loss = self._loss(x0, k, z)
            loss.backward()
        else:
            loss = torch.zeros((), dtype=self.dtype, device=self.device)
            for piece in zip(*(each.split(self.micro_batch) for each in (x0, k, z))):
                part = self._loss(*piece)
                part.backward()
                loss += part.detach()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm, foreach=True)
        self.optimizer.step()
        self._update_averages()
        self.steps += 1
        return loss.detach(), norm

    def loss(self, x0: Tensor, k: Tensor, z: Tensor) -> Tensor:
        """The loss of some rows, divided by those of the whole batch."""
        x0 = x0.to(self.dtype) / 127.5 - 1 if x0.dtype == torch.uint8 else x0.to(self.dtype)
        z = z.to(self.dtype)
        t, s = k.to(self.dtype) / self.intervals, (k - 1).to(self.dtype) / self.intervals
        t_, s_ = (time.view(-1, *[1] * (x0.dim() - 1)) for time in (t, s))
        x_t = (1 - t_) * x0 + t_ * z
        with torch.no_grad():
            if self.teacher is None:
                x_s = (1 - s_) * x0 + s_ * z
            else:
                x_s = x_t - (t_ - s_) * self._call(self.teacher, x_t, t)
            target = x_s - s_ * self._call(self.target, x_s, s)
        denoised = x_t - t_ * self._call(self.net, x_t, t)
        c = 0.00054 * math.sqrt(x0[0].numel())
        squared = (denoised - target).square().flatten(1).sum(1)
        losses = ((squared + c * c).sqrt() - c) / (t - s)
        return losses.sum() / self.batch_size

    def _call(self, net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            out: Tensor = net(x, t)
        return out.to(self.dtype)

    def _draw(self) -> Given:
        if self._position + self.batch_size > len(self._order):
            self._order = torch.randperm(len(self.data), device=self.device)
            self._position = 0
        rows = self._order[self._position : self._position + self.batch_size]
        self._position += self.batch_size
        x0 = self.data[rows]
        k = torch.randint(1, self.intervals + 1, (self.batch_size,), device=self.device)
        return x0, k, torch.randn(x0.shape, device=self.device)

    @torch.no_grad()
    def _update_averages(self) -> None:
        warm = min(0.999, (1 + self.steps) / (10 + self.steps))
        for average, decay in zip(self.averages, (warm, 0.9)):
            if self.variant.foreach_ema:
                torch._foreach_lerp_(average, self.parameters, 1 - decay)
            else:
                for e, p in zip(average, self.parameters):
                    e.mul_(decay).add_(p, alpha=1 - decay)
