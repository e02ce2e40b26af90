"""When and how a run is saved: in the background while it trains, one process to a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from fastcm.runs import checkpoint, joint
from fastcm.runs.files import clear
from fastcm.runs.lock import RunLock
from fastcm.training.checkpoint import contents
from fastcm.training.logging import MetricsFile
from fastcm.training.processes import Processes
from fastcm.training.settings import Settings
from fastcm.training.sharded_state import divided
from fastcm.training.state import State
from fastcm.training.writer import Writer


class Saving:
    """Writes the checkpoints of a run.

    Args:
        settings: directory, and which checkpoints stay.
        state: what is saved.
        processes: that train together. The first one saves for all, with the others if `sharded`.
        sharded: whether each process has a part of the state only.
        config: what must agree for the run to be resumed; asked when something is saved.
        metadata: what a sampler must know of the network; read when something is saved.
        saved: told of each checkpoint that has become complete on the disk.
        log: receives an error that another one hides.

    Attributes:
        resumed: whether the state was put at a checkpoint since the last fit.
    """

    def __init__(
        self,
        settings: Settings,
        state: State,
        processes: Processes,
        *,
        sharded: bool = False,
        config: Callable[[], Mapping[str, Any]],
        metadata: Mapping[str, Any],
        saved: Callable[[Path], None],
        log: Callable[[str], None],
    ) -> None:
        self._settings, self._state, self._processes = settings, state, processes
        self._writers = processes.apart() if sharded else None
        self._config, self._metadata = config, metadata
        self._saved, self._log = saved, log
        self._writer = Writer()
        self._run = settings.directory
        mine = self._run if processes.first else None
        self._lock = None if mine is None else RunLock(mine)
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
        run, step = self._run, self._state.step
        if run is None or not self._processes.first:
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

    def begin(self) -> None:
        """Save to the run's directory, in the background, after any earlier write."""
        assert self._run is not None
        if self._processes.first or self._writers is not None:
            self._start(self._run)

    def now(self, run: Path) -> Path:
        """Save to a directory, and wait; returns the checkpoint, in every process."""

        def saved() -> Path | None:
            self._start(run)
            return self.settle()

        if self._writers is None:
            path = self._processes.from_first(saved)
        else:
            mine = saved()
            path = self._processes.from_first(lambda: mine)
        assert path is not None
        return path

    def _start(self, run: Path) -> None:
        self.settle()
        step, writers = self._state.step, self._writers
        start = partial(
            self._writer.start,
            run,
            keep=self._settings.keep,
            keep_every=self._settings.keep_every,
        )
        groups, state = contents(self._state, self._config(), self._metadata)
        if writers is None:
            start(self._lock_of(run), step, groups, state)
            return
        mine, places = divided(groups, first=writers.first)
        save = partial(joint.save, places=places, rank=writers.rank, exchange=writers.exchange)
        lock = self._lock_of(run) if writers.first else nullcontext()
        start(lock, step, mine, state, save, self._processes.together())

    def _lock_of(self, run: Path) -> RunLock:
        mine = self._lock
        return mine if mine is not None and run.resolve() == mine.run.resolve() else RunLock(run)

    def tell(self) -> None:
        """Tell of a checkpoint that has become complete; does not wait."""
        if self._writer.succeeded:
            self.settle()

    def settle(self) -> Path | None:
        """Wait for the write in progress, and tell of it.

        Returns:
            Its checkpoint, if there was one.

        Raises:
            OSError: the write failed.
        """
        path = self._writer.settle()
        if path is not None:
            self._saved(path)
        return path

    def finish(self) -> None:
        """As `settle`, in all processes; an error of one is raised in all."""
        if self._writers is not None:  # they have told each other
            self.settle()
            return
        with self._processes.together():
            self.settle()

    def newest(self) -> Path | None:
        """The run's newest checkpoint, the one that is being written included, or None."""
        self._settle_quietly()
        run = self._run if self._processes.first else None
        saved = [] if run is None else checkpoint.list_checkpoints(run)
        return saved[0] if saved else None

    def _settle_quietly(self) -> None:
        """As `settle` beneath another error, which is the one to raise."""
        try:
            self.settle()
        except Exception as error:
            self._log(str(error))
