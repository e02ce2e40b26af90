"""The training loop: step, averages, metrics, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastcm import checkpoint
from fastcm.data import DeviceData, as_source
from fastcm.description import describe
from fastcm.ema import EMA, Average
from fastcm.objectives.base import Objective
from fastcm.optim import AdamW
from fastcm.rng import NoiseKey
from fastcm.schedules import intervals
from fastcm.training.checkpoint import read, write
from fastcm.training.gradients import Compile, Gradients, Precision
from fastcm.training.logging import MetricsFile, Progress, Rate, Reading, peak_memory
from fastcm.training.lr import Schedule, constant
from fastcm.training.step import Graph, Step
from fastcm.training.update import update

Callback = Callable[["Trainer", str], None]

NON_FINITE_LIMIT = 20


class NonFiniteError(RuntimeError):
    """The loss or its gradient was not finite for many steps in a row."""


class Trainer:
    """Trains a network by an objective.

    Args:
        net: ``net(x, t, cond=None) -> F`` with F like x ``[B, ...]`` and t ``[B]`` float32.
        objective: `FlowMatching`, `ConsistencyTraining`, `ConsistencyDistillation`, or your own.
        optimizer: over the parameters of `net`; default `fastcm.AdamW`, lr 1e-3. Its learning
            rates are the base that `lr_schedule` scales.
        data: a tensor ``[N, ...]`` (uint8 images or float), (tensor, labels), a `Dataset`, a path,
            or any iterable of batches.
        batch_size: rows a step.
        seed: of noise, times and the order of the data.
        averages: of the weights, kept in float32; `ema_network(i)` is the i-th. Default those of
            the optimizer, or EMA(0.999, warmup=True). The objective's target average is added if
            it is not among them.
        lr_schedule: factor on the learning rates as a function of the step.
        max_grad_norm: clip the gradient's norm; None does not. An optimizer of this package that
            has one of its own keeps it.
        precision: "fp32" or "bf16", see `Gradients`.
        compile: "auto", "regional", True or False, see `Gradients`.
        graph: "auto", "step" or "off", see `Step`.
        accumulate: micro-batches that each batch is cut into, to save memory.
        device: default that of the network.
        directory: of the run: checkpoints and metrics.jsonl. None keeps nothing.
        save_every: steps between checkpoints; 0: only at the end of `fit`.
        keep: how many checkpoints to keep.
        log_every: steps between metrics.
        progress: show a bar where there is a terminal.
        callbacks: called as callback(trainer, event), event "step", "log" or "save".
        log: receives lines of text; default standard error.

    Raises:
        ValueError, TypeError: an argument out of range, data that is empty or of the wrong form.
    """

    def __init__(
        self,
        net: nn.Module,
        objective: Objective,
        optimizer: Optimizer | None = None,
        *,
        data: object,
        batch_size: int = 256,
        seed: int = 0,
        averages: Sequence[Average] | None = None,
        lr_schedule: Schedule = constant,
        max_grad_norm: float | None = 1.0,
        precision: Precision = "fp32",
        compile: Compile = "auto",
        graph: Graph = "auto",
        accumulate: int = 1,
        device: torch.device | str | None = None,
        directory: str | Path | None = None,
        save_every: int = 0,
        keep: int = 3,
        log_every: int = 50,
        progress: bool = True,
        callbacks: Sequence[Callback] = (),
        log: Callable[[str], None] | None = None,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("save_every", save_every, 0),
            ("keep", keep, 1),
            ("log_every", log_every, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be > 0 or None, got {max_grad_norm}")
        parameter = next(net.parameters(), None)
        if parameter is None:
            raise ValueError("net has no parameters to train")
        self.device = parameter.device if device is None else torch.device(device)
        self.net = net.to(self.device)
        self.objective = objective
        teacher = getattr(objective, "teacher", None)
        if isinstance(teacher, nn.Module):
            teacher.to(self.device)
            if {id(p) for p in teacher.parameters()} & {id(p) for p in net.parameters()}:
                raise ValueError(
                    "the teacher shares parameters with net, and would be trained along: "
                    "give it a copy, copy.deepcopy(net)"
                )
        self.batch_size = batch_size
        self.seed = seed
        self.source = as_source(data, seed=seed, device=self.device)
        _check_classes(net, self.source, objective)
        self.key = NoiseKey(seed, device=self.device)
        self.directory = None if directory is None else Path(directory)
        self.save_every, self.keep, self.log_every = save_every, keep, log_every
        self.callbacks = tuple(callbacks)
        self.step = 0
        self.metrics: dict[str, Any] = {}
        self._parameters = [p for p in self.net.parameters() if p.requires_grad]
        if not self._parameters:
            raise ValueError(
                "net has no parameter that requires a gradient (a trainer's average has none): "
                "call net.requires_grad_(True) first"
            )
        if optimizer is None:
            optimizer = AdamW(self._parameters, lr=1e-3, weight_decay=0.0)
        self.optimizer = optimizer
        self.base_lr = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._lr_schedule = lr_schedule
        if averages is None:
            averages = getattr(optimizer, "averages", ()) or (EMA(0.999, warmup=True),)
        wanted: tuple[Average, ...] = tuple(averages)
        target = objective.target_average
        if target is not None and target not in wanted:
            wanted = (*wanted, target)
        self.update = update(self.net, optimizer, wanted, max_grad_norm)
        self.averages, self.networks = self.update.averages, self.update.networks
        target_net = None if target is None else self.networks[self.averages.index(target)]
        self._progress: Progress | None = None
        self._show, self._log_line = progress, log
        self.gradients = Gradients(
            self.net,
            objective,
            target_net,
            precision=precision,
            compile=compile,
            accumulate=accumulate,
            log=self.log,
        )
        if batch_size % accumulate:
            raise ValueError(
                f"batch_size {batch_size} is not a multiple of accumulate {accumulate}"
            )
        self.stepper = Step(
            self.source,
            batch_size,
            self.gradients,
            optimizer,
            self.update,
            self.key,
            graph=graph,
            log=self.log,
        )
        self._metrics_file = MetricsFile(self.directory and self.directory / "metrics.jsonl")
        self._reading: Reading | None = None
        self._config: dict[str, Any] | None = None
        null = getattr(objective, "null_condition", None)
        self.metadata: dict[str, Any] = {
            "network": getattr(net, "description", None),
            "parameterization": describe(objective.parameterization),
            "null_condition": null if isinstance(null, int) else None,
            "shape": None,
        }

    def ema_network(self, i: int = 0) -> nn.Module:
        """The network with the i-th average of the weights; live, updated in place."""
        return self.networks[i]

    def log(self, line: str) -> None:
        """One line of text for the person who watches."""
        if self._log_line is not None:
            self._log_line(line)
        else:
            (self._progress or Progress("", 0, show=False)).print(line)

    def fit(self, steps: int) -> Trainer:
        """Train `steps` more steps; saves at the end if there is a run directory.

        Raises:
            FileExistsError: the directory holds another run; `load` continues it.
            NonFiniteError: the gradient was not finite for 20 steps in a row. Those steps changed
                nothing; the weights and the last checkpoint are as before.
        """
        if steps < 0:
            raise ValueError(f"steps must be >= 0, got {steps}")
        if self.directory and self.step == 0 and checkpoint.list_checkpoints(self.directory):
            raise FileExistsError(
                f"{self.directory} holds a run already: continue it with load(), or choose "
                "another directory"
            )
        self.net.train()
        end, rate = self.step + steps, Rate()
        rate.read(self.step)
        title = type(self.objective).__name__
        with Progress(title, steps, show=self._show and self._log_line is None) as self._progress:
            while self.step < end:
                loss = self._train_step(end - self.step)
                self._progress.advance()
                self._emit("step")
                if self.step % self.log_every == 0 or self.step == end:
                    self._measure(loss, rate)
                self._report(wait=self.step == end)
                save = self.directory and (
                    self.step == end or (self.save_every and self.step % self.save_every == 0)
                )
                if save or self.step % NON_FINITE_LIMIT == 0 or self.step == end:
                    save = self._is_finite(steps) and save
                if save:
                    self.save()
        self._progress = None
        return self

    def _train_step(self, remaining: int) -> Tensor:
        factor = self._lr_schedule(self.step)
        for group, lr in zip(self.optimizer.param_groups, self.base_lr):
            group["lr"] = lr * factor
        loss = self.stepper(self.step, remaining=remaining)
        self.step += 1
        if self.metadata["shape"] is None and self.stepper.shape is not None:
            self.metadata["shape"] = list(self.stepper.shape)
        return loss

    def _measure(self, loss: Tensor, rate: Rate) -> None:
        """Start to read the metrics of the step just taken, without waiting for the device."""
        self._report(wait=True)
        it_s = rate.read(self.step)
        host = {
            "step": self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "it_s": round(it_s, 3),
            "img_s": round(it_s * self.batch_size, 1),
            "memory_mb": round(peak_memory(self.device) / 2**20, 1),
        }
        last = self.key.step - 1
        device = {
            "loss": loss,
            "grad_norm": self.update.grad_norm,
            "skipped": self.update.counts[1],
            **{f"ema_{i}": average.decay(last) for i, average in enumerate(self.averages)},
        }
        discretization = getattr(self.objective, "discretization", None)
        if discretization is not None:
            n = intervals(discretization, last)
            device["intervals"] = torch.full_like(last, n) if isinstance(n, int) else n
        self._reading = Reading(host, device)

    def _report(self, *, wait: bool = False) -> None:
        """Publish the metrics that are being read, if they have arrived."""
        if self._reading is None or not (wait or self._reading.arrived):
            return
        self.metrics, self._reading = self._reading.values(), None
        self._metrics_file.write(self.metrics)
        if self._progress is not None:
            self._progress.report(self.metrics)
        self._emit("log")

    def _is_finite(self, steps: int) -> bool:
        """Whether the last gradient was; raises where too many in a row, or all of a fit, were not.

        What fails is not saved, so that a checkpoint from before it stays.
        """
        in_a_row = int(self.update.counts[2].item())
        if in_a_row >= NON_FINITE_LIMIT or 1 < steps <= in_a_row:
            saved = checkpoint.list_checkpoints(self.directory) if self.directory else []
            raise NonFiniteError(
                f"the gradient was not finite for {in_a_row} steps in a row, up to step "
                f"{self.step}; those steps changed nothing"
                + (f"; the last good checkpoint is {saved[0]}" if saved else "")
                + ". Lower the learning rate, or look for NaN in data and network output"
            )
        return in_a_row == 0

    def _emit(self, event: str) -> None:
        for callback in self.callbacks:
            callback(self, event)

    def config(self) -> dict[str, Any]:
        """What must agree for a run to be resumed."""
        if self._config is None:
            self._config = self._describe()
        return self._config

    def _describe(self) -> dict[str, Any]:
        return {
            "objective": describe(self.objective),
            "network": self.metadata["network"] or type(self.net).__name__,
            "averages": describe(self.averages),
            "optimizer": type(self.optimizer).__name__,
            "param_groups": [
                {k: describe(v) for k, v in group.items() if k not in ("params", "lr")}
                for group in self.optimizer.param_groups
            ],
            "lr": self.base_lr,
            "lr_schedule": describe(self._lr_schedule),
            "max_grad_norm": _number(self.update.max_grad_norm),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "precision": self.gradients.precision,
            "accumulate": self.gradients.accumulate,
            "data": self.source.describe(),
        }

    def save(self, directory: str | Path | None = None) -> Path:
        """Write a checkpoint to `directory`, default the run's; see `fastcm.checkpoint`.

        Raises:
            ValueError: no directory.
            OSError: it could not be written; earlier checkpoints are untouched.
        """
        run = Path(directory) if directory is not None else self.directory
        if run is None:
            raise ValueError("save needs a directory: Trainer(directory=...) or save(directory)")
        path = write(self, run)
        self._emit("save")
        return path

    def load(self, directory: str | Path | None = None) -> Trainer:
        """Continue from the newest intact checkpoint of a run; a damaged one is passed over.

        Raises:
            FileNotFoundError: no checkpoint there.
            CheckpointError: all are damaged, or of another network or optimizer.
            ValueError: the run had another configuration; the message lists the differences.
        """
        run = Path(directory) if directory is not None else self.directory
        if run is None:
            raise ValueError("load needs a directory: Trainer(directory=...) or load(directory)")
        read(self, run)
        self._metrics_file.drop_after(self.step)
        return self


def _check_classes(net: nn.Module, source: object, objective: Objective) -> None:
    """A label of num_classes would be the null label, one beyond it an index out of range."""
    classes = getattr(net, "description", {}).get("num_classes")
    data = source.dataset.num_classes if isinstance(source, DeviceData) else None
    null = getattr(objective, "null_condition", None)
    if classes is not None and data is not None and data > classes:
        raise ValueError(f"the data has {data} classes, the network num_classes={classes}")
    if classes is not None and isinstance(null, int) and not 0 <= null <= classes:
        raise ValueError(f"null_condition must be in [0, {classes}], got {null}")


def _number(value: float | None) -> float | None:
    """None for infinity, which JSON does not have."""
    return None if value is None or math.isinf(value) else value
