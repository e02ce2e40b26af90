"""Where the time of a training goes: some of its steps under torch's profiler."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastcm.runs.files import replace_file
from fastcm.tracing import part
from fastcm.training.shares import Shares, shares

if TYPE_CHECKING:
    from fastcm.training.trainer import Trainer

TRACE, TABLE = "trace.json", "table.txt"


class Profiler:
    """A callback of a `Trainer` that watches some steps and says where their time went.

    It waits until the steps are steady, times some without looking, and traces as many; the trace
    and a table of it are then in the directory, and the table goes to the trainer's log. The
    training takes the same steps as without. In compiled code and CUDA graphs not all parts can be
    told apart, which the table says; of several processes the first is watched.

    Args:
        directory: for trace.json, which chrome://tracing and ui.perfetto.dev show, and table.txt;
            made if absent, and both are overwritten.
        after: steps to wait: compiling and the decision about a CUDA graph are in the first.
        steps: to time, and then to trace.

    Attributes:
        shares: what came out; None until then.

    Raises:
        ValueError: `after` < 1 or `steps` < 1.
    """

    def __init__(self, directory: str | Path, *, after: int = 50, steps: int = 10) -> None:
        if after < 1 or steps < 1:
            raise ValueError(f"after and steps must be >= 1, got {after} and {steps}")
        self.directory, self.after, self.steps = Path(directory), after, steps
        self.shares: Shares | None = None
        self._seen = 0
        self._start = 0.0
        self._unwatched = 0.0
        self._profiler: torch.profiler.profile | None = None
        self._hooks = ExitStack()
        self._step: AbstractContextManager[object] | None = None

    @property
    def needed(self) -> int:
        """Steps of a `fit` that it takes."""
        return self.after + 2 * self.steps

    def __call__(self, trainer: Trainer, event: str) -> None:
        """What the trainer calls."""
        if event != "step" or not trainer.processes.first or self.shares is not None:
            return
        if trainer.interrupted is not None:
            self._stop()
            return
        self._seen += 1
        if self._seen == self.after:
            _synchronize(trainer)
            self._start = time.perf_counter()
        elif self._seen == self.after + self.steps:
            _synchronize(trainer)
            self._unwatched = (time.perf_counter() - self._start) / self.steps
            self._begin(trainer)
        elif self._seen == self.needed:
            _synchronize(trainer)
            self._end_of_step()
            profiler = self._stop()
            assert profiler is not None
            self._write(profiler, trainer)
        elif self._profiler is not None:
            self._end_of_step()
            self._begin_of_step()

    def _begin(self, trainer: Trainer) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if trainer.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=kinds)
        self._profiler.start()
        if not trainer.state.gradients.compiled:  # compiled code would not call them
            self._hooks.enter_context(_marked(_networks(trainer)))
        self._begin_of_step()

    def _begin_of_step(self) -> None:
        self._step = part("step")
        self._step.__enter__()

    def _end_of_step(self) -> None:
        assert self._step is not None
        self._step.__exit__(None, None, None)
        self._step = None

    def _stop(self) -> torch.profiler.profile | None:
        self._hooks.close()
        if self._step is not None:
            self._end_of_step()
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()
        return profiler

    def _write(self, profiler: torch.profiler.profile, trainer: Trainer) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        trace = self.directory / TRACE
        profiler.export_chrome_trace(str(trace))
        found = shares(json.loads(trace.read_text(errors="replace"))["traceEvents"])
        head = (
            f"steps {trainer.step - self.steps + 1} to {trainer.step} on {trainer.device}: "
            f"{found.total:.3f} ms each; the {self.steps} before, without a profiler, "
            f"{1e3 * self._unwatched:.3f} ms"
        )
        self.shares = dataclasses.replace(found, head=head)
        replace_file(self.directory / TABLE, f"{self.shares}\n".encode())
        trainer.log(f"{self.shares}\nprofile: {trace}")


def _synchronize(trainer: Trainer) -> None:
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)


def _networks(trainer: Trainer) -> list[nn.Module]:
    """The student, and what else its objective calls."""
    gradients = trainer.state.gradients
    held: list[Any] = [gradients.net, gradients.target_net, *vars(gradients.objective).values()]
    return [net for net in held if isinstance(net, nn.Module)]


@contextmanager
def _marked(networks: list[nn.Module]) -> Iterator[None]:
    """The calls of these networks have a range of their own."""
    opened: list[AbstractContextManager[object]] = []

    def before(*_: object) -> None:
        with torch._C.DisableTorchFunction():
            opened.append(part("network"))
            opened[-1].__enter__()

    def after(*_: object) -> None:
        with torch._C.DisableTorchFunction():
            opened.pop().__exit__(None, None, None)

    handles = []
    for net in {id(net): net for net in networks}.values():
        handles.append(net.register_forward_pre_hook(before))
        handles.append(net.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
