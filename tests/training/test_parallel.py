"""Processes that train as one: the same weights, at any number of them, and the same end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_runs import (
    CASES,
    IN_FOUR,
    INVARIANT,
    STEPS,
    everything,
    killed,
    resumed,
    trainer,
    work,
)
from torch import Tensor

from fastcm.runs.checkpoint import list_checkpoints, load
from fastcm.training import parallel

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed")

Found = dict[str, Any]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def spawned(work: Callable[..., None], world: int, folder: Path, *given: object) -> list[Found]:
    """What each of several processes found; a traceback where it failed."""
    context = torch.multiprocessing.spawn(
        work, (world, free_port(), str(folder), *given), nprocs=world, join=False
    )
    deadline = time.monotonic() + 240
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the processes wait for each other")
    return [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[Found]:
    return spawned(work, 2, folder, True)


@pytest.fixture(scope="module")
def resumed_alone(two: list[Found], folder: Path) -> dict[str, Tensor]:
    return resumed(folder / "run")


@pytest.fixture(scope="module")
def four(resumed_alone: dict[str, Tensor], folder: Path) -> list[Found]:
    return spawned(work, 4, folder, False)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    return {name: everything(make().fit(STEPS)) for name, make in INVARIANT.items()}


def assert_close(found: Any, wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Relative to the norm of all weights of a network; what it measured last, roughly."""
    assert isinstance(found, dict), found
    assert found.keys() == wanted.keys()
    for group in {name.split(".")[0] for name in wanted}:
        names = [name for name in wanted if name.split(".")[0] == group]
        a, b = (torch.cat([t[n].double().flatten() for n in names]) for t in (found, wanted))
        allowed = max(tolerance, 1e-3) if group in ("loss", "grad_norm") else tolerance
        assert (a - b).norm() <= allowed * b.norm(), group


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("name", INVARIANT)
def test_the_weights_do_not_depend_on_the_number_of_processes(
    name: str, alone: dict[str, dict[str, Tensor]], two: list[Found], four: list[Found]
) -> None:
    tolerance = 2e-2 if "bf16" in name else 1e-5
    for found in (*two, *(four if name in IN_FOUR else [])):
        assert_close(found[name], alone[name], tolerance)
    skipped = 1 if name == "flow-nan" else 0
    assert alone[name]["counts"].tolist() == [STEPS, skipped, 0]


def test_a_group_of_one_ends_in_the_bits_of_no_group(
    alone: dict[str, dict[str, Tensor]], group_of_one: None
) -> None:
    for name in ("ct", "flow-conditional", "idle-parameter"):
        assert_equal(everything(INVARIANT[name](parallel="ddp").fit(STEPS)), alone[name])


def test_two_processes_then_one_then_four_continue_a_run(
    two: list[Found], resumed_alone: dict[str, Tensor], four: list[Found], tmp_path: Path
) -> None:
    for steps, found in ((1, [two[0]["resumed"]]), (2, [resumed_alone]), (3, [four[0]["resumed"]])):
        for _ in range(steps - len(list_checkpoints(tmp_path))):
            wanted = resumed(tmp_path)
        for result in found:
            assert_close(result, wanted)


def test_a_run_resumed_by_as_many_processes_ends_in_the_same_bits(
    two: list[Found], four: list[Found]
) -> None:
    for found in (*two, *four):
        assert isinstance(found["bits"], list), found["bits"]
        assert_equal(*found["bits"])


@pytest.mark.parametrize("name", CASES)
def test_two_processes(name: str, two: list[Found]) -> None:
    for rank, found in enumerate(two):
        assert found[name] is None, f"process {rank}: {found[name]}"


def test_without_torchrun_there_is_nobody_to_train_with(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"RANK, WORLD_SIZE.*torchrun --standalone"):
        trainer(parallel="ddp")
    with pytest.raises(ValueError, match="or a DeviceMesh, got 'tp'"):
        trainer(parallel="tp")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="as torchrun sets them"):
        parallel.launched()


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(ConnectionError, match=port):
            trainer(parallel="ddp")


def torchrun(out: Path, *more: str) -> subprocess.Popen[str]:
    """Two processes that train on digits."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", "2", *more, "-m", "fastcm", "train", "--parallel", "ddp"]
    options = ["--method", "ct", "--width", "16", "--batch", "16", "--compile", "off"]
    options += ["--steps", "150", "--save-every", "20", "--resume", "--out", str(out)]
    root = str(Path(__file__).resolve().parents[2])
    return subprocess.Popen(
        [*launcher, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def state(run: Path) -> dict[str, Tensor]:
    groups = load(list_checkpoints(run)[0]).groups
    del groups["random"]  # of torch's generator, which nothing seeds and nothing draws from
    return {f"{group}.{k}": v for group, tensors in groups.items() for k, v in tensors.items()}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_a_process_that_is_killed_is_started_again_and_the_run_ends_in_the_same_bits(
    tmp_path: Path,
) -> None:
    stopped, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    launcher = torchrun(stopped, "--max-restarts", "1")
    told = killed(launcher, stopped / "checkpoints" / "step_000000040")
    assert told.count("resumed") == told.count("'step': 150") == 1
    launcher = torchrun(undisturbed)
    told, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, told
    assert_equal(state(stopped), state(undisturbed))
