"""One training step: draw, noise, networks, gradients, sweep; nothing comes back to the host.

On a GPU the whole step is one CUDA graph. What changes between steps is on the device: the key
that noise, times and rows follow from, learning rates and decays in the tables of the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastcm import graphs
from fastcm.data import DeviceData, Source
from fastcm.data.sources import draw_rows
from fastcm.graphs import Graphed, Side
from fastcm.networks.conditions import each, layout
from fastcm.optim.one_sweep import OneSweep
from fastcm.rng import NoiseKey
from fastcm.tracing import part
from fastcm.training.gradients import Gradients
from fastcm.training.processes import lost_peers
from fastcm.training.update import Update

Graph = Literal["auto", "step", "off"]


class Step:
    """Takes the steps of a run.

    Args:
        source: where batches come from; `DeviceData` is drawn from on the device.
        batch_size: rows a step, of all processes.
        gradients: of a batch.
        optimizer, update: what applies them.
        key: where the noise stands; advanced by every step.
        rows: of the batch, those of this process; None for all.
        graph: "step" captures the whole step in a CUDA graph, "auto" does if that is faster,
            "off" does not. Only a GPU and an optimizer of this package can, and of several
            processes all or none, whose gradients travel by NCCL within the graph.
        log: receives one line about what "auto" chose.

    Raises:
        ValueError: graph="step" where it cannot be.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        gradients: Gradients,
        optimizer: Optimizer,
        update: Update,
        key: NoiseKey,
        *,
        rows: range | None = None,
        graph: Graph = "auto",
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        if graph not in ("auto", "step", "off"):
            raise ValueError(f"graph must be 'auto', 'step' or 'off', got {graph!r}")
        self.source = source
        self.batch_size = batch_size
        self.rows = range(batch_size) if rows is None else rows
        self.gradients = gradients
        self.update = update
        self.key = key
        self.shape: torch.Size | None = None
        self._optimizer = optimizer
        self._static: tuple[Tensor, Any] | None = None
        self._remaining = 1
        self._graphed: Graphed | None = None
        obstacle = self._obstacle()
        if graph == "step" and obstacle:
            raise ValueError(f"graph='step' is not possible: {obstacle}")
        if graph != "off" and not obstacle:
            self._side = Side(key.device)
            self._graphed = Graphed(
                self._work,
                self._side,
                moved=self._moved,
                obstacle=self._without_gradient,
                release=partial(optimizer.zero_grad, set_to_none=True),
                agree=gradients.processes.first_reason,
                must=graph == "step",
                log=log,
            )

    def _obstacle(self) -> str | None:
        """Why this step cannot be a CUDA graph."""
        if not graphs.available(self.key.device):
            return f"the run is on {self.key.device.type}, a CUDA graph needs a GPU"
        if not isinstance(self._optimizer, OneSweep):
            return (
                f"{type(self._optimizer).__name__} keeps its scalars on the host: use fastcm.AdamW"
            )
        if self.gradients.spread is not None:
            return "shards of the networks are gathered and freed within the step"
        carrier = self.gradients.processes.carrier(self.key.device)
        if carrier not in (None, "nccl"):
            return f"gradients travel by {carrier}, and a CUDA graph holds those of nccl alone"
        if self.gradients.masks_are_shared:
            return "student and target share dropout masks, which a graph would draw anew"
        return None

    def _moved(self) -> bool:
        """Whether a captured step is void, in one of the processes at least.

        What changed on the host is sent to the device.
        """
        self.gradients.refresh()
        assert isinstance(self._optimizer, OneSweep)
        return self.gradients.processes.any(self._optimizer.prepare())

    def _without_gradient(self) -> str | None:
        """Asked after some steps, before one is captured."""
        parameters = self.gradients.net.named_parameters()
        idle = [name for name, p in parameters if p.requires_grad and p.grad is None]
        if not idle:
            return None
        return f"no gradient reaches {', '.join(idle[:5])}, which a graph would never update"

    def __call__(self, step: int, *, remaining: int = 1) -> Tensor:
        """Take step number `step`; returns its loss, a 0-d device tensor that the next overwrites.

        Args:
            remaining: how many steps the run still has; decides whether compiling can pay.
        """
        self._remaining = remaining
        if self._graphed is None:
            with part("data"):
                self._feed(step, static=False)
            return self._work()
        with self._side():
            with part("data"):
                self._feed(step, static=True)
            return self._graphed()

    def _feed(self, step: int, *, static: bool) -> None:
        """Have the batch ready on the device, at fixed addresses if it is for a graph."""
        if isinstance(self.source, DeviceData):
            self.source.prepare(step * self.batch_size + self.rows.start, len(self.rows))
            return
        x0, cond = draw_rows(self.source, step, self.batch_size, self.rows)
        if not static:
            self._static = (x0, cond)
            return
        if self._static is None:  # copies: a source may hand out what it goes on holding
            self._static = (x0.clone(), None if cond is None else each(Tensor.clone, cond))
            return
        held, held_cond = self._static
        now, before = ([layout(x, "x"), layout(c)] for x, c in ((x0, cond), self._static))
        if now != before or len(x0) != len(held):
            raise ValueError(
                f"step {step} has {len(x0)} rows of {now}, those before {len(held)} of {before}: "
                "a captured step needs the same of every batch"
            )
        held.copy_(x0, non_blocking=True)
        if cond is not None:
            each(lambda old, new: old.copy_(new, non_blocking=True), held_cond, cond)

    def _work(self) -> Tensor:
        if isinstance(self.source, DeviceData):
            with part("data"):
                position = self.key.step * self.batch_size + self.rows.start
                x0, cond = self.source.gather(position, len(self.rows))
        else:
            assert self._static is not None
            x0, cond = self._static
        self.shape = x0.shape[2 if self.gradients.paired else 1 :]
        self._optimizer.zero_grad(set_to_none=True)
        loss = self.gradients(x0, cond, self.key, remaining=self._remaining)
        with part("sweep"), lost_peers():
            self.update.step()
        self.key.advance_()
        return loss
