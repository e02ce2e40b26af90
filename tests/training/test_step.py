"""The training step: rows, noise and gradients of a batch, and when a graph of it is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BACKENDS
from recorded_graphs import RecordedGraph
from torch import Tensor, nn

import fastcm
from fastcm import (
    ConsistencyDistillation,
    ConsistencyFlowMatching,
    ConsistencyTraining,
    EasyConsistency,
    FlowMatching,
    NoiseKey,
    Trainer,
)
from fastcm.networks import MLP, DiT
from fastcm.objectives.base import Loss
from fastcm.optim import one_sweep
from fastcm.training import NonFiniteError, finite
from fastcm.training.blocks import compile_blocks
from fastcm.training.gradients import Gradients
from fastcm.training.logging import Reading
from fastcm.training.processes import Processes

DATA = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))


def trainer(objective: Any = None, net: nn.Module | None = None, **options: Any) -> Trainer:
    torch.manual_seed(0)
    net = net or MLP(shape=(3,), width=16, depth=1)
    options = {"data": DATA, "batch_size": 12, "compile": False, "progress": False, **options}
    return Trainer(net, objective or ConsistencyTraining(), **options)


class Recorder(nn.Module):
    """A network that keeps what it was called with, and what its dropout left."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner = MLP(shape=(3,), width=16, depth=1)
        self.dropout = nn.Dropout(dropout)
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        self.calls.append((x.detach().clone(), t.clone()))
        scale = self.dropout(torch.ones(len(x), 3))
        self.kept.append(scale > 0)
        out: Tensor = self.inner(x, t) * scale
        return out


def teacher() -> MLP:
    torch.manual_seed(3)
    net = MLP(shape=(3,), width=16, depth=1)
    nn.init.normal_(list(net.parameters())[-1])
    return net


@pytest.mark.parametrize(
    "make", [FlowMatching, ConsistencyTraining, lambda: ConsistencyDistillation(teacher())]
)
def test_micro_batches_have_the_gradient_noise_and_parameters_of_the_whole(
    make: Callable[[], Any],
) -> None:
    whole, parts = Recorder(), Recorder()
    parts.load_state_dict(whole.state_dict())
    a = trainer(make(), whole).fit(1)
    b = trainer(make(), parts, accumulate=4).fit(1)
    students = [call for call in parts.calls if call[0].requires_grad or len(call[0]) == 3]
    assert len(students) % 4 == 0
    xs, ts = (torch.cat(c) for c in zip(*students))
    assert all(torch.equal(x, y) for x, y in zip((xs, ts), whole.calls[-1]))
    a.fit(10)
    b.fit(10)
    for p, q in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert a.metrics["loss"] == pytest.approx(b.metrics["loss"], rel=1e-5)


@pytest.mark.parametrize(("batch", "accumulate"), [(12, 5), (12, 0), (8, 3)])
def test_a_batch_that_does_not_divide_is_refused(batch: int, accumulate: int) -> None:
    with pytest.raises(ValueError, match="accumulate"):
        trainer(batch_size=batch, accumulate=accumulate)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConsistencyTraining(target_average=None),
        lambda: ConsistencyTraining.improved(100),
        lambda: EasyConsistency(),
        lambda: ConsistencyDistillation(teacher(), target_average=None),
        lambda: ConsistencyFlowMatching(target_average=None),
    ],
)
def test_student_and_target_masks_are_equal_under_objectives_that_share_weights(
    make: Callable[[], Any],
) -> None:
    net = Recorder(dropout=0.5)
    t = trainer(make(), net)
    assert len(t.averages) == 1  # no average for a target
    t.fit(3)
    pairs = list(zip(net.kept[::2], net.kept[1::2]))
    assert len(pairs) == 3 and all(torch.equal(target, student) for target, student in pairs)
    assert not torch.equal(pairs[0][0], pairs[1][0])
    assert all(0 < mask.float().mean() < 1 for mask, _ in pairs)


def test_an_average_as_target_needs_no_shared_mask() -> None:
    net = Recorder(dropout=0.5)
    t = trainer(ConsistencyTraining(), net)
    t.fit(1)
    assert len(net.kept) == 1  # the target is another module, in eval mode


def test_shared_masks_are_not_compiled() -> None:
    objective = ConsistencyTraining(target_average=None)
    with pytest.raises(ValueError, match="dropout masks, which compiled code does not keep"):
        trainer(objective, Recorder(dropout=0.5), compile=True)
    assert (
        trainer(objective, Recorder(dropout=0.5), compile="auto").state.gradients.compiled is False
    )
    assert trainer(objective, Recorder(), compile="auto").state.gradients.compiled is None


def test_the_student_as_target_gets_no_gradient_through_it() -> None:
    net = Recorder()
    loss: Loss = ConsistencyTraining(target_average=None, discretization=2).loss(
        net, fastcm.Batch(DATA[:8], NoiseKey(1))
    )
    loss.mean.backward()
    frozen = copy.deepcopy(net).requires_grad_(False)
    other = Recorder()
    other.load_state_dict(net.state_dict())
    ConsistencyTraining(discretization=2).loss(
        other, fastcm.Batch(DATA[:8], NoiseKey(1)), frozen
    ).mean.backward()
    for p, q in zip(net.parameters(), other.parameters()):
        assert torch.equal(p.grad, q.grad)


def test_regional_compilation_trains_like_eager_code() -> None:
    data = torch.randn(16, 2, 4, 4)
    runs = []
    for compile in (False, "regional"):
        torch.manual_seed(0)
        net = DiT(2, 4, width=24, depth=3, num_heads=2)
        t = trainer(FlowMatching(), net, data=data, batch_size=4, compile=compile).fit(3)
        runs.append(torch.cat([p.detach().flatten() for p in t.net.parameters()]))
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)


def test_regional_compilation_finds_the_blocks_that_repeat() -> None:
    net = DiT(2, 4, width=24, depth=3, num_heads=2)
    compile_blocks(net)
    compiled = [n for n, m in net.named_modules() if m._compiled_call_impl is not None]
    assert len(compiled) == 3 and {type(net.get_submodule(n)).__name__ for n in compiled} == {
        "Block"
    }


def test_a_recompilation_in_the_middle_of_a_run_is_an_error() -> None:
    g = Gradients(MLP(shape=(3,), width=8, depth=1), FlowMatching(), None, compile=True)
    key = NoiseKey(0)
    for _ in range(3):
        g(DATA[:8], None, key)
    with pytest.raises(RuntimeError, match="recompile"):
        g(DATA[:9].double(), None, key)


def test_metrics_name_what_is_scheduled() -> None:
    curriculum = fastcm.schedules.ICTCurriculum(100, s0=10, s1=40)
    t = trainer(ConsistencyTraining(discretization=curriculum), log_every=1)
    t.fit(5)
    m = t.metrics
    assert m["step"] == 5 and m["skipped"] == 0 and m["lr"] == 1e-3
    assert m["intervals"] == curriculum.points(torch.tensor(4)).item() - 1
    assert m["ema_0"] == pytest.approx(5 / 14) and m["ema_1"] == 0.9
    assert m["grad_norm"] > 0 and m["memory_mb"] > 10 and m["loss"] > 0


def test_a_graph_is_refused_where_there_is_none() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="a CUDA graph needs a GPU"):
            trainer(graph="step")
    with pytest.raises(ValueError, match="graph must be 'auto', 'step' or 'off', got 'on'"):
        trainer(graph="on")


def captured(method: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Trainer]:
    """A run whose steps are launched, and one whose steps are replayed."""
    monkeypatch.setattr(one_sweep, "choose", BACKENDS["plain"])
    objectives = {
        "flow": FlowMatching(),
        "ct": ConsistencyTraining(discretization=fastcm.schedules.ICTCurriculum(100)),
        "cd": ConsistencyDistillation(teacher()),
    }
    schedule = fastcm.warmup_cosine(5, 60)
    return [
        trainer(objectives[method], graph=graph, lr_schedule=schedule, **options)
        for graph in ("off", "step")
    ]


def state(t: Trainer) -> list[Tensor]:
    nets = [t.net, *t.update.networks]
    held = [p for net in nets for p in net.parameters()]
    return [v.detach().clone() for v in [*held, t.state.key.tensor, t.update.counts]]


@pytest.mark.parametrize("method", ["flow", "ct", "cd"])
def test_a_replayed_run_is_bitwise_the_launched_one(
    method: str, recorded_graphs: type[RecordedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across epochs, under learning rates, decays and N(k) that change in every step."""
    launched, replayed = captured(method, monkeypatch)
    for p, q in zip(*(state(t.fit(30)) for t in (launched, replayed))):
        assert torch.equal(p, q)
    assert recorded_graphs.made == 1 and recorded_graphs.replays == 14
    assert launched.metrics["loss"] == replayed.metrics["loss"]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", ["flow", "ct", "cd"])
def test_a_replayed_run_of_a_process_group_is_bitwise_the_launched_one(
    method: str,
    accumulate: int,
    recorded_graphs: type[RecordedGraph],
    monkeypatch: pytest.MonkeyPatch,
    group_of_one: None,
) -> None:
    """What averages the gradients is in the graph."""
    monkeypatch.setattr(Processes, "carrier", lambda self, device: "nccl")
    runs = captured(method, monkeypatch, parallel="ddp", accumulate=accumulate)
    for p, q in zip(*(state(t.fit(30)) for t in runs)):
        assert torch.equal(p, q)
    assert recorded_graphs.made == 1 and recorded_graphs.replays == 14
    reduced = [str(call[0]) for call in recorded_graphs.last.calls]
    assert reduced.count("c10d.allreduce_.default") == 1


def test_gradients_that_travel_through_the_host_keep_a_step_out_of_a_graph(
    recorded_graphs: type[RecordedGraph], group_of_one: None
) -> None:
    with pytest.raises(ValueError, match="gradients travel by gloo, and a CUDA graph holds"):
        trainer(graph="step", parallel="ddp")


def test_a_replayed_run_goes_on_from_a_load(
    recorded_graphs: type[RecordedGraph], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = captured("ct", monkeypatch)
    for i, t in enumerate(runs):
        t.fit(25).save(tmp_path / str(i))
        t.fit(5)
        t.load(tmp_path / str(i)).fit(7)
    for p, q in zip(*map(state, runs)):
        assert torch.equal(p, q)


def test_micro_batches_and_host_batches_are_replayed_too(
    recorded_graphs: type[RecordedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    for options in ({"accumulate": 2}, {"data": list(DATA[:36].split(12))}):
        for p, q in zip(*(state(t.fit(25)) for t in captured("ct", monkeypatch, **options))):
            assert torch.equal(p, q)


def test_a_parameter_without_gradient_keeps_a_step_out_of_a_graph(
    recorded_graphs: type[RecordedGraph],
) -> None:
    class Idle(MLP):
        def __init__(self) -> None:
            super().__init__((3,), width=8, depth=1)
            self.idle = nn.Parameter(torch.zeros(1))

    lines: list[str] = []
    t = trainer(FlowMatching(), Idle(), graph="auto", log=lines.append).fit(25)
    assert t.step == 25 and recorded_graphs.made == 0
    assert lines == ["graph: off, no gradient reaches idle, which a graph would never update"]


def test_single_steps_train_as_fit_does() -> None:
    fitted = trainer().fit(7)
    stepped = trainer()
    stepped.net.eval()
    losses = [float(stepped.train_step()) for _ in range(7)]
    assert stepped.step == 7 and losses[-1] == fitted.metrics["loss"]
    for p, q in zip(fitted.net.parameters(), stepped.net.parameters()):
        assert torch.equal(p, q)


def test_gradients_that_are_no_numbers_are_noticed_when_the_device_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Late(Reading):
        polls = 0

        @property
        def arrived(self) -> bool:
            Late.polls += 1
            return Late.polls > 5

    monkeypatch.setattr(finite, "Reading", Late)
    t = trainer(FlowMatching())
    next(t.net.parameters()).data.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="for 20 steps in a row, up to step 20;"):
        t.fit(100)
    assert t.step == 25
