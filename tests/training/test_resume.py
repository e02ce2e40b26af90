"""What a resumed run is, what is saved while it trains, and how it ends early."""

from __future__ import annotations

import functools
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcm
from fastcm import (
    EMA,
    ConsistencyTraining,
    DelayedEMA,
    HalfLifeEMA,
    PowerEMA,
    Trainer,
    WarmupEMA,
)
from fastcm.networks import MLP
from fastcm.runs import checkpoint
from fastcm.runs.checkpoint import list_checkpoints, load, step_of
from fastcm.runs.lock import RunLock
from fastcm.training import writer

DATA = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
TARGET = EMA(0.9)


def mlp(seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    return MLP(shape=(3,), width=16, depth=1)


def trainer(directory: Path | None = None, net: nn.Module | None = None, **options: Any) -> Trainer:
    """Three averages; an epoch is 6.25 steps, the warm-up 7."""
    options = {
        "averages": (EMA(0.99, warmup=True), PowerEMA(0.1), TARGET),
        "lr_schedule": fastcm.warmup_cosine(7, 40),
        **{"compile": False, "progress": False, "batch_size": 8, "data": DATA, **options},
    }
    objective = ConsistencyTraining(target_average=TARGET)
    return Trainer(net or mlp(), objective, directory=directory, **options)


def state(run: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint."""
    groups = load(list_checkpoints(run)[0]).groups
    return {f"{group}.{k}": v for group, tensors in groups.items() for k, v in tensors.items()}


def assert_same(a: Path, b: Path) -> None:
    x, y = state(a), state(b)
    assert x.keys() == y.keys() and len({k.split(".")[0] for k in x}) == 7
    assert [k for k in x if not torch.equal(x[k], y[k])] == []


def test_a_run_stopped_after_any_step_and_resumed_is_the_uninterrupted_one(tmp_path: Path) -> None:
    trainer(tmp_path / "straight").fit(20)
    for step in range(1, 20):
        run = tmp_path / str(step)
        trainer(run).fit(step)
        resumed = trainer(run, mlp(9)).load()
        assert resumed.step == step
        resumed.fit(20 - step)
        assert_same(run, tmp_path / "straight")


def test_a_compiled_run_stopped_and_resumed_is_the_uninterrupted_one(tmp_path: Path) -> None:
    trainer(tmp_path / "straight", compile=True).fit(20)
    run = tmp_path / "stopped"
    trainer(run, compile=True).fit(9)  # in the second epoch, after the warm-up
    trainer(run, mlp(9), compile=True).load().fit(11)
    assert_same(run, tmp_path / "straight")


def test_a_run_is_described_and_resumed_with_every_kind_of_average(tmp_path: Path) -> None:
    kinds = [WarmupEMA(0.9), HalfLifeEMA(40, 8, 0.5), DelayedEMA(PowerEMA(0.1), 6)]
    for kind in kinds:
        run, straight = tmp_path / type(kind).__name__, tmp_path / f"{type(kind).__name__}-straight"
        averages: dict[str, Any] = {"averages": (kind, PowerEMA(0.1), TARGET)}
        trainer(straight, **averages).fit(9)
        trainer(run, **averages).fit(4)
        trainer(run, mlp(9), **averages).load().fit(5)
        assert_same(run, straight)
    other: dict[str, Any] = {"averages": (DelayedEMA(PowerEMA(0.1), 7), PowerEMA(0.1), TARGET)}
    with pytest.raises(ValueError, match=r"'start': 6.*'start': 7"):
        trainer(run, **other).load()


MOMENTUM = functools.partial(torch.optim.SGD, momentum=0.9)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, MOMENTUM, torch.optim.Adafactor])
def test_a_run_under_an_optimizer_of_torch_resumes(tmp_path: Path, optimizer: Any) -> None:
    def make(run: str, seed: int = 0) -> Trainer:
        net = mlp(seed)
        return trainer(tmp_path / run, net, optimizer=optimizer(net.parameters(), lr=1e-3))

    make("straight").fit(11)
    make("stopped").fit(8)
    make("stopped", 9).load().fit(3)
    assert_same(tmp_path / "stopped", tmp_path / "straight")


class Poisoned(nn.Module):
    """A network whose gradient is NaN in a chosen step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.net, self.step = mlp(), step
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        self.calls += self.training
        poison = self.training and self.calls == self.step
        return self.net(x, t, cond) * (torch.nan if poison else 1)


def test_a_resumed_run_remembers_the_steps_that_were_skipped(tmp_path: Path) -> None:
    trainer(tmp_path, Poisoned(3)).fit(6)
    resumed = trainer(tmp_path, Poisoned(0)).load()
    assert resumed.update.counts.tolist() == [6, 1, 0]
    assert resumed.fit(2).metrics["skipped"] == 1


class Gate:
    """`checkpoint.save`, held up until it is told to go on, perhaps with an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self.running = self.most = 0
        self._real = checkpoint.save
        monkeypatch.setattr(writer.checkpoint, "save", self._save)

    def _save(self, *args: Any, **options: Any) -> Path:
        self.running += 1
        self.most = max(self.most, self.running)
        self.entered.set()
        try:
            assert self.open.wait(60)
            if self.error is not None:
                raise self.error
            return self._real(*args, **options)
        finally:
            self.running -= 1


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, events = Gate(monkeypatch), []

    def callback(t: Trainer, event: str) -> None:
        if event == "step":
            events.append(t.step)
            if t.step == 9:
                gate.open.set()
        if event == "save":
            assert t.saved is not None and checkpoint.is_intact(t.saved)
            assert threading.current_thread() is threading.main_thread()
            events.append(t.saved.name)

    trainer(tmp_path / "run", save_every=5, callbacks=[callback]).fit(10)
    assert gate.most == 1
    assert events[:9] == list(range(1, 10))
    assert [e for e in events if isinstance(e, str)] == ["step_000000005", "step_000000010"]
    monkeypatch.undo()
    trainer(tmp_path / "short").fit(5)
    middle = load(tmp_path / "run" / "checkpoints" / "step_000000005")
    short = load(tmp_path / "short" / "checkpoints" / "step_000000005")
    for group, tensors in short.groups.items():
        assert all(torch.equal(middle.groups[group][k], v) for k, v in tensors.items())


def test_the_next_save_waits_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    threading.Timer(0.3, gate.open.set).start()
    trainer(tmp_path, save_every=1, keep=9).fit(6)
    assert gate.most == 1 and len(list_checkpoints(tmp_path)) == 6


def test_an_error_of_the_writer_is_raised_by_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    gate.error = OSError(28, "No space left on device")
    gate.open.set()
    t = trainer(tmp_path, save_every=3)
    with pytest.raises(OSError, match="No space left") as caught:
        t.fit(20)
    assert caught.value is gate.error and t.step == 6
    gate.error = None
    assert step_of(t.save()) == 6
    assert t.fit(1).step == 7


def test_an_error_of_the_last_write_is_raised_by_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    gate.error = OSError(28, "No space left on device")
    gate.open.set()
    with pytest.raises(OSError, match="No space left"):
        trainer(tmp_path).fit(3)


def test_a_fit_that_fails_completes_its_write_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)

    def fail(t: Trainer, event: str) -> None:
        if event == "step" and t.step == 4:
            assert gate.entered.wait(60)
            threading.Timer(0.3, gate.open.set).start()
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        trainer(tmp_path, save_every=3, callbacks=[fail]).fit(9)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [3]
    with RunLock(tmp_path):
        pass


def test_a_keyboard_interrupt_waits_for_nothing_and_load_for_the_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)

    def interrupt(t: Trainer, event: str) -> None:
        if event == "step" and t.step == 4:
            assert gate.entered.wait(60)
            raise KeyboardInterrupt

    t = trainer(tmp_path, save_every=3, callbacks=[interrupt])
    with pytest.raises(KeyboardInterrupt):
        t.fit(9)
    assert list_checkpoints(tmp_path) == [] and gate.running == 1
    with pytest.raises(BlockingIOError, match="another trainer of this process"):
        RunLock(tmp_path).__enter__()  # the run is in use until the thread is done
    threading.Timer(0.3, gate.open.set).start()
    assert t.load().step == 3


def test_every_mth_step_is_saved_and_kept_for_ever(tmp_path: Path) -> None:
    trainer(tmp_path, save_every=2, keep=2, keep_every=5).fit(21)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [21, 20, 15, 10, 5]
    with pytest.raises(ValueError, match="keep_every must be >= 0, got -1"):
        trainer(keep_every=-1)


def test_a_trainer_behind_the_checkpoints_of_its_directory_is_refused(tmp_path: Path) -> None:
    behind = trainer(tmp_path).fit(3)
    trainer(tmp_path).load().fit(4)
    with pytest.raises(FileExistsError, match=r"step_000000007, and this trainer is at step 3"):
        behind.fit(1)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [7, 3]
    assert behind.load().fit(1).step == 8


def test_metrics_of_a_run_killed_before_its_first_checkpoint_are_not_repeated(
    tmp_path: Path,
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n{"step": 4}\n{"st')
    trainer(tmp_path, log_every=2).fit(5)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 5]


def test_no_clock_is_asked_for_the_order_of_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 2e9

    def backwards() -> float:
        nonlocal now
        now -= 3600
        return now

    monkeypatch.setattr(time, "time", backwards)
    monkeypatch.setattr(time, "time_ns", lambda: int(backwards() * 1e9))

    def age(t: Trainer, event: str) -> None:
        if event == "save":
            for path in [p for p in tmp_path.rglob("*") if p.exists()]:
                os.utime(path, (backwards(), now))

    trainer(tmp_path / "run", save_every=2, keep=2, callbacks=[age]).fit(7)
    resumed = trainer(tmp_path / "run", mlp(9), keep=2).load()
    assert resumed.step == 7
    resumed.fit(3)
    assert [step_of(path) for path in list_checkpoints(tmp_path / "run")] == [10, 7]
    monkeypatch.undo()
    trainer(tmp_path / "straight").fit(10)
    assert_same(tmp_path / "run", tmp_path / "straight")
