"""A whole training step in one CUDA graph, kept only where that is faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_WARMUP = 11
"""Eager steps before the clock: compiled code, libraries and the allocator settle."""

_TIMED = 5


class Graphed:
    """Calls `work` on a stream of its own: eagerly at first, then by replaying a graph of it.

    Every call is one real step, the timed ones too. The graph is captured again when memory that
    it reads has moved.

    Args:
        work: a step; device operations of fixed shapes and addresses.
        prepare: brings the device up to date before a replay; returns whether memory moved.
        net: whose parameters must all have a gradient.
        device: of the step.
        must: keep the graph even if it is slower, and raise if it cannot be captured.
        log: receives one line about the choice.
    """

    def __init__(
        self,
        work: Callable[[], Tensor],
        prepare: Callable[[], bool],
        net: nn.Module,
        device: torch.device,
        *,
        must: bool,
        log: Callable[[str], None],
    ) -> None:
        self._work, self._prepare, self._net = work, prepare, net
        self._must, self._log = must, log
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss: Tensor | None = None
        self._calls = 0
        self._start = 0.0
        self._eager = 0.0
        self._off = False

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Work on the stream of the graph, after and before what the current one does."""
        outer = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            yield
        outer.wait_stream(self._stream)

    def __call__(self) -> Tensor:
        if self._off:
            return self._work()
        if self._calls < _WARMUP + _TIMED:
            if self._calls == _WARMUP:
                self._start = self._clock()
            self._calls += 1
            loss = self._work()
            if self._calls == _WARMUP + _TIMED:
                self._eager = (self._clock() - self._start) / _TIMED
            return loss
        if self._graph is not None and self._prepare():
            self._drop()
        if self._graph is None and not self._capture():
            self._off = True
            return self._work()
        return self._replay()

    def _clock(self) -> float:
        self._stream.synchronize()
        return time.perf_counter()

    def _replay(self) -> Tensor:
        assert self._graph is not None and self._loss is not None
        replays = self._calls - _WARMUP - _TIMED
        if replays == 1:  # after the first, which uploads the graph
            self._start = self._clock()
        self._graph.replay()
        if replays <= _TIMED:
            self._calls += 1
        if replays == _TIMED:
            self._decide((self._clock() - self._start) / _TIMED)
        return self._loss

    def _decide(self, replay: float) -> None:
        keep = replay < self._eager or self._must
        self._log(
            f"graph: {'on' if keep else 'off'}, {1e3 * replay:.2f} ms replayed, "
            f"{1e3 * self._eager:.2f} ms launched one by one"
        )
        if not keep:
            assert self._loss is not None
            self._loss = self._loss.clone()  # the caller still reads it
            self._drop()
            self._off = True

    def _capture(self) -> bool:
        """Record one step without taking it."""
        idle = [n for n, p in self._net.named_parameters() if p.requires_grad and p.grad is None]
        if idle:
            reason = f"no gradient reaches {', '.join(idle[:5])}, which a graph would never update"
            if self._must:
                raise ValueError(f"graph='step' is not possible: {reason}")
            self._log(f"graph: off, {reason}")
            return False
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads, such as one that writes a checkpoint, may go on
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._loss = self._work()
        except Exception as error:  # a network that synchronises, or allocates by other means
            if self._must:
                raise
            self._log(f"graph: off, it failed: {type(error).__name__}: {error!s:.200}")
            return False
        self._graph = graph
        self._prepare()  # the gradients have the addresses of the capture now
        return True

    def _drop(self) -> None:
        if self._graph is not None:
            self._stream.synchronize()
            self._graph.reset()
            self._graph = None
