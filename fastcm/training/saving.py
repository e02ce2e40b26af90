"""When and how a trainer saves: in the background while it trains, one process to a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from fastcm.runs import checkpoint
from fastcm.runs.files import clear
from fastcm.runs.lock import RunLock
from fastcm.training.checkpoint import contents
from fastcm.training.logging import MetricsFile
from fastcm.training.writer import Writer

if TYPE_CHECKING:
    from fastcm.training.trainer import Trainer


class Saving:
    """The saving half of a trainer.

    Attributes:
        resumed: whether the trainer was put at a checkpoint since the last fit.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._writer = Writer()
        self._lock = None if trainer.directory is None else RunLock(trainer.directory)
        self.resumed = False

    @contextmanager
    def during_fit(self, metrics: MetricsFile) -> Iterator[None]:
        """Holds the run's lock; at the end every write is complete, its error raised.

        After a KeyboardInterrupt, which is to stop at once, nothing is waited for: the thread
        completes its write on its own, with the lock, and the process does not end before.

        Raises:
            FileExistsError: the run has checkpoints that this trainer does not continue.
        """
        self.settle()
        with self._lock or nullcontext():
            self._prepare(metrics)
            try:
                yield
            except Exception:
                self._settle_quietly()
                raise
            self.settle()
            self._writer.release()

    def _prepare(self, metrics: MetricsFile) -> None:
        run, step = self._trainer.directory, self._trainer.step
        if run is None:
            return
        found = checkpoint.list_checkpoints(run)
        later = [path for path in found if checkpoint.step_of(path) > step]
        if (step == 0 and found) or any(checkpoint.is_intact(path) for path in later):
            raise FileExistsError(
                f"{run} holds a run already, up to {found[0].name}, and this trainer is at step "
                f"{step}: continue it with load(), or choose another directory"
            )
        for directory in (run, *(p for p in run.iterdir() if p.is_dir())):
            clear(directory)
        if self.resumed or step == 0:  # a run that was killed may have got further than its save
            metrics.drop_after(step)
        self.resumed = False

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint of this step is wanted in passing."""
        trainer = self._trainer
        every = (trainer.save_every, trainer.keep_every)
        return self._lock is not None and any(n and step % n == 0 for n in every)

    def begin(self) -> None:
        """Save to the run's directory, in the background, after any earlier write."""
        assert self._lock is not None
        self._start(self._lock)

    def now(self, run: Path) -> Path:
        """Save to a directory, and wait."""
        mine = self._lock is not None and run.resolve() == self._lock.run.resolve()
        self._start(self._lock if mine and self._lock is not None else RunLock(run))
        self.settle()
        assert self._trainer.saved is not None
        return self._trainer.saved

    def _start(self, lock: RunLock) -> None:
        self.settle()
        trainer = self._trainer
        groups, state = contents(trainer)
        self._writer.start(
            lock, trainer.step, groups, state, keep=trainer.keep, keep_every=trainer.keep_every
        )

    def tell(self) -> None:
        """Emit "save" if a checkpoint has become complete; does not wait."""
        if self._writer.succeeded:
            self.settle()

    def settle(self) -> None:
        """Wait for the write in progress, and emit "save".

        Raises:
            OSError: the write failed.
        """
        path = self._writer.settle()
        if path is not None:
            self._trainer.saved = path
            self._trainer._emit("save")

    def _settle_quietly(self) -> None:
        """As `settle` beneath another error, which is the one to raise."""
        try:
            self.settle()
        except Exception as error:
            self._trainer.log(str(error))
