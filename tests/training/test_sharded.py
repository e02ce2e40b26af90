"""Processes that hold a part of the weights each: the same training, and checkpoints for all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded_runs import CASES, IN_FOUR, INVARIANT, MESHES, ended, mlp, resumed, run, steps_of, work
from test_parallel import assert_close, assert_equal, spawned
from torch import Tensor

from fastcm import FlowMatching, Sampler
from fastcm.runs.checkpoint import list_checkpoints, load
from fastcm.runs.consolidate import consolidate

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed")

Found = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[Found]:
    return spawned(work, 2, folder)


@pytest.fixture(scope="module")
def resumed_alone(two: list[Found], folder: Path) -> dict[str, Tensor]:
    """After two processes with shards, and before four."""
    shutil.copytree(folder / "run", folder / "of-two")
    return resumed(folder / "run")


@pytest.fixture(scope="module")
def four(resumed_alone: dict[str, Tensor], folder: Path) -> list[Found]:
    return spawned(work, 4, folder)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    return {name: ended(make().fit(steps_of(name))) for name, make in INVARIANT.items()}


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", INVARIANT)
def test_a_sharded_training_is_that_of_one_process(
    name: str, alone: dict[str, dict[str, Tensor]], two: list[Found], four: list[Found]
) -> None:
    tolerance = 2e-2 if "bf16" in name else 1e-5
    for found in (*two, *(four if name in IN_FOUR else [])):
        assert_close(found[name], alone[name], tolerance)
    skipped = 1 if name == "flow-nan" else 0
    assert alone[name]["counts"].tolist() == [steps_of(name), skipped, 0]


@pytest.mark.parametrize("world", MESHES)
def test_a_mesh_of_shards_or_of_replicas_of_shards_trains_alike(
    world: int, alone: dict[str, dict[str, Tensor]], two: list[Found], four: list[Found]
) -> None:
    for found in two if world == 2 else four:
        for name in MESHES[world]:
            assert_close(found[name], alone["ct"])


def test_a_group_of_one_trains_alike(
    alone: dict[str, dict[str, Tensor]], group_of_one: None
) -> None:
    for name in ("ct", "cd"):
        assert_close(ended(INVARIANT[name](parallel="fsdp").fit(steps_of(name))), alone[name])


def test_a_run_goes_from_shards_to_one_process_and_back_to_more_shards(
    two: list[Found], resumed_alone: dict[str, Tensor], four: list[Found], tmp_path: Path
) -> None:
    wanted = [resumed(tmp_path) for _ in range(3)]
    for found in two:
        assert_close(found["resumed"], wanted[0])
    assert_close(resumed_alone, wanted[1])
    for found in four:
        assert_close(found["resumed"], wanted[2])


def test_a_sharded_run_goes_on_under_ddp(
    two: list[Found], folder: Path, tmp_path: Path, group_of_one: None
) -> None:
    shutil.copytree(folder / "of-two", tmp_path / "run")
    for _ in range(2):
        wanted = resumed(tmp_path / "alone")
    assert_close(resumed(tmp_path / "run", parallel="ddp"), wanted)


def test_a_run_resumed_by_as_many_processes_ends_in_the_same_bits(
    two: list[Found],
) -> None:
    for found in two:
        assert isinstance(found["bits"], list), found["bits"]
        assert_equal(*found["bits"])


@pytest.mark.parametrize("name", CASES)
def test_two_processes(name: str, two: list[Found]) -> None:
    for rank, found in enumerate(two):
        assert found[name] is None, f"process {rank}: {found[name]}"


def test_a_sharded_run_is_sampled_from_and_consolidated(
    two: list[Found], folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "of-two", tmp_path / "run")
    path = list_checkpoints(tmp_path / "run")[0]
    before = load(path)
    assert before.state["format"] == 3
    weights = {name: tensor for name, tensor in two[0]["resumed"].items() if "." in name}
    for group in ("model", "average_0"):
        for name, tensor in before.groups[group].items():
            assert torch.equal(tensor, weights[f"{group}.{name}"])
    drawn = Sampler.from_run(tmp_path / "run", steps=2)(4, seed=3)
    assert consolidate(tmp_path / "run") == (path, True)
    after = load(path)
    assert after.state["format"] == 2 and before.groups.keys() == after.groups.keys()
    for group, tensors in before.groups.items():
        assert_equal(after.groups[group], tensors)
    assert not list(path.glob("*.index.json")) and len(list_checkpoints(tmp_path / "run")) == 1
    assert torch.equal(Sampler.from_run(tmp_path / "run", steps=2)(4, seed=3), drawn)
    assert consolidate(tmp_path / "run") == (path, False)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        consolidate(tmp_path / "nowhere")


def test_without_torchrun_there_is_nobody_to_share_with(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r'parallel="fsdp" needs processes.*torchrun --standalone'):
        run(FlowMatching(), mlp(), parallel="fsdp")
    with pytest.raises(ValueError, match='"ddp", "fsdp" or a DeviceMesh, got \'tp\''):
        run(FlowMatching(), mlp(), parallel="tp")
