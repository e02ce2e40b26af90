"""CUDA graphs of work that repeats, kept only where they are faster than launching it."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

_LOCKS: dict[torch.device, threading.RLock] = {}


def available(device: torch.device) -> bool:
    """Whether work on this device can be a CUDA graph."""
    return device.type == "cuda"


def device_lock(device: torch.device) -> threading.RLock:
    """One lock for each device: no thread may launch on it while another one captures."""
    return _LOCKS.setdefault(device, threading.RLock())


def never() -> bool:
    return False


def no_obstacle() -> None:
    return None


def alone(reason: str | None) -> str | None:
    """What this process says counts."""
    return reason


class Side:
    """A stream beside the current one, and a memory pool for the graphs captured on it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool: Any = torch.cuda.graph_pool_handle()
        self._graphs = 0

    def take(self) -> None:
        """A graph lives in the pool."""
        self._graphs += 1

    def give_back(self) -> None:
        """A graph lives there no more. Without any, the allocator closes the pool: take another."""
        self._graphs -= 1
        if self._graphs == 0:
            self.pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Work on the stream, after and before what the current one does."""
        outer = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(outer)
        with torch.cuda.stream(self.stream):
            yield
        outer.wait_stream(self.stream)


class Graphed:
    """Calls `work` eagerly at first, then by replaying a CUDA graph of it.

    Every call does the work once and counts, the timed ones too. Call it inside ``with side():``.

    Args:
        work: device operations of fixed shapes and addresses.
        side: where it is captured; graphs that share one share their memory, so the result of one
            is overwritten by the next.
        moved: brings the device up to date before a replay and says whether memory that the graph
            reads has moved since the last time; then it is captured again.
        obstacle: asked before a capture: why there can be no graph, or None.
        release: called before a graph is given back: let go of tensors that live in its memory.
        agree: where the work holds collectives, which all processes capture or none does: the first
            reason against a graph that one of them has. They call it equally often.
        must: keep the graph even if it is slower, and raise if it cannot be captured.
        log: receives one line about the choice.
        name: of the work, in that line.
        warmup: calls before the clock: compiled code, libraries and the allocator settle.
        timed: calls of each kind whose fastest counts.
    """

    def __init__(
        self,
        work: Callable[[], Tensor],
        side: Side,
        *,
        moved: Callable[[], bool] = never,
        obstacle: Callable[[], str | None] = no_obstacle,
        release: Callable[[], None] = no_obstacle,
        agree: Callable[[str | None], str | None] = alone,
        must: bool,
        log: Callable[[str], None],
        name: str = "graph",
        warmup: int = 11,
        timed: int = 5,
    ) -> None:
        self._work, self._side = work, side
        self._moved, self._obstacle, self._release = moved, obstacle, release
        self._agree = agree
        self._waits: str | None = None
        self._must, self._log, self._name = must, log, name
        self._warmup, self._timed = warmup, timed
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None
        self._calls = 0
        self._replays = 0
        self._launched = self._replayed = float("inf")
        self._off = False

    def __call__(self) -> Tensor:
        if self._off:
            return self._work()
        if self._calls < self._warmup + self._timed:
            self._calls += 1
            if self._calls < self._warmup:
                return self._work()
            if self._calls == self._warmup:
                return self._watched()
            result, seconds = self._clocked(self._work)
            self._launched = min(self._launched, seconds)
            return result
        if self._graph is not None and self._moved():
            self.drop()
        if self._graph is None and not self._capture():
            self._off = True
            return self._work()
        return self._replay()

    def _watched(self) -> Tensor:
        """The work; what in it waits for the device is an obstacle, found before a capture."""
        with waits() as found:
            result = self._work()
        if found:
            self._waits = f"the work waits for the device: {found[0]}"
        return result

    def _clocked(self, call: Callable[[], Tensor]) -> tuple[Tensor, float]:
        self._side.stream.synchronize()
        start = time.perf_counter()
        result = call()
        self._side.stream.synchronize()
        return result, time.perf_counter() - start

    def _replay(self) -> Tensor:
        if self._replays > self._timed:  # decided
            return self._once_more()
        self._replays += 1
        if self._replays == 1:  # which uploads the graph
            return self._once_more()
        result, seconds = self._clocked(self._once_more)
        self._replayed = min(self._replayed, seconds)
        return result if self._replays <= self._timed else self._decided(result)

    def _once_more(self) -> Tensor:
        assert self._graph is not None and self._result is not None
        self._graph.replay()
        return self._result

    def _decided(self, result: Tensor) -> Tensor:
        slower = None if self._replayed < self._launched or self._must else "slower"
        keep = self._agree(slower) is None
        self._log(
            f"{self._name}: {'on' if keep else 'off'}, {1e3 * self._replayed:.2f} ms replayed, "
            f"{1e3 * self._launched:.2f} ms launched one by one"
        )
        if keep:
            return result
        result = result.clone()  # the caller still reads it
        self.drop()
        self._off = True
        return result

    def _capture(self) -> bool:
        """Record the work without doing it."""
        reason = self._agree(self._waits or self._obstacle())
        if reason is not None:
            return self._refused(reason)
        graph = torch.cuda.CUDAGraph()
        side = self._side
        cause: Exception | None = None
        try:
            # no other capture on this device; other threads, such as one that writes a
            # checkpoint, may go on
            with (
                device_lock(side.device),
                torch.cuda.graph(
                    graph, pool=side.pool, stream=side.stream, capture_error_mode="thread_local"
                ),
            ):
                try:
                    self._result = self._work()
                except Exception as error:  # the end of a capture that failed raises another one
                    cause = error
                    raise
        except Exception as error:
            cause = cause or error
            self._result = None
            try:
                _recover(side)
            except RuntimeError:
                raise RuntimeError(
                    f"the capture of a CUDA graph failed and left the device unable to make "
                    f"another: {type(cause).__name__}: {cause}. Start again with graph='off'"
                ) from cause
        else:
            self._graph = graph
            side.take()
        failed = None if cause is None else f"it failed: {type(cause).__name__}: {cause!s:.200}"
        reason = self._agree(failed)
        if reason is not None:
            self.drop()
            if self._must and cause is not None:
                raise cause from None
            return self._refused(reason)
        self._moved()  # addresses are those of the capture now
        return True

    def _refused(self, reason: str) -> bool:
        """There is no graph, and the work is launched from now on."""
        if self._must:
            raise ValueError(f"a CUDA graph is not possible: {reason}")
        self._log(f"{self._name}: off, {reason}")
        return False

    def drop(self) -> None:
        """Give the graph back; the next call captures anew."""
        if self._graph is not None:
            self._side.stream.synchronize()
            self._release()
            graph, self._graph, self._result = self._graph, None, None
            graph.reset()
            self._side.give_back()


@contextmanager
def waits() -> Iterator[list[str]]:
    """What waits for the device inside, as ``file:line``: torch warns of it when it is asked to."""
    before = torch.cuda.get_sync_debug_mode()
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            found.append(f"{warning.filename}:{warning.lineno}")
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


def _recover(side: Side) -> None:
    """After a capture that was cut off: allocator and generator still take it to go on.

    Raises:
        RuntimeError: nothing can be captured; random numbers may not work either.
    """
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is not None:
        with suppress(RuntimeError):  # it has ended
            end(side.device.index or 0, side.pool)
    side.pool = torch.cuda.graph_pool_handle()
    # a capture of nothing leaves the generator as after one that succeeded
    empty = torch.cuda.CUDAGraph()
    with torch.cuda.graph(
        empty, pool=side.pool, stream=side.stream, capture_error_mode="thread_local"
    ):
        pass
    empty.reset()
    side.pool = torch.cuda.graph_pool_handle()
