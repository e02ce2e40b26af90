"""Checkpoints that several processes write: complete or absent, and verified when read."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcm.runs import checkpoint, joint, shards
from fastcm.runs.checkpoint import CheckpointError, load, load_newest
from fastcm.runs.consolidate import consolidate
from fastcm.runs.shards import Part, Place

WHOLE = {
    "w": torch.arange(15.0).reshape(5, 3),
    "b": torch.arange(5).to(torch.bfloat16),
    "step": torch.tensor(3.0),
    "none": torch.empty(0, 3),
}
COUNTERS = {"counters": {"counts": torch.arange(3)}}


class Peers:
    """What threads say to each other, as processes do; from some time on, one is gone."""

    def __init__(self, count: int, gone_after: int = 99) -> None:
        self.count = count
        self._left = [gone_after] * count
        self._barrier = threading.Barrier(count, timeout=20)
        self._said: list[Any] = [None] * count

    def exchange(self, rank: int, mine: Any = None, error: Exception | None = None) -> list[Any]:
        self._left[rank] -= 1
        if self._left[rank] < 0:
            raise ConnectionError("another process is gone")
        self._said[rank] = (mine, error)
        self._barrier.wait()
        said = list(self._said)
        self._barrier.wait()
        if error is not None:
            raise error
        for other, (_, failure) in enumerate(said):
            if failure is not None:
                raise RuntimeError(f"process {other} failed: {failure}")
        return [value for value, _ in said]


def mine(rank: int, count: int) -> tuple[dict[str, Tensor], dict[str, Place]]:
    """Rows of each tensor; what has no rows is the first's."""
    tensors, places = {}, {}
    for name, tensor in WHOLE.items():
        rows = -(-len(tensor) // count) if tensor.ndim else 0
        part = tensor[rank * rows : (rank + 1) * rows] if rows else tensor
        if part.numel() if rows else rank == 0:
            first = min(rank * rows, len(tensor)) * tensor[0].numel() if rows else 0
            tensors[name], places[name] = part, Place(first, tuple(tensor.shape))
    return tensors, places


def save(run: Path, step: int, count: int = 3, gone_after: int = 99, **options: Any) -> list[Any]:
    """What each of several threads got: a path, None or an exception."""
    peers, found = Peers(count, gone_after), [None] * count

    def work(rank: int) -> None:
        tensors, places = mine(rank, count)
        try:
            found[rank] = joint.save(  # type: ignore[call-overload]
                run,
                step,
                {"model": tensors, **COUNTERS},
                {"note": "hello"},
                places={"model": places},
                rank=rank,
                exchange=partial(peers.exchange, rank),
                **options,
            )
        except Exception as error:
            found[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def assert_whole(tensors: dict[str, Tensor]) -> None:
    assert tensors.keys() == WHOLE.keys()
    for name, tensor in WHOLE.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_what_several_wrote_is_read_whole(tmp_path: Path, count: int) -> None:
    path, *others = save(tmp_path, 7, count)
    assert others == [None] * (count - 1)
    found = load(path)
    assert found.state["note"] == "hello" and found.state["format"] == 3
    assert_whole(found.groups["model"])
    assert torch.equal(found.groups["counters"]["counts"], torch.arange(3))
    assert load(path, only={"counters"}).groups.keys() == {"counters"}
    assert (tmp_path / "latest").read_text().strip() == path.name


def test_a_part_is_read_from_the_files_that_have_it(tmp_path: Path) -> None:
    path = save(tmp_path, 1)[0]
    for rank in (0, 2):
        file = path / f"model.0000{rank}.safetensors"
        file.write_bytes(bytes(file.stat().st_size))

    def select(group: str, name: str, shape: torch.Size) -> Part | None:
        if group != "model":
            return None
        return Part(7, 11, lambda flat: flat) if name == "w" else Part(0, 0, lambda flat: flat)

    assert load(path, select=select).groups["model"]["w"].tolist() == [7, 8, 9, 10]
    with pytest.raises(CheckpointError, match=r"model\.00000\.safetensors was altered"):
        load(path)


def test_a_part_of_a_plain_checkpoint(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {"model": WHOLE}, {})
    part = Part(1, 3, lambda flat: -flat)
    found = load(path, select=lambda group, name, shape: part if name == "b" else None)
    assert found.groups["model"]["b"].tolist() == [-1, -2]
    assert torch.equal(found.groups["model"]["w"], WHOLE["w"])


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "index", "no index"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)[0]
    name = "model.index.json" if "index" in damage else "model.00001.safetensors"
    file = newest / name
    data = file.read_bytes()
    if damage in ("missing", "no index"):
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(data[:-5])
    else:
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    found, errors = load_newest(tmp_path)
    assert found.state["step"] == 1
    assert len(errors) == 1 and name in str(errors[0]) and "step_000000002" in str(errors[0])


def test_what_one_finds_damaged_all_pass_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    said: list[Any] = []

    def everywhere(mine: Any) -> list[Any]:
        said.append(mine)
        elsewhere = (mine[0], "its disk is broken" if len(said) == 1 else None)
        return [mine, elsewhere]

    found, errors = load_newest(tmp_path, everywhere=everywhere)
    assert found.state["step"] == 1 and "its disk is broken" in str(errors[0])
    with pytest.raises(CheckpointError, match="see different checkpoints"):
        load_newest(tmp_path, everywhere=lambda mine: [mine, ("step_000000009", None)])


def altered(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Another index, with the digests that belong to it."""
    index = json.loads((path / "model.index.json").read_text())
    change(index)
    data = json.dumps(index).encode()
    (path / "model.index.json").write_bytes(data)
    state = json.loads((path / "state.json").read_text())
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    state["files"]["model.index.json"] = entry
    (path / "state.json").write_text(json.dumps(state))


def of(name: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["tensors"][name].update(changes)


def moved(index: dict[str, Any]) -> None:
    index["files"]["../model.00000.safetensors"] = index["files"].pop("model.00000.safetensors")


FILE = "model.00000.safetensors"
CROOKED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a hole": (of("w", pieces=[[FILE, 0, 6], [FILE, 9, 6]]), "begins at element 9 instead of 6"),
    "an overlap": (of("w", pieces=[[FILE, 0, 6], [FILE, 3, 9]]), "begins at element 3"),
    "too little": (of("w", pieces=[[FILE, 0, 6]]), "6 of 15 elements"),
    "another size": (of("b", pieces=[[FILE, 0, 5]]), "elements of torch.bfloat16, its index says"),
    "another dtype": (of("step", dtype="I32"), "its index says 1 of torch.int32"),
    "no dtype": (of("step", dtype="X1"), "cannot be read"),
    "huge": (of("step", shape=[2**50], pieces=[[FILE, 0, 2**50]]), "than its files can hold"),
    "negative": (of("w", shape=[-5, -3]), "none"),
    "no number": (of("w", shape=["5", 3]), "none"),
    "another file": (of("step", pieces=[["model.00009.safetensors", 0, 1]]), "cannot be read"),
    "a file elsewhere": (moved, "no file of its own"),
    "nothing": (lambda index: index.clear(), "cannot be read"),
}


@pytest.mark.parametrize("kind", CROOKED)
def test_an_index_that_makes_no_tensors_is_refused(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path, 1)[0]
    change, said = CROOKED[kind]
    altered(path, change)
    with pytest.raises(CheckpointError, match=said):
        load(path)


def test_processes_that_do_not_make_a_tensor_save_nothing(tmp_path: Path) -> None:
    report = [shards.write_part(tmp_path, 0, {"model": {"w": WHOLE["w"][:2]}}, {"model": {
        "w": Place(0, (5, 3))
    }})]  # fmt: skip
    with pytest.raises(ValueError, match="6 of 15 elements"):
        shards.write_indices(tmp_path, report)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_write_that_fails_in_one_leaves_the_last_one_good(
    tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    real = shards.write_tensors

    def full(path: Path, tensors: Any) -> Any:
        if path.name == f"model.0000{rank}.safetensors":
            raise OSError(28, "No space left on device")
        return real(path, tensors)

    monkeypatch.setattr(shards, "write_tensors", full)
    for other, error in enumerate(save(tmp_path, 2)):
        assert isinstance(error, OSError if other == rank else RuntimeError)
        assert "No space left" in str(error)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000000001"]
    monkeypatch.undo()
    assert save(tmp_path, 2, keep=1)[0].name == "step_000000002"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000000002"]


@pytest.mark.parametrize("gone_after", [0, 1, 2])
def test_a_process_that_dies_leaves_a_checkpoint_that_is_complete_or_absent(
    tmp_path: Path, gone_after: int
) -> None:
    save(tmp_path, 1)
    assert all(isinstance(error, OSError) for error in save(tmp_path, 2, gone_after=gone_after))
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    # the last word, that it is complete, comes after it is
    assert names == ["step_000000001", "step_000000002"][: 2 if gone_after == 2 else 1]
    for name in names:
        assert_whole(load(tmp_path / "checkpoints" / name).groups["model"])


def test_one_that_sees_another_directory_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_dir", lambda path: False)
    found = save(tmp_path, 1, 2)
    assert all("file system that all processes share" in str(error) for error in found)


def test_consolidation_leaves_one_of_both_forms_at_any_instant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)[0]
    real = checkpoint.commit

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        consolidate(tmp_path)
    assert load(path).state["format"] == 3
    monkeypatch.setattr(checkpoint, "commit", real)
    assert consolidate(tmp_path) == (path, True)
    found = load(path)
    assert found.state["format"] == 2 and found.state["note"] == "hello"
    assert_whole(found.groups["model"])
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_000000001", "step_000000002"]
    assert load(tmp_path / "checkpoints" / "step_000000001").state["format"] == 3
