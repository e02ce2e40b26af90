"""Runs from a TOML file, and the file that repeats a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fastcm import cli
from fastcm.cli import toml

FORM = """
method = "flow"
width = 16
steps = 4
batch = 8
lr = 1e-3
log-every = 1
compile = "off"
ema = [0.5, 0.9]
"""


def fastcm_(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fastcm", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
    return int(done.value.code or 0), capsys.readouterr().err


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_a_run_is_repeated_by_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "form.toml"
    file.write_text(FORM)
    first, second, third = (tmp_path / name for name in "abc")
    assert fastcm_(capsys, "train", "--config", file, "--out", first)[0] == 0
    made = first / "run.toml"
    assert fastcm_(capsys, "train", "--config", made, "--out", second)[0] == 0
    assert losses(first) == losses(second) and len(losses(first)) == 4
    assert made.read_text() == (second / "run.toml").read_text()
    settings = json.loads((second / "run.json").read_text())
    assert settings["ema"] == [0.5, 0.9] and settings["lr"] == 1e-3
    # what the command line says comes first
    code, _ = fastcm_(capsys, "train", "--config", made, "--steps", 2, "--seed", 5, "--out", third)
    assert code == 0 and len(losses(third)) == 2 and losses(third)[0] != losses(first)[0]
    # a run that goes on keeps its file
    kept = made.read_text()
    assert fastcm_(capsys, "train", "--config", made, "--out", first, "--resume")[0] == 0
    assert made.read_text() == kept


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stepz = 3", "no option 'stepz', there are out, data, method"),
        ("steps = 1.5", "steps must be int, got 1.5"),
        ('steps = "7"', "steps must be int, got '7'"),
        ("steps = true", "steps must be int, got True"),
        ("lr = [1]", "lr must be int or float, got [1]"),
        ("conditional = 1", "conditional must be bool, got 1"),
        ("method = 3", "method must be str, got 3"),
        ('ema = [0.5, "x"]', "ema must be int or float, got 'x'"),
        ('config = "x"', "no option 'config'"),
        ("steps = ", "is not TOML"),
        ('method = "ddpm"', "--method must be one of"),
    ],
)
def test_a_wrong_file_is_refused_and_nothing_made(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "form.toml", tmp_path / "run"
    file.write_text(text)
    code, error = fastcm_(capsys, "train", "--config", file, "--out", out)
    assert code == 2 and said in error
    assert not out.exists()


def test_a_file_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = fastcm_(capsys, "train", "--config", tmp_path / "x.toml", "--out", tmp_path / "r")
    assert code == 2 and "x.toml: no such file" in error


def test_strings_survive(tmp_path: Path) -> None:
    options = {"data": 'a "b" \\ c\n\u00e9 \U0001f600', "steps": 3, "clip": 1e-05, "guidance": None}
    file = tmp_path / "x.toml"
    file.write_text(toml.dump(options))
    assert toml._read(file) == {k: v for k, v in options.items() if v is not None}
