"""CUDA graphs acted out on the CPU: what is captured is recorded, and a replay repeats it.

As on a GPU, a replay runs no Python of the captured work: it repeats the tensor operations on the
memory they had, so what was baked in stays baked in; and a capture leaves no trace. Work that is
done past torch's dispatcher, such as the C++ kernel of the optimizer, is not seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastcm import graphs
from fastcm.ops import dispatch
from fastcm.optim import one_sweep


class RecordedGraph:
    """Stands for torch.cuda.CUDAGraph."""

    made = 0
    replays = 0
    capturing = False
    last: RecordedGraph

    def __init__(self) -> None:
        type(self).made += 1
        RecordedGraph.last = self
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    @torch.no_grad()
    def replay(self) -> None:
        assert self.calls, "an empty or reset graph"
        type(self).replays += 1
        for function, args, kwargs, result in self.calls:
            anew = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(anew)):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def reset(self) -> None:
        self.calls = []


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self._graph = graph
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for i, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[i] if i < len(args) else kwargs.get(argument.name)
                for written in tree_leaves(given):
                    self._before.append((written, written.clone()))
        result = function(*args, **kwargs)
        self._graph.calls.append((function, args, kwargs, result))
        return result

    @torch.no_grad()
    def undo(self) -> None:
        for written, before in reversed(self._before):
            written.copy_(before)


class _Stream:
    device = torch.device("cpu")

    def __init__(self, device: torch.device) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, other: Any) -> None: ...


@contextmanager
def _capture(graph: RecordedGraph, **options: Any) -> Iterator[None]:
    assert options["capture_error_mode"] == "thread_local"
    recorder = _Recorder(graph)
    RecordedGraph.capturing = True
    try:
        with recorder:
            yield
    finally:
        RecordedGraph.capturing = False
    recorder.undo()


@pytest.fixture
def recorded_graphs(monkeypatch: pytest.MonkeyPatch) -> type[RecordedGraph]:
    """The CPU counts as a device with graphs."""
    pools = itertools.count(1)
    for name, stand_in in (
        ("Stream", _Stream),
        ("CUDAGraph", RecordedGraph),
        ("graph", _capture),
        ("graph_pool_handle", lambda: (0, next(pools))),  # numbers, as torch's own
        ("stream", lambda stream: nullcontext()),
        ("current_stream", _Stream),
        ("get_sync_debug_mode", lambda: 0),
        ("set_sync_debug_mode", lambda mode: None),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(graphs, "available", lambda device: True)
    monkeypatch.setattr(dispatch, "_has_native", lambda: False)  # whose work is not seen
    monkeypatch.setattr(one_sweep, "is_capturing", lambda: RecordedGraph.capturing)
    RecordedGraph.made = RecordedGraph.replays = 0
    return RecordedGraph
