"""Training as a plain PyTorch loop: the baseline of a step.

What a good engineer writes without this package, from the papers: a loss of
`benchmarks.reference_methods`, torch's AdamW, clipping, and averages of the weights: one to sample
from, and one as target where the method has that.
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

from benchmarks.reference_methods import Method, Networks

Given = tuple[Tensor, Tensor, Tensor, Tensor]
"""Data ``[B, ...]``, noise like it, and times t and s ``[B]``."""


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
        method: its loss.
        variant: see there.
        teacher: distil this frozen network; None trains on the data alone.
        bf16: run the networks under autocast.
        given: data, times and noise of the first steps; later ones are drawn.
        micro_batch: rows of one backward pass, where a whole batch does not fit.
        on_step: called after each step.
    """

    def __init__(
        self,
        net: nn.Module,
        data: Tensor,
        batch_size: int,
        method: Method,
        variant: Variant = Variant(),
        *,
        teacher: nn.Module | None = None,
        bf16: bool = False,
        given: Iterable[Given] = (),
        lr: float = 1e-3,
        max_grad_norm: float = 1.0,
        micro_batch: int | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> None:
        self.net, self.data, self.batch_size = net.train(), data, batch_size
        self.method, self.variant, self.teacher, self.bf16 = method, variant, teacher, bf16
        self.max_grad_norm, self.micro_batch, self.on_step = max_grad_norm, micro_batch, on_step
        self.average = copy.deepcopy(net).requires_grad_(False).eval()
        self.target = None if method.target_decay is None else copy.deepcopy(self.average)
        self.parameters: list[Tensor] = list(net.parameters())
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
        given = self._given.popleft() if self._given else self._draw()
        self.optimizer.zero_grad(set_to_none=True)
        if self.micro_batch is None:
            loss = self._loss(*given)
            loss.backward()
        else:
            loss = torch.zeros((), dtype=self.dtype, device=self.device)
            for piece in zip(*(each.split(self.micro_batch) for each in given)):
                part = self._loss(*piece)
                part.backward()
                loss += part.detach()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm, foreach=True)
        self.optimizer.step()
        self._update_averages()
        self.steps += 1
        return loss.detach(), norm

    def loss(self, x0: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The loss of some rows, divided by those of the whole batch."""
        x0 = x0.to(self.dtype) / 127.5 - 1 if x0.dtype == torch.uint8 else x0.to(self.dtype)
        z, t, s = (each.to(self.dtype) for each in (z, t, s))
        nets = Networks(*(self._cast(each) for each in (self.net, self.target, self.teacher)))
        return self.method.losses(nets, x0, z, t, s).sum() / self.batch_size

    def _cast(self, net: nn.Module | None) -> Any:
        """The network in the precision of the loop."""

        def call(x: Tensor, t: Tensor, **times: Tensor) -> Tensor:
            assert net is not None
            with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
                out: Tensor = net(x, t, **times)
            return out.to(self.dtype)

        return None if net is None else call

    def _draw(self) -> Given:
        if self._position + self.batch_size > len(self._order):
            self._order = torch.randperm(len(self.data), device=self.device)
            self._position = 0
        rows = self._order[self._position : self._position + self.batch_size]
        self._position += self.batch_size
        x0 = self.data[rows]
        t, s = self.method.times(self.batch_size, self.device)
        return x0, torch.randn(x0.shape, device=self.device), t, s

    @torch.no_grad()
    def _update_averages(self) -> None:
        warm = min(0.999, (1 + self.steps) / (10 + self.steps))
        for network, decay in ((self.average, warm), (self.target, self.method.target_decay)):
            if network is None or decay is None:
                continue
            average: list[Tensor] = list(network.parameters())
            if self.variant.foreach_ema:
                torch._foreach_lerp_(average, self.parameters, 1 - decay)
            else:
                for e, p in zip(average, self.parameters):
                    e.mul_(decay).add_(p, alpha=1 - decay)
