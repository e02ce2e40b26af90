"""Folders to hand on: what a run becomes, what is read back, what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fastcm
from fastcm import Sampler, cli, hub, networks
from fastcm.runs import checkpoint


def trained(run: Path, net: nn.Module, objective: Any, data: Any) -> fastcm.Trainer:
    options: dict[str, Any] = {"compile": False, "progress": False, "log": lambda line: None}
    averages = (fastcm.EMA(0.5), fastcm.EMA(0.9))
    return fastcm.Trainer(
        net, objective, data=data, batch_size=8, directory=run, averages=averages, **options
    ).fit(3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hub") / "run"
    images = (torch.rand(32, 1, 4, 4), torch.arange(32) % 3)
    trained(path, networks.MLP((1, 4, 4), 16, num_classes=3), fastcm.FlowMatching(), images)
    return path


@pytest.mark.parametrize("ema", [-1, 0, 1])
def test_the_sampler_is_that_of_the_run(ema: int, run: Path, tmp_path: Path) -> None:
    folder = fastcm.save_pretrained(run, tmp_path / "out", ema=ema, steps=4)
    cond = torch.tensor([0, 2, 1])
    made = fastcm.from_pretrained(folder)
    same = Sampler.from_run(run, ema=ema, method="ode", steps=4)
    assert torch.equal(made(3, cond=cond), same(3, cond=cond))
    other = fastcm.from_pretrained(str(folder), steps=2, solver="heun", batch_size=2)
    same = Sampler.from_run(run, ema=ema, method="ode", steps=2, solver="heun")
    torch.testing.assert_close(other(3, cond=cond), same(3, cond=cond))
    assert fastcm.from_pretrained(folder, times=[1.0, 0.5]).times == [1.0, 0.5]


def test_plain_safetensors_and_state_dict_read_the_weights(run: Path, tmp_path: Path) -> None:
    folder = fastcm.save_pretrained(run, tmp_path / "out")
    config = json.loads((folder / hub.CONFIG).read_text())
    net = networks.build(config["network"])
    net.load_state_dict(load_file(folder / hub.WEIGHTS))
    want = checkpoint.weights_of(Sampler.from_run(run).net)
    assert all(torch.equal(value, want[name]) for name, value in net.state_dict().items())


def test_the_card_says_what_is_known(run: Path, tmp_path: Path) -> None:
    folder = fastcm.save_pretrained(run, tmp_path / "out")
    card = (folder / hub.CARD).read_text()
    for words in ("library_name: fastcm", "| trained | 3 steps of 8 rows", "ode, 50 steps"):
        assert words in card
    assert "![samples](samples.png)" in card
    assert (folder / hub.PICTURE).read_bytes().startswith(b"\x89PNG")
    code = card.split("```python\n")[1].split("```")[0].replace('"."', repr(str(folder)))
    scope: dict[str, Any] = {}
    exec(code, scope)
    same = Sampler.from_run(run, method="ode", steps=50)
    assert torch.equal(scope["x"], same(16, cond=torch.arange(16) % 3))


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        out: Tensor = self.layer(x) + t[:, None]
        return out


def test_a_network_of_ones_own(tmp_path: Path) -> None:
    net = torch.compile(Mine(), backend="eager")
    trained(tmp_path / "run", net, fastcm.ConsistencyTraining(), torch.randn(32, 2))  # type: ignore
    folder = fastcm.save_pretrained(tmp_path / "run", tmp_path / "out")
    assert "net=net" in (folder / hub.CARD).read_text() and not (folder / hub.PICTURE).exists()
    with pytest.raises(ValueError, match=r"does not describe its network: give .*net=\.\.\."):
        fastcm.from_pretrained(folder)
    made = fastcm.from_pretrained(folder, net=Mine())
    assert torch.equal(made(4), Sampler.from_run(tmp_path / "run", net=Mine())(4))
    with pytest.raises(checkpoint.CheckpointError, match="does not fit"):
        fastcm.from_pretrained(folder, net=nn.Linear(2, 3))


def test_what_is_no_such_folder_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        fastcm.from_pretrained(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json: `fastcm export"):
        fastcm.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is the directory of a run"):
        fastcm.save_pretrained(run, run)
    with pytest.raises(ValueError, match=r"ema must be in \[-1, 2\)"):
        fastcm.save_pretrained(run, tmp_path / "x", ema=2)
    with pytest.raises(ValueError, match="steps must be >= 1"):
        fastcm.save_pretrained(run, tmp_path / "x", steps=0)
    folder = fastcm.save_pretrained(run, tmp_path / "out")
    with pytest.raises(ValueError, match="revision is of a repository"):
        fastcm.from_pretrained(folder, revision="main")
    (folder / hub.WEIGHTS).write_bytes(b"no")
    with pytest.raises(checkpoint.CheckpointError, match="is not readable"):
        fastcm.from_pretrained(folder)
    (folder / hub.CONFIG).write_text('{"library": "diffusers"}')
    with pytest.raises(ValueError, match="is of 'diffusers', format None"):
        fastcm.from_pretrained(folder)


class Api:
    """Of huggingface_hub, with a folder as the other end."""

    where: Path

    def __init__(self, **options: Any) -> None:
        pass

    def create_repo(self, repo: str, *, private: bool | None, exist_ok: bool) -> None:
        assert exist_ok
        (self.where / repo).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, *, repo_id: str, folder_path: str, allow_patterns: list[str]) -> str:
        for name in allow_patterns:
            if (Path(folder_path) / name).exists():
                shutil.copy(Path(folder_path) / name, self.where / repo_id / name)
        return f"https://hub/{repo_id}"


def test_a_repository(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Api, "where", tmp_path / "hub", raising=False)
    monkeypatch.chdir(tmp_path)

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert revision == "main" and hub.CONFIG in allow_patterns
        return str(tmp_path / "hub" / repo)

    fake = SimpleNamespace(HfApi=Api, snapshot_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    folder = fastcm.save_pretrained(run, tmp_path / "out")
    (folder / "notes.txt").write_text("private")
    assert fastcm.push_to_hub(folder, "me/digits") == "https://hub/me/digits"
    assert not (tmp_path / "hub/me/digits/notes.txt").exists()
    made = fastcm.from_pretrained("me/digits", revision="main", steps=2)
    cond = torch.tensor([1])
    assert torch.equal(made(1, cond=cond), fastcm.from_pretrained(folder, steps=2)(1, cond=cond))
    with pytest.raises(FileNotFoundError, match="is not of save_pretrained"):
        fastcm.push_to_hub(tmp_path, "me/digits")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'pip install "fastcm\[hub\]"'):
        fastcm.from_pretrained("me/digits")


def test_the_command(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["fastcm", "export", str(run), "--to", str(folder)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert f'fastcm.from_pretrained("{folder}")' in capsys.readouterr().out
    assert fastcm.from_pretrained(folder).times == Sampler.from_run(run, steps=50).times
