"""CUDA graphs of work that repeats, kept only where they are faster than launching it."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_LOCKS: dict[torch.device, threading.RLock] = {}

_WARMUP, _TIMED = 2, 3
CALLS_TO_DECIDE = _WARMUP + _TIMED + 1 + _TIMED
"""Of a `GraphCache` with one name and one shape, until its graph is kept or not."""


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


class Side:
    """A stream beside the current one, and a memory pool for the graphs captured on it."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool: Any = torch.cuda.graph_pool_handle()

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
        must: bool,
        log: Callable[[str], None],
        name: str = "graph",
        warmup: int = 11,
        timed: int = 5,
    ) -> None:
        self._work, self._side = work, side
        self._moved, self._obstacle = moved, obstacle
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
            if self._calls <= self._warmup:
                return self._work()
            result, seconds = self._clocked(self._work)
            self._launched = min(self._launched, seconds)
            return result
        if self._graph is not None and self._moved():
            self.drop()
        if self._graph is None and not self._capture():
            self._off = True
            return self._work()
        return self._replay()

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
        keep = self._replayed < self._launched or self._must
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
        reason = self._obstacle()
        if reason is not None:
            if self._must:
                raise ValueError(f"a CUDA graph is not possible: {reason}")
            self._log(f"{self._name}: off, {reason}")
            return False
        graph = torch.cuda.CUDAGraph()
        side = self._side
        try:
            # other threads, such as one that writes a checkpoint, may go on
            with torch.cuda.graph(
                graph, pool=side.pool, stream=side.stream, capture_error_mode="thread_local"
            ):
                self._result = self._work()
        except Exception as error:  # work that synchronises, or allocates by other means
            if self._must:
                raise
            self._log(f"{self._name}: off, it failed: {type(error).__name__}: {error!s:.200}")
            return False
        self._graph = graph
        self._moved()  # addresses are those of the capture now
        return True

    def drop(self) -> None:
        """Give the graph back; the next call captures anew."""
        if self._graph is not None:
            self._side.stream.synchronize()
            self._graph.reset()
            self._graph = self._result = None


class GraphCache:
    """Calls functions of tensors through CUDA graphs: one per function and shapes of its inputs.

    Args:
        device: of the tensors.
        moved, must, log: see `Graphed`; `moved` is a fresh one for each graph.
        capacity: graphs that are kept; the least recently used goes.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        moved: Callable[[], Callable[[], bool]],
        must: bool,
        log: Callable[[str], None],
        capacity: int = 16,
    ) -> None:
        self.side = Side(device)
        self._device = device
        self._moved, self._must, self._log = moved, must, log
        self._capacity = capacity
        self._held: OrderedDict[Hashable, tuple[list[Tensor | None], Graphed]] = OrderedDict()

    def __call__(
        self, name: Hashable, work: Callable[..., Tensor], *inputs: Tensor | None
    ) -> Tensor:
        """``work(*inputs)``, overwritten by the next call; inside ``with cache.side():``.

        Args:
            name: of the function, with everything but the inputs that its result depends on.
            work: device operations of shapes that follow from those of the inputs.
            inputs: copied to the memory that the graph reads.
        """
        key = (name, *(None if v is None else (tuple(v.shape), v.dtype) for v in inputs))
        if key not in self._held:
            if len(self._held) == self._capacity:
                self._held.popitem(last=False)[1][1].drop()
            static = [None if v is None else v.to(self._device, copy=True) for v in inputs]
            shown = " x ".join(str(list(v.shape)) for v in inputs if v is not None)
            self._held[key] = (
                static,
                Graphed(
                    lambda: work(*static),
                    self.side,
                    moved=self._moved(),
                    must=self._must,
                    log=self._log,
                    name=f"graph of {shown}",
                    warmup=_WARMUP,
                    timed=_TIMED,
                ),
            )
        self._held.move_to_end(key)
        static, graphed = self._held[key]
        for held, value in zip(static, inputs):
            if held is not None and value is not None:
                held.copy_(value, non_blocking=True)
        return graphed()
