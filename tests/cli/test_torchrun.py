"""What the processes of torchrun do with one command: divide a folder, or refuse."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel_runs import killed
from test_cli_sample import command, here
from test_cli_sample import run as run
from test_sample_folder import files

from fastcm.cli.filled import share
from fastcm.cli.train import _resuming
from fastcm.runs.checkpoint import list_checkpoints, load
from fastcm.training.parallel import local_device
from fastcm.training.processes import Processes

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]


def process(patch: Patch, rank: int, count: int) -> None:
    patch.setenv("RANK", str(rank))
    patch.setenv("WORLD_SIZE", str(count))
    patch.setenv("LOCAL_WORLD_SIZE", str(count))


def test_shares_are_whole_batches_that_make_the_range(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(200):
        first, n, size = draw.randrange(50), draw.randrange(100), draw.randrange(1, 20)
        count = draw.randrange(1, 8)
        shares = [share(range(first, first + n), size, rank, count) for rank in range(count)]
        assert [i for part in shares for i in part] == list(range(first, first + n))
        for part in shares:
            for cut in (part.start, part.stop):
                assert cut % size == 0 or cut in (first, first + n)
        batches = [len({i // size for i in part}) for part in shares]
        assert max(batches) - min(batches) <= 1


@pytest.mark.parametrize("format", ["png", "npz"])
def test_a_folder_of_several_processes_is_that_of_one(
    run: Path, tmp_path: Path, format: str, monkeypatch: Patch, capsys: Capture
) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    options = ["--n", 70, "--first", 3, "--format", format]
    assert here(monkeypatch, capsys, command(run, one, *options))[0] == 0
    said = []
    for rank in (2, 0, 1):
        process(monkeypatch, rank, 3)
        code, out, _ = here(monkeypatch, capsys, command(run, several, *options))
        assert code == 0
        said.append(out.replace("\n", " "))
    assert files(several) == files(one)
    assert "several from 48 on: 25 drawn" in said[0] and "from 3 on: 13 drawn" in said[1]
    code, out, _ = here(monkeypatch, capsys, command(run, tmp_path / "few", "--n", 5))
    assert code == 0 and ("nothing to draw" in out) != ("5 drawn" in out)


def test_several_processes_do_not_write_one_file(
    run: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    process(monkeypatch, 1, 2)
    code, _, error = here(monkeypatch, capsys, command(run, tmp_path / "x.npy"))
    assert code == 2 and "fill a folder together" in error


@pytest.mark.parametrize(
    ("count", "options", "said"),
    [
        (1, ["--parallel", "ddp"], "MASTER_ADDR, MASTER_PORT: start them with torchrun"),
        (1, ["--parallel", "fsdp"], "MASTER_ADDR, MASTER_PORT: start them with torchrun"),
        (1, ["--parallel", "tp"], 'None, "ddp", "fsdp" or a DeviceMesh, got \'tp\''),
        (1, ["--checkpoint", "all"], "checkpoint must be None or 'blocks', got 'all'"),
        (2, [], "2 processes of torchrun need --parallel ddp or fsdp"),
    ],
)
def test_a_training_says_how_it_is_shared(
    tmp_path: Path,
    count: int,
    options: list[str],
    said: str,
    monkeypatch: Patch,
    capsys: Capture,
) -> None:
    process(monkeypatch, 0, count)
    out = tmp_path / "run"
    code, _, error = here(monkeypatch, capsys, ["train", "--out", str(out), *options])
    assert code == 2 and said in error and not out.exists()


def test_the_command_that_resumes_starts_as_many_processes(monkeypatch: Patch) -> None:
    process(monkeypatch, 0, 2)
    shared = Processes(0, 2, object())
    command = ["/x/fastcm/__main__.py", "train", "--parallel", "ddp"]
    said = "torchrun --standalone --nproc-per-node 2 -m fastcm train --parallel ddp --resume"
    assert _resuming(command, shared) == said
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert _resuming(command, shared).startswith("torchrun ... -m fastcm train")
    assert _resuming(command, Processes()).startswith(f"{sys.executable} -m fastcm train")


def test_each_process_has_a_gpu_of_its_own(monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert local_device() == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_device() == "cuda:1"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"process 2 of this machine .* it has 2"):
        local_device()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
def test_a_sharded_run_is_killed_resumed_sampled_from_and_consolidated(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    run, root = tmp_path / "run", str(Path(__file__).resolve().parents[2])
    how = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "fastcm", "train"]
    options = ["--parallel", "fsdp", "--checkpoint", "blocks", "--width", "18", "--batch", "16"]
    options += ["--steps", "120", "--save-every", "10", "--sample-every", "60", "--resume"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *how, *options, "--out", str(run)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    told = killed(launcher, run / "checkpoints" / "step_000000020")
    assert told.count("resumed") == told.count("'step': 120") == 1
    assert {p.name for p in (run / "samples").iterdir()} == {
        "step_000000060.png",
        "step_000000120.png",
    }
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    path = list_checkpoints(run)[0]
    assert (path / "model.00001.safetensors").exists() and load(path).state["step"] == 120
    drawn = []
    for form in ("sharded", "plain"):
        out = tmp_path / f"{form}.npy"
        assert here(monkeypatch, capsys, command(run, out, "--n", 3))[0] == 0
        drawn.append(out.read_bytes())
        said = here(monkeypatch, capsys, ["consolidate", str(run)])[1].replace("\n", "")
        assert f"{path}: {'consolidated' if form == 'sharded' else 'plain already'}" in said
    assert drawn[0] == drawn[1] and (path / "model.safetensors").exists()
    assert here(monkeypatch, capsys, ["consolidate", str(tmp_path / "nowhere")])[0] == 2


def torchrun(*arguments: object, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """Two processes of one command, as a user starts them."""
    root = str(Path(__file__).resolve().parents[2])
    how = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts), "-m", "--"]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *how, "fastcm", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_processes_that_hold_parts_of_a_network_fill_the_folder_of_one(
    run: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """Also where files are there already, and where one has a batch more than the other."""
    one, several = tmp_path / "one", tmp_path / "several"
    options = ["--n", 70, "--first", 3, "--batch", 16, "--steps", 2]
    assert here(monkeypatch, capsys, [*command(run, one), *map(str, options)])[0] == 0
    shared = ["sample", run, "--out", several, *options, "--parallel", "fsdp"]
    told = torchrun(*shared)
    assert told.returncode == 0, told.stderr
    assert files(several) == files(one)
    for name in sorted(p.name for p in several.glob("*.png"))[20:25]:
        (several / name).unlink()
    told = torchrun(*shared)
    assert told.returncode == 0 and files(several) == files(one), told.stderr
    assert ": 5 drawn" in told.stdout and ": 0 drawn" in told.stdout


def test_an_error_of_all_processes_is_shown_once(tmp_path: Path) -> None:
    told = torchrun("sample", tmp_path / "none", "--out", tmp_path / "x", "--parallel", "fsdp")
    assert told.returncode != 0
    assert told.stderr.count("fastcm: no checkpoint in") == 1, told.stderr
    assert told.stderr.count("Traceback") <= 1  # torchrun's own


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--parallel", "ddp"], "--parallel of samples is fsdp or left out, got 'ddp'"),
        (["--parallel", "fsdp"], "MASTER_ADDR, MASTER_PORT: start them with torchrun"),
        (["--parallel", "fsdp", "--out", "x.npy"], "--out x.npy is a file"),
        (["--parallel", "fsdp", "--guide", "x", "--guidance", "2"], "a guide is held whole"),
    ],
)
def test_what_cannot_be_sampled_in_parts_is_said(
    run: Path, tmp_path: Path, options: list[str], said: str, monkeypatch: Patch, capsys: Capture
) -> None:
    code, _, error = here(monkeypatch, capsys, [*command(run, tmp_path / "x"), *options])
    assert code == 2 and said in error.replace("\n", " ")
