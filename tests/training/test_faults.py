"""Runs that are killed, stopped, locked out, or have no room: what is left continues."""

from __future__ import annotations

import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastcm.runs import checkpoint
from fastcm.runs.checkpoint import list_checkpoints, load, step_of
from fastcm.runs.lock import RunLock

if os.name != "posix":
    pytest.skip("signals, forks and limits of POSIX", allow_module_level=True)

SCRIPT = Path(__file__).parents[1] / "fault_runs.py"


class Server:
    """Starts runs, one at a time, and reads what they tell."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])},
            start_new_session=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.told: list[str] = []
        self._running = 0
        self.until("listening")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\n"))

    def start(self, directory: Path, steps: int, **options: Any) -> int:
        """Start a run up to a step; returns its process."""
        assert self._process.stdin is not None
        self._end()
        self.told = []
        job = {"directory": str(directory), "steps": steps, **options}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        self._running = int(self.until("started"))
        return self._running

    def _end(self) -> None:
        """Kill what a test that failed has left running."""
        if self._running:
            os.kill(self._running, signal.SIGKILL)
            self.until("ended")

    def until(self, word: str) -> str:
        """Wait for a line that begins with a word; returns the rest."""
        while True:
            line = self._lines.get(timeout=60)
            self.told.append(line)
            first, _, rest = line.partition(" ")
            if first == "ended":
                self._running = 0
            if first == word:
                return rest

    def run(self, directory: Path, steps: int, **options: Any) -> list[str]:
        """A run that ends by itself; returns what it told."""
        self.start(directory, steps, **options)
        self.until("ended")
        return self.told

    def close(self) -> None:
        assert self._process.stdin is not None
        self._end()
        self._process.stdin.close()
        self._process.wait(timeout=60)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def contents(path: Path) -> dict[str, bytes]:
    """Every tensor file of a checkpoint: equal bytes are equal tensors."""
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


def left_overs(run: Path) -> list[str]:
    wrong = (".writing", ".removing")
    return [p.name for p in run.rglob("*") if p.name.startswith(wrong) or p.name.endswith(".old")]


def test_a_run_killed_at_any_instant_ends_as_if_it_had_not_been(
    server: Server, tmp_path: Path, seed: int, request: pytest.FixtureRequest
) -> None:
    kills, draw = request.config.option.kills, random.Random(seed)
    run = tmp_path / "killed"
    announced = resumed = 0
    for _ in range(kills):
        pid = server.start(run, 10**6, save_every=draw.choice([1, 2, 5]), keep=2, keep_every=25)
        if draw.random() < 0.7:  # the others may still be starting or reading the checkpoint
            server.until("ready")
        time.sleep(draw.uniform(0.0, 0.3))
        os.kill(pid, signal.SIGKILL)
        assert server.until("ended") == str(-signal.SIGKILL)
        found = {step_of(path): load(path).state["step"] for path in list_checkpoints(run)}
        assert all(name == step for name, step in found.items())
        ready = [int(line.split()[1]) for line in server.told if line.startswith("ready")]
        saved = [int(line.split()[1]) for line in server.told if line.startswith("saved")]
        assert all(step >= announced for step in ready), "a complete checkpoint was lost"
        announced = max([announced, *saved])
        newest = max(found, default=0)
        assert newest >= announced, "a complete checkpoint was lost"
        wanted = set(range(25, newest + 1, 25))
        assert wanted <= found.keys(), "a checkpoint to keep for ever was dropped"
        resumed += bool(ready and ready[0])
    assert resumed >= kills // 4, "too few of the runs got as far as to resume"

    steps = max(map(step_of, list_checkpoints(run)), default=0) + 10
    assert server.run(run, steps, save_every=3, keep=2, keep_every=25)[-2] == f"done {steps}"
    newest = {steps, max((steps - 1) // every * every for every in (3, 25))}
    assert set(map(step_of, list_checkpoints(run))) == newest | set(range(25, steps + 1, 25))
    assert server.run(tmp_path / "straight", steps)[-2] == f"done {steps}"
    killed, straight = (list_checkpoints(tmp_path / name)[0] for name in ("killed", "straight"))
    assert step_of(killed) == step_of(straight) == steps
    assert contents(killed) == contents(straight)
    assert len(contents(killed)) == 7 and left_overs(run) == []
    lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(set(lines)) and set(range(5, steps, 5)) <= set(lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_after_the_step_with_a_checkpoint(
    server: Server, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    pid = server.start(run, 10**6, pause=0.02)
    server.until("step")
    os.kill(pid, number)
    assert server.until("interrupted") == number.name
    step = int(server.until("done"))
    assert server.until("ended") == "0"
    assert [step_of(path) for path in list_checkpoints(run)] == [step]
    server.run(run, step + 5)
    server.run(tmp_path / "straight", step + 5)
    assert contents(list_checkpoints(run)[0]) == contents(
        list_checkpoints(tmp_path / "straight")[0]
    )


def test_a_second_signal_stops_at_once(server: Server, tmp_path: Path) -> None:
    pid = server.start(tmp_path / "run", 10**6, pause=300)
    server.until("step")
    start = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.3)
    os.kill(pid, signal.SIGTERM)
    assert server.until("ended") == str(-signal.SIGTERM)
    assert time.monotonic() - start < 30 and list_checkpoints(tmp_path / "run") == []


def test_a_second_trainer_of_a_run_is_refused_by_the_name_of_the_first(
    server: Server, tmp_path: Path
) -> None:
    pid = server.start(tmp_path, 10**6, pause=0.02, save_every=1)
    server.until("saved")
    with pytest.raises(BlockingIOError, match=rf"in use: process {pid} \(.*fault_runs.py\)"):
        RunLock(tmp_path).__enter__()
    os.kill(pid, signal.SIGKILL)
    server.until("ended")
    with RunLock(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_what_a_killed_process_forked_does_not_keep_its_lock(
    server: Server, tmp_path: Path
) -> None:
    pid = server.start(tmp_path, 10**6, pause=0.02, forks=True)
    orphan = int(server.until("forked"))
    try:
        os.kill(pid, signal.SIGKILL)
        server.until("ended")
        os.kill(orphan, 0)  # it lives
        with RunLock(tmp_path):
            pass
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_a_full_disk_stops_a_run_with_its_checkpoints_intact(
    server: Server, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    server.run(run, 6, save_every=3)
    before = {path.name: contents(path) for path in list_checkpoints(run)}
    told = server.run(run, 20, save_every=3, file_bytes=2000)
    assert told[-1] == "ended 1" and left_overs(run) == []
    assert "could not write checkpoint" in told[-2] and "the last good one is" in told[-2]
    assert told[-2].startswith("error OSError: [Errno 27]")  # as it was raised in the thread
    assert {path.name: contents(path) for path in list_checkpoints(run)} == before
    server.run(run, 20, save_every=3)
    server.run(tmp_path / "straight", 20)
    assert contents(list_checkpoints(run)[0]) == contents(
        list_checkpoints(tmp_path / "straight")[0]
    )


def test_a_directory_that_cannot_be_written_to_is_refused_before_the_first_step(
    server: Server,
) -> None:
    home = Path(tempfile.mkdtemp())
    try:
        run = home / "run"
        run.mkdir()
        home.chmod(0o755)
        run.chmod(0o555)
        told = server.run(run, 5, unprivileged=True, pause=0.001)
        assert told[-2].startswith("error PermissionError") and str(run) in told[-2]
        assert not any(line.startswith("step") for line in told)
        assert list(run.iterdir()) == []
    finally:
        shutil.rmtree(home)


def test_a_directory_that_turns_read_only_stops_the_run(server: Server) -> None:
    home = Path(tempfile.mkdtemp())
    try:
        home.chmod(0o777)
        run = home / "run"
        pid = server.start(run, 10**6, unprivileged=True, pause=0.02, save_every=1, keep=100)
        server.until("saved")
        (run / "checkpoints").chmod(0o555)
        assert "could not write checkpoint" in server.until("error")
        server.until("ended")
        assert list_checkpoints(run) and pid
        assert all(checkpoint.is_intact(path) for path in list_checkpoints(run))
    finally:
        shutil.rmtree(home)


def test_a_path_below_a_file_is_refused(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = server.run(tmp_path / "file" / "run", 5)
    assert told[-2].startswith("error NotADirectoryError")
