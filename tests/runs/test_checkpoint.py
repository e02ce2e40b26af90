"""Checkpoints: complete or absent, verified when read."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastcm.runs import checkpoint
from fastcm.runs.checkpoint import CheckpointError, load, load_newest, save

GROUPS = {
    "model": {"w": torch.arange(6.0).reshape(2, 3)},
    "random": {"cpu": torch.arange(3).byte()},
}


def test_what_was_saved_is_what_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 7, GROUPS, {"note": "hello"})
    found = load(path)
    assert found.state["note"] == "hello" and found.state["step"] == 7
    assert torch.equal(found.groups["model"]["w"], GROUPS["model"]["w"])
    assert torch.equal(found.groups["random"]["cpu"], GROUPS["random"]["cpu"])
    assert (tmp_path / "latest").read_text().strip() == path.name


def test_tied_weights_and_views_are_saved(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    group = {"a": whole, "b": whole, "c": whole[1], "d": whole.T}
    found = load(save(tmp_path, 1, {"model": group}, {})).groups["model"]
    assert all(torch.equal(found[name], tensor) for name, tensor in group.items())


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100, 1000):
        save(tmp_path, step, GROUPS, {}, keep=2)
    names = [p.name for p in checkpoint.list_checkpoints(tmp_path)]
    assert names == ["step_000001000", "step_000000100"]


def test_what_was_just_saved_outlives_damaged_later_ones(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, GROUPS, {})
    for step in (20, 30):
        (tmp_path / "checkpoints" / f"step_0000000{step}" / "model.safetensors").write_bytes(b"x")
    save(tmp_path, 15, GROUPS, {}, keep=2)
    names = [p.name for p in checkpoint.list_checkpoints(tmp_path)]
    assert names == ["step_000000015", "step_000000010"]
    assert load_newest(tmp_path)[0].state["step"] == 15


def test_a_state_without_its_entries_is_damaged(tmp_path: Path) -> None:
    save(tmp_path, 1, GROUPS, {"config": 1})
    newest = save(tmp_path, 2, GROUPS, {"config": 1})
    (newest / "state.json").write_text('{"format": 1, "step": 2, "files": {}}')
    found, errors = load_newest(tmp_path, requires=["config"])
    assert found.state["step"] == 1 and "lacks config" in str(errors[0])


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "state", "empty", "pickle"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1, GROUPS, {})
    newest = save(tmp_path, 2, GROUPS, {})
    file = newest / "model.safetensors"
    data = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(data[:-5])
    elif damage == "altered":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "missing":
        file.unlink()
    elif damage == "state":
        (newest / "state.json").write_text('{"format": 1, "st')
    elif damage == "empty":
        (newest / "state.json").write_text("")
    else:
        file.write_bytes(pickle.dumps(GROUPS))
    found, errors = load_newest(tmp_path)
    assert found.state["step"] == 1
    assert len(errors) == 1 and "step_000000002" in str(errors[0])


def test_all_damaged_is_an_error_that_names_each(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, step, GROUPS, {}) / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"step_000000002.*step_000000001"):
        load_newest(tmp_path)


def test_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        load_newest(tmp_path)


def test_a_file_name_that_leaves_the_directory_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1, GROUPS, {})
    state = json.loads((path / "state.json").read_text())
    state["files"]["../../evil.safetensors"] = state["files"].pop("model.safetensors")
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="evil"):
        load(path)


@pytest.mark.parametrize("fails_at", range(1, 12))
def test_an_interrupted_save_leaves_the_last_one_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """The disk fills up, or the process is interrupted, at every flush there is."""
    save(tmp_path, 1, GROUPS, {})
    real, calls = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            if fails_at % 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            raise KeyboardInterrupt
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    try:
        save(tmp_path, 2, GROUPS, {})
    except OSError as error:
        assert "No space left" in str(error) and "last good one" in str(error)
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    found, errors = load_newest(tmp_path)
    assert found.state["step"] in (1, 2) and not errors
    assert torch.equal(found.groups["model"]["w"], GROUPS["model"]["w"])
    left = [p for p in tmp_path.rglob("*") if p.name.startswith(".writing")]
    assert not left


def test_a_left_over_of_a_killed_writer_is_cleared_by_the_next_save(tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / ".writing-step_000000001-1"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    save(tmp_path, 2, GROUPS, {})
    assert not left.exists()
    assert load_newest(tmp_path)[0].state["step"] == 2


def test_optimizer_state_round_trips() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.grad = torch.tensor([1.0, -2.0, 3.0])
    optimizer.step()
    before = optimizer.state_dict()
    tensors, rest = checkpoint.flatten_optimizer(before)
    after = checkpoint.unflatten_optimizer(tensors, json.loads(json.dumps(rest)))
    assert torch.equal(after["state"][0]["exp_avg"], before["state"][0]["exp_avg"])
    fresh = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    fresh.load_state_dict(after)
    assert fresh.state_dict()["param_groups"] == before["param_groups"]


def test_tensors_that_do_not_fit_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"b is missing, c is unexpected, a is .*\[2\]"):
        checkpoint.check_tensors(
            "model",
            {"a": torch.zeros(2), "c": torch.zeros(1)},
            {"a": torch.zeros(3), "b": torch.zeros(1)},
        )


def test_saving_a_step_anew_never_leaves_a_moment_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, GROUPS, {"note": "first"})
    seen: list[str] = []
    for name in ("rename", "replace", "rmdir", "unlink"):
        real = getattr(os, name)

        def look(*args: object, real: Callable[..., object] = real, **options: object) -> object:
            result = real(*args, **options)
            seen.append(load_newest(tmp_path)[0].state["note"])
            return result

        monkeypatch.setattr(os, name, look)
    save(tmp_path, 1, GROUPS, {"note": "second"})
    monkeypatch.undo()
    assert seen[0] == "first" and seen[-1] == "second" and len(seen) >= 4
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000000001"]


def test_the_one_set_aside_stands_in_if_saving_a_step_anew_was_interrupted(tmp_path: Path) -> None:
    path = save(tmp_path, 7, GROUPS, {})
    aside = path.rename(path.with_name(f"{path.name}.old"))
    assert checkpoint.list_checkpoints(tmp_path) == [aside]
    assert load_newest(tmp_path)[0].state["step"] == 7
    save(tmp_path, 7, GROUPS, {})
    save(tmp_path, 8, GROUPS, {})
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step_000000007", "step_000000008"}


def test_a_later_checkpoint_that_is_intact_is_not_lost(tmp_path: Path) -> None:
    for step in (10, 20, 15):
        save(tmp_path, step, GROUPS, {}, keep=1)
    assert [checkpoint.step_of(p) for p in checkpoint.list_checkpoints(tmp_path)] == [20, 15]


def test_order_is_that_of_numbers_and_other_directories_are_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "checkpoints" / "step_best"
    mine.mkdir(parents=True)
    for step in (999_999_999, 1_000_000_000):
        save(tmp_path, step, GROUPS, {}, keep=1)
    steps = [checkpoint.step_of(p) for p in checkpoint.list_checkpoints(tmp_path)]
    assert steps == [1_000_000_000] and mine.is_dir()
    with pytest.raises(ValueError, match="step_best is not the name of a checkpoint"):
        checkpoint.step_of(mine)
