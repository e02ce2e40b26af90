"""How a run ends early, who may write to its directory, and what else is written there."""

from __future__ import annotations

import errno
import json
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_runs import make

from fastcm import Trainer
from fastcm.runs import lock as locks
from fastcm.runs.checkpoint import list_checkpoints, step_of
from fastcm.training.interrupt import StopSignals

pytestmark = pytest.mark.usefixtures("default_handlers")


def stop_at(step: int, number: signal.Signals) -> Callable[[Trainer, str], None]:
    def callback(t: Trainer, event: str) -> None:
        if event == "step" and t.step == step:
            signal.raise_signal(number)

    return callback


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_fit_returns_early_with_the_signal_and_handlers_as_before(
    tmp_path: Path, number: signal.Signals
) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    t = make(tmp_path, callbacks=[stop_at(3, number)]).fit(10)
    assert t.interrupted is number and t.step == 4
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [4]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert t.fit(2).interrupted is None and t.step == 6


def test_a_signal_without_a_directory_ends_fit_too() -> None:
    t = make(None, callbacks=[stop_at(3, signal.SIGTERM)]).fit(10)
    assert t.interrupted is signal.SIGTERM and t.step == 4


def test_handlers_of_the_program_stay() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        t = make(None, callbacks=[stop_at(3, signal.SIGTERM)]).fit(5)
        assert seen == [signal.SIGTERM] and t.interrupted is None and t.step == 5
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert make(None, callbacks=[stop_at(3, signal.SIGTERM)]).fit(5).step == 5
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_interrupt_is_a_keyboard_interrupt() -> None:
    def twice(t: Trainer, event: str) -> None:
        if event == "step" and t.step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    t = make(None, callbacks=[twice])
    with pytest.raises(KeyboardInterrupt):
        t.fit(10)
    assert t.step == 3 and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_trainer_in_another_thread_leaves_signals_alone() -> None:
    found: list[Any] = []

    def run() -> None:
        with StopSignals():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def test_two_trainers_of_one_process_are_kept_apart(tmp_path: Path) -> None:
    def second(t: Trainer, event: str) -> None:
        if event == "step" and t.step == 2:
            with pytest.raises(BlockingIOError, match="another trainer of this process"):
                make(tmp_path).fit(1)
            t.save()  # the first may save whenever it likes

    t = make(tmp_path, callbacks=[second]).fit(3)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [3, 2] and t.step == 3


@pytest.mark.parametrize("missing", ["module", "support"])
def test_without_locks_training_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    if missing == "module":
        monkeypatch.setattr(locks, "fcntl", None)
    else:

        def flock(descriptor: int, operation: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(locks.fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="not locked: (this platform has no|its file system)"):
        assert make(tmp_path).fit(2).step == 2
    assert len(list_checkpoints(tmp_path)) == 1


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make(tmp_path, tensorboard=True, log_every=2, save_every=4).fit(7)
    last = list_checkpoints(tmp_path)[0]
    assert step_of(last) == 7
    (last / "state.json").unlink()
    resumed = make(tmp_path, tensorboard=True, log_every=2)
    with pytest.warns(UserWarning, match="falling back"):
        resumed.load()
    resumed.fit(4)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = {event.step: event.value for event in found.Scalars("loss")}
    assert [event.step for event in found.Scalars("loss")] == [2, 4, 6, 8]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    wanted = {m["step"]: m["loss"] for m in map(json.loads, lines)}
    assert losses == pytest.approx(wanted) and {"lr", "grad_norm", "it_s"} <= set(
        found.Tags()["scalars"]
    )


def test_tensorboard_that_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="tensorboard=True needs a run directory"):
        make(None, tensorboard=True)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        make(tmp_path, tensorboard=True)
