"""The training loop: what a run computes, keeps, resumes and refuses."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcm
from fastcm import EMA, ConsistencyDistillation, ConsistencyTraining, FlowMatching, Sampler, Trainer
from fastcm.networks import MLP
from fastcm.runs import checkpoint
from fastcm.training.gradients import Gradients

DATA = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))


def mlp(seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    return MLP(shape=(3,), width=16, depth=1)


def trainer(objective: Any = None, **options: Any) -> Trainer:
    options = {"data": DATA, "batch_size": 8, "compile": False, "progress": False, **options}
    return Trainer(options.pop("net", None) or mlp(), objective or ConsistencyTraining(), **options)


def everything(t: Trainer) -> dict[str, Tensor]:
    """Every tensor of a run."""
    found = {f"net.{k}": v for k, v in t.net.state_dict().items()}
    for i, _ in enumerate(t.averages):
        found |= {f"ema{i}.{k}": v for k, v in t.ema_network(i).state_dict().items()}
    for index, state in t.optimizer.state_dict()["state"].items():
        found |= {f"opt{index}.{k}": v for k, v in state.items()}
    return found


def assert_same(a: Trainer, b: Trainer) -> None:
    x, y = everything(a), everything(b)
    assert x.keys() == y.keys() and a.step == b.step
    assert [k for k in x if not torch.equal(x[k], y[k])] == []


def distillation() -> ConsistencyDistillation:
    teacher = mlp(3)
    nn.init.normal_(list(teacher.parameters())[-1])
    return ConsistencyDistillation(teacher)


@pytest.mark.parametrize("make", [FlowMatching, ConsistencyTraining, distillation])
@pytest.mark.parametrize("compile", [False, True])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    tmp_path: Path, make: Callable[[], Any], compile: bool
) -> None:
    if compile and make is not distillation:
        pytest.skip("compiling is slow: one method stands for all")
    options = {"compile": compile, "lr_schedule": fastcm.warmup_cosine(5, 20)}
    straight = trainer(make(), **options).fit(17)
    trainer(make(), directory=tmp_path, **options).fit(6)
    resumed = trainer(make(), net=mlp(9), directory=tmp_path, **options).load()
    assert resumed.step == 6
    assert_same(resumed.fit(11), straight)


def test_two_fits_are_one(tmp_path: Path) -> None:
    assert_same(trainer().fit(4).fit(5), trainer().fit(9))


def test_resume_with_dropout_continues_the_same_masks(tmp_path: Path) -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.dropout = mlp(), nn.Dropout(0.5)

        def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            return self.net(self.dropout(x), t, cond)

    torch.manual_seed(5)
    straight = trainer(net=Dropped()).fit(8)
    torch.manual_seed(5)
    trainer(net=Dropped(), directory=tmp_path).fit(3)
    resumed = trainer(net=Dropped(), directory=tmp_path).load()
    assert_same(resumed.fit(5), straight)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    straight = trainer().fit(8)
    trainer(directory=tmp_path, save_every=2).fit(6)
    newest = tmp_path / "checkpoints" / "step_000000006" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    resumed = trainer(directory=tmp_path)
    with pytest.warns(UserWarning, match=r"step_000000006.*falling back to .*step_000000004"):
        resumed.load()
    assert resumed.step == 4
    assert_same(resumed.fit(4), straight)


def test_resuming_under_other_options_of_the_optimizer_is_refused(tmp_path: Path) -> None:
    def decayed(weight_decay: float) -> Trainer:
        net = mlp()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=weight_decay)
        return trainer(net=net, optimizer=optimizer, directory=tmp_path)

    decayed(0.1).fit(2)
    with pytest.raises(ValueError, match=r"weight_decay.*0.1.*0.2"):
        decayed(0.2).load()
    assert decayed(0.1).load().step == 2


def test_a_null_condition_that_is_a_tensor_does_not_hinder_saving(tmp_path: Path) -> None:
    cond = torch.randn(64, 3)

    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            return self.net(x + cond, t)

    objective = FlowMatching(condition_dropout=0.5, null_condition=torch.zeros(3))
    batches = list(zip(DATA.split(8), cond.split(8)))
    t = trainer(objective, net=Conditioned(), data=batches, directory=tmp_path).fit(3)
    sampler = Sampler.from_run(tmp_path, net=Conditioned(), null_condition=torch.zeros(3))
    assert torch.isfinite(sampler(8, cond=cond[:8], guidance=2.0)).all() and t.step == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 4}, "batch_size: 8 -> 4"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"objective": ConsistencyTraining(discretization=7)}, "discretization: 40 -> 7"),
        ({"objective": FlowMatching()}, "objective.type"),
        ({"averages": (EMA(0.5),)}, "averages"),
        ({"data": DATA + 1}, "contents"),
        ({"net": MLP(shape=(3,), width=20, depth=1)}, "network.width: 16 -> 20"),
    ],
)
def test_resuming_under_another_configuration_is_refused(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    trainer(directory=tmp_path).fit(2)
    other = trainer(directory=tmp_path, **change)
    before = everything(other)
    with pytest.raises(ValueError, match=r"another configuration.*" + named):
        other.load()
    assert all(torch.equal(v, before[k]) for k, v in everything(other).items())


class Poisoned(nn.Module):
    """A network whose output is NaN on chosen steps."""

    def __init__(self, steps: range) -> None:
        super().__init__()
        self.net, self.steps, self.calls = mlp(), steps, 0

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        out = self.net(x, t, cond)
        if self.training:
            self.calls += 1
            if self.calls - 1 in self.steps:
                out = out * torch.nan
        return out


@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD, torch.optim.RAdam])
def test_a_step_with_a_non_finite_gradient_changes_nothing(optimizer: Any) -> None:
    net = Poisoned(range(3, 5))
    t = trainer(net=net, optimizer=optimizer and optimizer(net.parameters(), lr=1e-3))
    t.fit(3)
    before = {k: v.clone() for k, v in everything(t).items()}
    t.fit(1)
    assert all(torch.equal(v, before[k]) for k, v in everything(t).items())
    t.fit(3)
    assert t.metrics["skipped"] == 2 and t.step == 7
    assert all(torch.isfinite(v).all() for v in everything(t).values())
    assert any(not torch.equal(v, before[k]) for k, v in everything(t).items())


def test_twenty_non_finite_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    t = trainer(net=Poisoned(range(4, 1000)), directory=tmp_path, save_every=4)
    with pytest.raises(fastcm.NonFiniteError, match=r"20 steps in a row|3\d steps in a row"):
        t.fit(100)
    assert t.step <= 40
    assert all(torch.isfinite(v).all() for v in everything(t).values())
    found, damaged = fastcm.runs.checkpoint.load_newest(tmp_path)
    assert not damaged and found.state["step"] >= 4


def test_a_failing_run_keeps_the_checkpoints_from_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.save

    def slowly(*args: Any, **kwargs: Any) -> Path:  # its thread lags behind the training
        time.sleep(0.2)
        return write(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", slowly)
    t = trainer(net=Poisoned(range(7, 1000)), directory=tmp_path, save_every=2)
    with pytest.raises(fastcm.NonFiniteError, match=r"last good checkpoint is .*step_000000006"):
        t.fit(100)
    with pytest.raises(fastcm.NonFiniteError, match="4 steps in a row"):
        trainer(net=Poisoned(range(1000))).fit(4)


def test_labels_beyond_the_networks_classes_are_refused() -> None:
    def net() -> MLP:
        return MLP(shape=(3,), width=16, depth=1, num_classes=2)

    labels = torch.arange(64) % 3
    with pytest.raises(ValueError, match="the data has 3 classes, the network num_classes=2"):
        trainer(net=net(), data=(DATA, labels))
    objective = FlowMatching(condition_dropout=0.1, null_condition=7)
    with pytest.raises(ValueError, match=r"null_condition must be in \[0, 2\], got 7"):
        trainer(objective, net=net(), data=(DATA, labels % 2))


def test_a_frozen_student_is_refused() -> None:
    with pytest.raises(ValueError, match="requires_grad_"):
        trainer(net=mlp().requires_grad_(False))


def test_a_directory_with_a_run_is_not_trained_over(tmp_path: Path) -> None:
    trainer(directory=tmp_path).fit(2)
    with pytest.raises(FileExistsError, match="continue it with load"):
        trainer(directory=tmp_path).fit(2)
    assert trainer(directory=tmp_path).load().fit(1).step == 3


def test_averages_follow_their_definition() -> None:
    t = trainer(FlowMatching(), averages=(EMA(0.9), EMA(0.5)))
    expected = [copy.deepcopy(t.net.state_dict()) for _ in range(2)]
    for _ in range(5):
        t.fit(1)
        for average, beta in zip(expected, (0.9, 0.5)):
            for k, v in t.net.state_dict().items():
                average[k] = average[k].double() * beta + v.double() * (1 - beta)
    for i in range(2):
        for k, v in t.ema_network(i).state_dict().items():
            torch.testing.assert_close(v.double(), expected[i][k].double(), rtol=0, atol=1e-6)


def test_the_target_network_is_shared_with_an_equal_average() -> None:
    assert len(trainer(ConsistencyTraining(target_average=EMA(0.9))).averages) == 2
    shared = trainer(ConsistencyTraining(target_average=EMA(0.9)), averages=(EMA(0.9),))
    assert len(shared.averages) == 1


def test_metrics_are_json_lines_without_repetition_after_a_resume(tmp_path: Path) -> None:
    trainer(directory=tmp_path, log_every=2, save_every=4).fit(7)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "torn')
    for path in (tmp_path / "checkpoints").iterdir():
        if path.name == "step_000000007":
            (path / "state.json").unlink()
    resumed = trainer(directory=tmp_path, log_every=2)
    with pytest.warns(UserWarning):
        resumed.load()
    resumed.fit(4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert all(line["loss"] > 0 and line["img_s"] > 0 for line in lines)


def test_auto_compile_leaves_no_trace_and_a_short_run_does_not_compile() -> None:
    lines: list[str] = []
    auto = trainer(compile="auto", log=lines.append).fit(3)
    assert_same(auto, trainer().fit(3))
    assert len(lines) == 1 and "too few to pay for compiling" in lines[0]


def test_auto_compile_times_both_when_the_run_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    times = iter([1.0, 0.5])
    monkeypatch.setattr(Gradients, "_time", lambda self, compiled, *a: next(times))
    t = trainer(compile="auto", log=lines.append)
    x0 = DATA[:8]
    assert t.state.gradients._choose(x0, None, t.state.key, remaining=1000) is True
    assert lines == ["compile: on, 500.0 ms compiled, 1000.0 ms eager"]


def test_bf16_gives_float32_weights_and_a_close_loss() -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        t = trainer(FlowMatching(), precision=precision).fit(5)
        losses.append(t.metrics["loss"])
        assert all(p.dtype == torch.float32 for p in t.net.parameters())
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.02 * losses[0]


def test_a_loader_of_batches_trains_like_the_tensor_it_reads() -> None:
    def batches() -> Iterator[Tensor]:
        for i in range(0, 64, 8):
            yield DATA[i : i + 8]

    t = trainer(data=list(batches())).fit(9)
    assert t.step == 9 and torch.isfinite(torch.tensor(t.metrics["loss"]))


def test_the_sampler_of_a_run_uses_its_averages(tmp_path: Path) -> None:
    t = trainer(directory=tmp_path).fit(5)
    for ema, net in ((0, t.ema_network(0)), (1, t.ema_network(1)), (-1, t.net)):
        mine = Sampler.from_run(tmp_path, ema=ema, steps=2)(4, seed=1)
        assert torch.equal(mine, Sampler(net, fastcm.Linear(), steps=2, shape=(3,))(4, seed=1))
    with pytest.raises(ValueError, match=r"ema must be in \[-1, 2\).*got 5"):
        Sampler.from_run(tmp_path, ema=5)


def test_a_run_of_an_undescribed_network_asks_for_it(tmp_path: Path) -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            return self.layer(x) * t[:, None]

    t = trainer(net=Mine(), directory=tmp_path).fit(2)
    with pytest.raises(ValueError, match="give from_run"):
        Sampler.from_run(tmp_path)
    x = Sampler.from_run(tmp_path, net=Mine())(4)
    assert torch.equal(x, Sampler(t.ema_network(0), fastcm.Linear(), shape=(3,))(4))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"log_every": 0}, "log_every"),
        ({"keep": 0}, "keep"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"precision": "fp8"}, "precision"),
        ({"compile": "sometimes"}, "compile"),
        ({"seed": -1}, "seed"),
        ({"data": torch.empty(0, 3)}, "empty"),
    ],
)
def test_bad_arguments_are_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        trainer(**options)


def test_a_teacher_that_is_the_student_is_refused() -> None:
    net = mlp()
    with pytest.raises(ValueError, match="shares parameters"):
        trainer(ConsistencyDistillation(net), net=net)


def test_a_network_of_another_output_shape_is_refused() -> None:
    class Wide(nn.Linear):
        def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            return super().forward(x)

    with pytest.raises(ValueError, match=r"shape of its input, \[8, 3\], got \[8, 5\]"):
        trainer(FlowMatching(), net=Wide(3, 5)).fit(1)
