"""Checkpoints that somebody else made: read as plain data, refused by name, never executed."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fastcm import ConsistencyTraining, Trainer
from fastcm.networks import MLP
from fastcm.runs import checkpoint, files
from fastcm.runs.checkpoint import CheckpointError, load

ROOT = Path(__file__).resolve().parents[2]


def trainer(directory: Path, optimizer: Any = None) -> Trainer:
    torch.manual_seed(0)
    net = MLP(shape=(3,), width=16, depth=1)
    made = None if optimizer is None else optimizer(net.parameters(), lr=1e-3)
    options: dict[str, Any] = {"compile": False, "progress": False, "directory": directory}
    return Trainer(
        net, ConsistencyTraining(), made, data=torch.ones(64, 3), batch_size=8, **options
    )


@pytest.fixture(params=[None, torch.optim.AdamW], ids=["fastcm", "torch"])
def optimizer(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def run(tmp_path: Path, optimizer: Any) -> Path:
    trainer(tmp_path, optimizer).fit(2)
    return checkpoint.list_checkpoints(tmp_path)[0]


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = json.loads((path / "state.json").read_text())
    change(state)
    (path / "state.json").write_text(json.dumps(state))


def forge(path: Path, group: str, content: bytes | dict[str, Tensor]) -> None:
    """Replace a file, its size and its digest, as one can who can write the checkpoint."""
    data = content if isinstance(content, bytes) else safetensors.torch.save(content)
    name = f"{group}.safetensors"
    (path / name).write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(path, lambda state: state["files"].update({name: entry}))


def refuses(path: Path, optimizer: Any, match: str) -> None:
    """Loading fails by name, and before anything of the trainer has changed."""
    run = path.parent.parent
    other = trainer(run, optimizer)
    torch.manual_seed(5)
    before = {k: v.clone() for k, v in other.net.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(CheckpointError, match=match):
        other.load()
    assert all(torch.equal(v, before[0][k]) for k, v in other.net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before[1])
    assert other.step == 0 and other.update.counts.tolist() == [0, 0, 0]
    assert all((state["step"] == 0).all() for state in other.optimizer.state.values())


def change(tensors: dict[str, Tensor], how: str) -> str:
    """Make the first tensor one that is not wanted; returns what the refusal must name."""
    name = sorted(n for n, t in tensors.items() if t.ndim)[0]
    if how == "name":
        tensors["0.evil"] = torch.zeros(3)
        return r"0\.evil is unexpected"
    if how == "missing":
        del tensors[name]
        return rf"{name} is missing"
    if how == "shape":
        tensors[name] = torch.cat([tensors[name], tensors[name]])
    else:
        tensors[name] = tensors[name].to(torch.float64)
    return rf"{name} is torch\.\w+ \[.*\] instead of torch\.\w+ \["


GROUPS = ["model", "average_0", "optimizer", "random", "counters"]


@pytest.mark.parametrize("how", ["name", "missing", "shape", "dtype"])
@pytest.mark.parametrize("group", GROUPS)
def test_a_tensor_that_is_not_wanted_is_refused(
    run: Path, optimizer: Any, group: str, how: str
) -> None:
    tensors = load(run).groups[group]
    named = change(tensors, how)
    forge(run, group, tensors)
    refuses(run, optimizer, rf"{group}.*{named}")


def test_a_group_that_is_not_wanted_is_refused(run: Path, optimizer: Any) -> None:
    forge(run, "evil", {"x": torch.zeros(1)})
    refuses(run, optimizer, "evil is unexpected")
    edit(run, lambda state: [state["files"].pop(f"{g}.safetensors") for g in ("evil", "counters")])
    refuses(run, optimizer, "counters is missing")


@pytest.mark.parametrize(
    ("entry", "value", "named"),
    [
        ("optimizer", {"scalars": {}, "param_groups": []}, "grouped otherwise"),
        ("optimizer", {"scalars": {"99.step": 1}}, "there is no parameter 99|KeyError"),
        ("optimizer", 7, "is not the state of an optimizer"),
        ("compiled", "yes", "compiled is 'yes'"),
        ("step", -1, "names step -1"),
        ("step", 2**70, "names step"),
        ("step", "2", "names step '2'"),
        ("step", True, "names step True"),
        ("files", {"model.safetensors": 3}, "cannot be read"),
        ("format", 99, "is of format 99"),
    ],
)
def test_a_state_that_cannot_be_is_refused(
    run: Path, optimizer: Any, entry: str, value: object, named: str
) -> None:
    edit(run, lambda state: state.update({entry: value}))
    refuses(run, optimizer, named)


def test_an_option_that_the_optimizer_does_not_have_is_refused(run: Path, optimizer: Any) -> None:
    edit(run, lambda state: state["optimizer"]["param_groups"][0].update(evil=1))
    refuses(run, optimizer, "option evil is unexpected")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    groups = {"model": {"w": torch.arange(6.0)}}
    return checkpoint.save(tmp_path / "run", 1, groups, {})


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_a_pickle_in_place_of_a_safetensors_file_is_refused_and_not_run(
    plain: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "executed"
    data = pickle.dumps(Payload(mark))
    pickle.loads(data)
    assert mark.exists()  # it would act
    mark.unlink()
    forge(plain, "model", data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a safetensors file"):
        load(plain)
    torch.save({"w": Payload(mark)}, plain / "model.safetensors")
    forge(plain, "model", (plain / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a safetensors file"):
        load(plain)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../up", "/etc/abs", "a/b", "..\\win", "model\0", "plain.bin"])
def test_a_path_out_of_the_directory_is_refused(plain: Path, name: str) -> None:
    name = name if name.endswith(".bin") else f"{name}.safetensors"
    edit(plain, lambda state: state["files"].update({name: state["files"]["model.safetensors"]}))
    with pytest.raises(CheckpointError, match=r"step_000000001.*(names|cannot be read)"):
        load(plain)


@pytest.mark.parametrize("what", ["model.safetensors", "state.json"])
def test_a_link_out_of_the_directory_is_refused(plain: Path, tmp_path: Path, what: str) -> None:
    outside = tmp_path / "outside"
    (plain / what).rename(outside)
    (plain / what).symlink_to(outside)
    with pytest.raises(CheckpointError, match=f"{what} is a symbolic link"):
        load(plain)


def test_a_checkpoint_that_is_a_link_is_refused_and_only_the_link_is_dropped(
    plain: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    plain.rename(outside)
    plain.symlink_to(outside)
    with pytest.raises(CheckpointError, match="step_000000001 is a symbolic link"):
        checkpoint.load_newest(tmp_path / "run")
    for step in (1, 2):  # the first in its place, the second beyond `keep`
        checkpoint.save(tmp_path / "run", step, {}, {}, keep=1)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000000002"]
    assert (outside / "model.safetensors").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("what", ["model.safetensors", "state.json"])
def test_a_pipe_is_refused_and_not_waited_for(plain: Path, what: str) -> None:
    (plain / what).unlink()
    os.mkfifo(plain / what)
    with pytest.raises(CheckpointError, match=f"{what} is not a regular file"):
        load(plain)


def test_a_state_of_100_megabytes_is_refused_unread(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(plain / "state.json", "r+b") as file:
        file.truncate(100 * 2**20)
    monkeypatch.setattr(json, "loads", None)  # nothing gets as far as the parser
    with pytest.raises(CheckpointError, match=r"state\.json has 104857600 bytes, more than"):
        load(plain)


@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_deeply_nested_json_is_refused(plain: Path, brackets: str) -> None:
    opening = "[" if brackets == "[]" else '{"a":'
    limit = sys.getrecursionlimit()
    (plain / "state.json").write_text(opening * (100 * limit))
    with pytest.raises(CheckpointError, match=r"state\.json is nested more than 64 deep"):
        load(plain)


def test_brackets_in_strings_are_no_nesting(plain: Path) -> None:
    note = '"' + "[" * 1000 + "\\" + "{" * 1000
    edit(plain, lambda state: state.update(note=note))
    assert load(plain).state["note"] == note


@pytest.mark.parametrize("text", ["[]", "3", '{"a": ', "\xff", '{"files": []}'])
def test_json_that_is_no_state_is_refused(plain: Path, text: str) -> None:
    (plain / "state.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"state\.json"):
        load(plain)


@pytest.mark.parametrize("dtype", files.DTYPES, ids=str)
def test_tensors_of_every_dtype_come_back_as_they_were(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": (torch.randn(3, 5) * 9).to(dtype),
        "number": torch.ones((), dtype=dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
        "odd": torch.ones(3, dtype=torch.uint8),
    }
    tensors["view"] = tensors["matrix"].T
    entry = files.write_tensors(tmp_path / "file", tensors)
    assert entry["bytes"] == (tmp_path / "file").stat().st_size
    for found in (
        files.read_tensors(tmp_path / "file", entry),
        safetensors.torch.load_file(tmp_path / "file"),
    ):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
            theirs, ours = (t.contiguous().view(torch.uint8) if t.ndim else t.reshape(1)
                            for t in (found[name], tensor))  # fmt: skip
            assert torch.equal(theirs, ours)


def test_a_dtype_that_the_format_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"w is torch\.complex64"):
        files.write_tensors(tmp_path / "file", {"w": torch.zeros(2, dtype=torch.complex64)})


FORBIDDEN = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unpickling(source: str) -> list[str]:
    """What of a source text could execute what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            names = [] if ast.unparse(node.value) == "False" else ["pickle.allow_pickle"]
        for name in names:
            loads = name.endswith((".serialization.load", ".jit.load", ".hub.load"))
            if FORBIDDEN & set(name.split(".")) or loads or name in ("torch.load", "eval", "exec"):
                found.append(name)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads as f",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "f = torch.load",
        "import torch.serialization\ntorch.serialization.load('x')",
        "np.load('x', allow_pickle=True)",
        "eval('1')",
    ],
)
def test_the_search_for_unpickling_finds_it(source: str) -> None:
    assert unpickling(source)


def test_the_search_for_unpickling_spares_the_rest() -> None:
    assert unpickling("np.load('x', allow_pickle=False)\nnet.eval()\njson.load(f)") == []


def test_nothing_in_the_package_unpickles() -> None:
    sources = [*(ROOT / "fastcm").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert len(sources) > 40
    # LPIPS, Inception and DINOv2 are published in torch's format: read without code, and never by a
    # run or a checkpoint
    published = ROOT / "fastcm" / "networks" / "files.py"
    assert published.read_text().count("weights_only=True") == 1
    assert {str(file): unpickling(file.read_text()) for file in sources} == {
        str(file): ["torch.load"] if file == published else [] for file in sources
    }
