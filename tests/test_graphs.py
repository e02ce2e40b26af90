"""When work becomes a CUDA graph, when it is captured anew, and when it is left alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from recorded_graphs import RecordedGraph
from torch import Tensor

from fastcm.graphs import Graphed, Side, device_lock
from fastcm.sampling.graph_cache import CALLS_TO_DECIDE, GraphCache

CPU = torch.device("cpu")


class Counter:
    """Work that counts on the device, and its runs as Python."""

    def __init__(self) -> None:
        self.total = torch.zeros(())
        self.runs = 0

    def __call__(self) -> Tensor:
        self.runs += 1
        return self.total.add_(1) * 1


def graphed(
    launched: float, replayed: float, work: Counter | None = None, **options: Any
) -> tuple[Graphed, Counter, list[str]]:
    """Work under a clock that shows these seconds for a call."""
    work, lines = work or Counter(), []  # type: ignore[var-annotated]
    made = Graphed(
        work, Side(CPU), **{"must": False, "log": lines.append, "warmup": 2, "timed": 3, **options}
    )

    def clocked(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
        return call(), launched if call is work else replayed

    made._clocked = clocked  # type: ignore[method-assign]
    return made, work, lines


def test_every_call_counts_once_and_the_faster_way_stays(
    recorded_graphs: type[RecordedGraph],
) -> None:
    call, work, lines = graphed(0.2, 0.1)
    for _ in range(5):
        call()
    assert work.runs == 5 and work.total == 5
    for _ in range(20):
        result = call()
    assert work.runs == 6 and recorded_graphs.replays == 20  # the capture is the sixth run
    assert result == work.total == 25
    assert lines == ["graph: on, 100.00 ms replayed, 200.00 ms launched one by one"]


def test_a_graph_that_is_not_faster_is_dropped(recorded_graphs: type[RecordedGraph]) -> None:
    call, work, lines = graphed(0.1, 0.2)
    results = [call() for _ in range(30)]
    assert recorded_graphs.replays == 1 + 3 and work.runs == 30 - 4 + 1
    assert [int(r) for r in results[8:]] == list(range(9, 31))  # the last replay's is its own
    assert lines[0].startswith("graph: off, 200.00 ms replayed")
    forced, work, lines = graphed(0.1, 0.2, must=True)
    for _ in range(30):
        forced()
    assert work.runs == 6 and lines[0].startswith("graph: on")


def test_a_graph_is_captured_again_when_memory_moved(recorded_graphs: type[RecordedGraph]) -> None:
    answers = [True, False, False, True, True]  # after a capture, then before each replay
    call, work, _ = graphed(0.2, 0.1, moved=lambda: answers.pop(0) if answers else False)
    for _ in range(30):
        call()
    assert recorded_graphs.made == 2 and work.runs == 5 + 2


def test_an_obstacle_keeps_work_out_of_a_graph(recorded_graphs: type[RecordedGraph]) -> None:
    reason = "no gradient reaches weight"
    call, work, lines = graphed(0.2, 0.1, obstacle=lambda: reason)
    for _ in range(30):
        call()
    assert work.runs == 30 and lines == [f"graph: off, {reason}"]
    must, _, _ = graphed(0.2, 0.1, obstacle=lambda: reason, must=True)
    with pytest.raises(ValueError, match=f"a CUDA graph is not possible: {reason}"):
        for _ in range(30):
            must()


@pytest.mark.parametrize("against", ["obstacle", "capture", "time", "nothing"])
def test_of_several_processes_all_keep_a_graph_or_none_does(
    against: str, recorded_graphs: type[RecordedGraph]
) -> None:
    """This one has nothing against it; the other says so at one of the three times it is asked."""
    asked: list[str | None] = []
    turns = ["obstacle", "capture", "time"]

    def agree(mine: str | None) -> str | None:
        asked.append(mine)
        return mine or ("the other" if turns[len(asked) - 1] == against else None)

    call, work, lines = graphed(0.2, 0.1, agree=agree)
    for _ in range(30):
        call()
    assert asked == [None] * (3 if against == "nothing" else 1 + turns.index(against))
    captured, replays = {
        "obstacle": (0, 0), "capture": (1, 0), "time": (1, 1 + 3), "nothing": (1, 25),
    }[against]  # fmt: skip
    assert (recorded_graphs.made, recorded_graphs.replays) == (captured, replays)
    assert work.total == 30 and work.runs == 30 - replays + captured
    on = "on" if against == "nothing" else "off"
    assert len(lines) == 1 and lines[0].startswith(f"graph: {on}")


def test_what_another_process_has_against_a_graph_that_must_be_is_an_error_in_all(
    recorded_graphs: type[RecordedGraph],
) -> None:
    for turn in (0, 1):
        answers = [None, None]
        answers[turn] = "it failed: ValueError: there"  # type: ignore[call-overload]
        call, _, _ = graphed(0.2, 0.1, agree=lambda mine, a=answers: a.pop(0), must=True)  # type: ignore[misc]
        with pytest.raises(ValueError, match=r"a CUDA graph is not possible: it failed: .*there"):
            for _ in range(30):
                call()


class Breaking(Counter):
    """Work that no graph can hold."""

    def __call__(self) -> Tensor:
        if RecordedGraph.capturing:
            raise RuntimeError("the cause")
        return super().__call__()


@pytest.mark.parametrize("recovers", [True, False])
def test_a_failed_capture_leaves_the_device_as_it_was(
    recovers: bool, recorded_graphs: type[RecordedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[object] = []

    @contextmanager
    def graph(graph: object, pool: object, **options: Any) -> Any:
        pools.append(pool)
        if len(pools) == 1:  # the second is of nothing, for the generator
            assert device_lock(CPU)._is_owned()  # type: ignore[attr-defined]
            monkeypatch.setattr(RecordedGraph, "capturing", True)
        elif not recovers:
            raise RuntimeError("operation not permitted")
        try:
            yield
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error") from None
        finally:
            monkeypatch.setattr(RecordedGraph, "capturing", False)

    monkeypatch.setattr(torch.cuda, "graph", graph)
    call, work, lines = graphed(0.2, 0.1, work=Breaking())
    if not recovers:
        with pytest.raises(RuntimeError, match=r"the cause. Start again with graph='off'"):
            for _ in range(30):
                call()
        return
    for _ in range(30):
        call()
    assert work.runs == 30 and lines == ["graph: off, it failed: RuntimeError: the cause"]
    assert len({id(pool) for pool in (*pools, call._side.pool)}) == 3


def test_what_waits_for_the_device_is_found_before_a_capture(
    recorded_graphs: type[RecordedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    class Waiting(Counter):
        def __call__(self) -> Tensor:
            if modes and modes[-1] == "warn":
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
                warnings.warn("something else", stacklevel=1)
            return super().__call__()

    call, work, lines = graphed(0.2, 0.1, work=Waiting())
    with pytest.warns(UserWarning, match="something else") as told:
        for _ in range(30):
            call()
    assert work.runs == 30 and RecordedGraph.made == 0 and len(told) == 1
    assert "waits for the device: " in lines[0] and "test_graphs.py:" in lines[0]
    assert modes == ["warn", 0]  # as it was


def test_memory_is_let_go_before_a_graph_and_a_pool_without_graphs_is_left(
    recorded_graphs: type[RecordedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator closes a pool with its last graph, and takes no other capture into it."""
    order: list[str] = []
    monkeypatch.setattr(RecordedGraph, "reset", lambda self: order.append("reset"))
    moved = iter([False] * 6 + [True] + [False] * 100)
    release = partial(order.append, "release")
    call, _, _ = graphed(0.2, 0.1, must=True, moved=lambda: next(moved), release=release)
    for _ in range(10):
        call()
    first = call._side.pool
    assert RecordedGraph.made == 1
    for _ in range(10):
        call()
    assert RecordedGraph.made == 2 and order == ["release", "reset"]
    assert call._side.pool is not first
    other = graphed(0.2, 0.1, must=True)[0]
    other._side = call._side
    for _ in range(10):
        other()
    second = call._side.pool
    other.drop()
    assert call._side.pool is second  # a graph still lives there


def cache(**options: Any) -> GraphCache:
    options = {"moved": lambda: lambda: False, "must": True, "log": lambda line: None, **options}
    return GraphCache(CPU, **options)


def double(x: Tensor, y: Tensor | None) -> Tensor:
    return 2 * x if y is None else 2 * x + y


def test_a_cache_replays_with_the_inputs_of_each_call(recorded_graphs: type[RecordedGraph]) -> None:
    held = cache()
    for i in range(CALLS_TO_DECIDE + 3):
        x = torch.full((3,), float(i))
        assert torch.equal(held("double", double, x, None), 2 * x)
        assert torch.equal(held("double", double, x, x), 3 * x)
    assert recorded_graphs.made == 2 and recorded_graphs.replays > 10


@pytest.mark.parametrize(
    "other",
    [
        lambda held, x: held("another", double, x, None),
        lambda held, x: held("double", double, x[:2], None),
        lambda held, x: held("double", double, x.double(), None),
        lambda held, x: held("double", double, x, x),
    ],
    ids=["name", "shape", "dtype", "input"],
)
def test_what_a_graph_depends_on_makes_another(
    recorded_graphs: type[RecordedGraph], other: Callable[[GraphCache, Tensor], Tensor]
) -> None:
    held, x = cache(), torch.ones(3)
    for _ in range(CALLS_TO_DECIDE):
        held("double", double, x, None)
        other(held, x)
    assert recorded_graphs.made == 2


def test_the_least_recently_used_graph_goes(recorded_graphs: type[RecordedGraph]) -> None:
    held = cache(capacity=2)
    a, b, c = (torch.ones(n) for n in (1, 2, 3))
    for x in (a, b):
        for _ in range(CALLS_TO_DECIDE):
            held("double", double, x, None)
    held("double", double, a, None)
    held("double", double, c, None)  # takes the place of b
    made = recorded_graphs.made
    for _ in range(3):
        assert torch.equal(held("double", double, a, None), 2 * a)
    assert recorded_graphs.made == made == 2
    for _ in range(CALLS_TO_DECIDE):
        held("double", double, b, None)
    assert recorded_graphs.made == 3


def test_there_is_one_lock_for_a_device() -> None:
    assert device_lock(CPU) is device_lock(torch.device("cpu"))
    assert device_lock(CPU) is not device_lock(torch.device("meta"))
