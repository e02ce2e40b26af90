"""The training loop: step, averages, metrics, checkpoints."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastcm.data import as_source
from fastcm.ema import Average
from fastcm.objectives.base import Objective
from fastcm.optim import AdamW
from fastcm.precision import Precision
from fastcm.rng import NoiseKey
from fastcm.runs.frozen import LeftOut
from fastcm.sharding import Init
from fastcm.training import blocks, checks
from fastcm.training.checkpoint import restore
from fastcm.training.configuration import configuration, metadata_of
from fastcm.training.data_state import DataState
from fastcm.training.filling import Filling
from fastcm.training.finite import Watch
from fastcm.training.gradients import Compile, Gradients
from fastcm.training.interrupt import StopSignals
from fastcm.training.logging import Rate, measure
from fastcm.training.lr import Schedule, constant
from fastcm.training.parallel import Parallel, processes, shards
from fastcm.training.reports import Reports
from fastcm.training.saving import Saving
from fastcm.training.settings import Settings
from fastcm.training.sharded import sharding
from fastcm.training.sharded_update import update
from fastcm.training.state import State
from fastcm.training.step import Graph, Step
from fastcm.training.update import with_target

Callback = Callable[["Trainer", str], None]


class Trainer:
    """Trains a network by an objective.

    Args:
        net: ``net(x, t, cond=None) -> F`` with F like x ``[B, ...]`` and t ``[B]`` float32.
        objective: `FlowMatching`, `ConsistencyTraining`, `ConsistencyDistillation`, or your own.
        optimizer: over the parameters of `net`; default `fastcm.AdamW`, lr 1e-3. Its learning
            rates are the base that `lr_schedule` scales.
        data: a tensor ``[N, ...]`` (uint8 images or float), (tensor, labels), a `Dataset`, a path,
            shards, a data set of torch or Hugging Face, or any iterable of batches: docs/data.md.
        batch_size: rows a step, of all processes.
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
        checkpoint: "blocks": keep the inputs of repeated blocks for the backward pass, and compute
            the rest of them again there: less memory, more time, the same gradients.
        parallel: "ddp": the processes of torchrun, or of a process group that there is, train as
            one: each takes its rows of every batch, and the first alone prints and writes. All end
            with the same weights, which do not depend on how many they are, but for rounding.
            "fsdp", or a mesh of one dimension: each holds but a part of weights, averages and
            optimizer, see `Sharding`; a mesh of two: of replicas of that. `net` and a teacher
            are sharded in place, and called by all processes together.
        device: default that of the network; the CPU for one on the meta device.
        init, teacher_init: where a student or teacher on the meta device gets its values, see
            `fastcm.sharding.Init`. With "fsdp" it is sharded first: no process holds it whole.
        directory: of the run: checkpoints and metrics.jsonl. None keeps nothing.
        save_every: steps between checkpoints; 0: only at the end of `fit`.
        keep: how many checkpoints to keep.
        keep_every: one of every so many steps is saved, too, and kept for ever; 0: none.
        save_frozen: False: checkpoints leave out parameters that require no gradient, such as the
            weights beneath LoRA layers. Whoever reads the run brings a network that has them, and
            a fingerprint in the run tells whether they are its own.
        log_every: steps between metrics.
        progress: show a bar where there is a terminal.
        tensorboard: write the metrics to directory/tensorboard, too.
        callbacks: called as callback(trainer, event), event "step", "log" or "save": then
            `trainer.saved` is a checkpoint that has become complete on the disk. Every process
            calls its own, with "save" the first alone.
        log: receives lines of text; default standard error.

    Attributes:
        interrupted: the signal that ended the last `fit` early, or None.
        saved: the newest checkpoint that this trainer wrote, or None.
        processes: that train together; this one is `processes.rank` of `processes.count`.

    Raises:
        ValueError, TypeError: an argument out of range, data that is empty or of the wrong form,
            processes that were given different things.
        ImportError: tensorboard=True without that package.
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
        checkpoint: blocks.Checkpoint | None = None,
        parallel: Parallel | None = None,
        device: torch.device | str | None = None,
        init: Init | None = None,
        teacher_init: Init | None = None,
        directory: str | Path | None = None,
        save_every: int = 0,
        keep: int = 3,
        keep_every: int = 0,
        save_frozen: bool = True,
        log_every: int = 50,
        tensorboard: bool = False,
        progress: bool = True,
        callbacks: Sequence[Callback] = (),
        log: Callable[[str], None] | None = None,
    ) -> None:
        self.settings = Settings(
            batch_size=batch_size,
            seed=seed,
            directory=None if directory is None else Path(directory),
            save_every=save_every,
            keep=keep,
            keep_every=keep_every,
            log_every=log_every,
        )
        device = checks.device_of(net, device)
        checks.check_arguments(net, objective, optimizer, lr_schedule, max_grad_norm)
        filling = Filling.of(net, objective, init, teacher_init, device=device, seed=seed)
        filling.place(optimizer, as_shards=shards(parallel))
        self.net, self.objective = net, objective
        checks.check_teacher(objective, net, device)
        checks.check_network(net, objective)
        self.source = as_source(data, seed=seed, device=device)
        checks.check_classes(net, self.source, objective)
        self.processes = processes(parallel)
        if self.processes.joined:
            checks.check_parallel(net, self.source)
        optimizer = optimizer or AdamW(checks.trainable(net), lr=1e-3, weight_decay=0.0)
        blocks.apply_checkpoint(checkpoint, net, objective)
        spread = sharding(net, objective, optimizer, parallel, self.processes, filling)
        left_out = LeftOut() if save_frozen else LeftOut.of(net)
        self.lr_schedule = lr_schedule
        self.callbacks = tuple(callbacks)
        self.interrupted: signal.Signals | None = None
        self.saved: Path | None = None
        self.metrics: dict[str, Any] = {}
        silent = not self.processes.first
        self._reports = Reports(
            self.directory, tensorboard=tensorboard, bar=progress, log=log, silent=silent
        )
        self.log = self._reports.log
        self.update = update(
            net, optimizer, with_target(averages, optimizer, objective), max_grad_norm, spread
        )
        gradients = Gradients(
            net, objective, self.update.network_of(objective.target_average),
            precision=precision, compile=compile, accumulate=accumulate,
            paired=getattr(self.source, "paired", False), processes=self.processes, spread=spread,
            optimizer=optimizer, log=self.log,
        )  # fmt: skip
        gradients.check_batch(batch_size)
        rows = self.processes.rows(batch_size, accumulate, getattr(objective, "period", 1))
        key = NoiseKey(seed, first_sample=rows.start, device=device)
        data_state = DataState(self.source, self.processes)
        self.state = State(net, optimizer, self.update, gradients, key, data_state, left_out)
        self.stepper = Step(
            self.source, batch_size, gradients, optimizer, self.update, key,
            rows=rows, graph=graph, log=self.log,
        )  # fmt: skip
        self.metadata = metadata_of(net, objective)
        self._config: dict[str, Any] | None = None
        self._saving = Saving(
            self.settings,
            self.state,
            self.processes,
            sharded=spread is not None,
            config=self.config,
            metadata=self.metadata,
            saved=self._tell_saved,
            log=self.log,
        )
        self.processes.agree(
            lambda: {**self.config(), **self.settings.numbers(), **self.state.summary()}
        )

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return self.state.step

    @property
    def directory(self) -> Path | None:
        return self.settings.directory

    @property
    def device(self) -> torch.device:
        return self.state.device

    @property
    def optimizer(self) -> Optimizer:
        return self.state.optimizer

    @property
    def averages(self) -> tuple[Average, ...]:
        """Of the weights, the objective's target average among them."""
        return self.update.averages

    def ema_network(self, i: int = 0) -> nn.Module:
        """The network with the i-th average of the weights; live, updated in place."""
        return self.update.networks[i]

    def fit(self, steps: int) -> Trainer:
        """Train `steps` more steps; saves at the end if there is a run directory.

        Checkpoints are written beside the training; all are complete when this returns. After
        SIGTERM or SIGINT it finishes the step, saves and returns early, with the signal in
        `interrupted`; see `StopSignals`.

        Raises:
            FileExistsError: the directory holds another run; `load` continues it.
            BlockingIOError: another process trains in the directory.
            OSError: a checkpoint could not be written; earlier ones are untouched.
            NonFiniteError: the gradient was not finite for 20 steps in a row. Those steps changed
                nothing; the weights and the last checkpoint are as before.
        """
        checks.check_steps(steps)
        self.interrupted = None
        if steps == 0:
            return self
        self.net.train()
        state, rate = self.state, Rate()
        end, watch = state.step + steps, Watch(state, steps, self._saving.newest)
        rate.read(state.step)
        with ExitStack() as stack:
            stack.enter_context(self._reports.bar(type(self.objective).__name__, steps))
            signals = stack.enter_context(StopSignals())
            with self.processes.together():
                self.processes.agree(lambda: {"steps": steps, "step": state.step})
                stack.enter_context(self._saving.during_fit(self._reports.file))
            while state.step < end and self.interrupted is None:
                stop = self.processes.ask_to_stop(signals)
                loss = self.train_step(remaining=end - state.step)
                self.interrupted = stop()  # read once a step: all below agree
                last = state.step == end or self.interrupted is not None
                self._reports.advance()
                self._emit("step")
                if state.step % self.settings.log_every == 0 or last:
                    self._report(wait=True)
                    it_s, mean = rate.read(state.step), self.processes.mean(loss)
                    self._reports.read(measure(state, mean, it_s, self.settings.batch_size))
                save = self.settings.saves_at(state.step) or (last and self.directory is not None)
                self._report(wait=save or last)  # a resumed run does not repeat these steps
                if save or last:
                    save = watch.now() and save
                else:
                    watch.in_passing()
                if save:
                    state.data.collect()
                    self._saving.begin()
                self._saving.tell()
            self._saving.finish()
        self.interrupted = self.processes.ask_to_stop(signals)()  # perhaps during the last write
        return self

    def train_step(self, *, remaining: int = 1000) -> Tensor:
        """Take one step without waiting for the device: `fit` without reports, checkpoints, watch.

        Args:
            remaining: how many steps are still to come; decides whether compiling can pay.

        Returns:
            The loss of this process's rows, a 0-d tensor on the device that the next step may
            overwrite.
        """
        if not self.net.training:
            self.net.train()
        self.state.scale_lr(self.lr_schedule(self.step))
        loss = self.stepper(self.step, remaining=remaining)
        self.state.step += 1
        if self.metadata["shape"] is None and self.stepper.shape is not None:
            self.metadata["shape"] = list(self.stepper.shape)
        return loss

    def _report(self, *, wait: bool) -> None:
        metrics = self._reports.publish(wait=wait)
        if metrics is not None:
            self.metrics = metrics
            self._emit("log")

    def _tell_saved(self, path: Path) -> None:
        self.saved = path
        self._emit("save")

    def _emit(self, event: str) -> None:
        for callback in self.callbacks:
            callback(self, event)

    def config(self) -> dict[str, Any]:
        """What must agree for a run to be resumed."""
        if self._config is None:
            self._config = configuration(self.settings, self.state, self.source, self.lr_schedule)
        return self._config

    def save(self, directory: str | Path | None = None) -> Path:
        """Write a checkpoint to `directory`, default the run's, and wait until it is complete.

        Raises:
            ValueError: no directory.
            BlockingIOError: another process trains in it.
            OSError: it could not be written; earlier checkpoints are untouched.
        """
        run = self.settings.run("save", directory)
        self.state.data.collect()
        return self._saving.now(run)

    def load(self, directory: str | Path | None = None) -> Trainer:
        """Continue from the newest intact checkpoint of a run, without writing to its directory.

        Raises:
            FileNotFoundError: no checkpoint there.
            CheckpointError: all are damaged, or of another network or optimizer.
            ValueError: the run had another configuration; the message lists the differences.
        """
        run = self.settings.run("load", directory)
        self._saving.finish()
        with self.processes.together():
            restore(self.state, run, self.config(), self.processes)
            self.processes.agree(self.state.summary)
        self._saving.resumed = True
        return self
