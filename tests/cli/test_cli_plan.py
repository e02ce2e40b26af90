"""``fastcm plan`` as a user meets it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastcm import Sampler
from fastcm.cli import plan as command
from fastcm.cli.tables import METHODS

ROOT = Path(__file__).resolve().parents[2]


def table(text: str, first: str) -> dict[str, list[str]]:
    """Rows of the table whose header begins with `first`, by their first cells."""
    rows: dict[str, list[str]] = {}
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        inside = line.startswith("|") and (inside or cells[0] == first)
        if inside:
            rows[cells[0]] = cells[1:]
    return rows


def planned(capsys: pytest.CaptureFixture[str], **options: object) -> str:
    command.plan(**options)  # type: ignore[arg-type]
    return capsys.readouterr().out


def test_a_plan_of_a_large_network_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, net="dit-xl", batch=1024, gpus=64, interconnect=400.0, precision="bf16")
    assert "dit-xl at 4x32x32, 67" in text and "16 rows a device" in text
    assert "interconnect 400 Gbit/s given" in text and "tflops not known" in text
    parts = table(text, "part of a step")
    assert parts["student, forward"][-2:] == ["not known", "not known"]
    assert parts["all-reduce of gradients"][2].endswith("ms")
    assert parts["all-reduce of gradients"][3] == "100.0 %"
    memory = table(text, "memory of a device")
    assert memory["memory of a device"] == [
        "whole", "whole, checkpointed", "sharded", "sharded, checkpointed",
    ]  # fmt: skip
    assert memory["moments"][0] == "5.399 GB"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("net", ["mlp", "unet", "dit-tiny"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_plan(
    method: str, net: str, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"net": net, "method": method, "precision": precision, "batch": 16, "classes": 10}
    text = planned(capsys, **options, tflops=1.0, bandwidth=10.0)
    parts = table(text, "part of a step")
    assert ("teacher" in parts) == (method in ("cd", "lcm", "scd"))
    for name in (
        "student, forward",
        "student, backward",
        "around the networks",
        "clip, Adam, averages",
    ):
        assert parts[name][2].endswith("s") and parts[name][3].endswith("%")
    assert parts["data"][2] == "not known" and "all that is known" in parts


def test_a_network_of_your_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_nets.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc = nn.Linear(7, 7)\n"
        "    def forward(self, x, t, cond=None):\n"
        "        return self.fc(x)\n"
        "def make():\n"
        "    return Net()\n"
        "def nothing():\n"
        "    return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = planned(capsys, net="own_nets:make", method="flow", shape="7", batch=5)
    assert "own_nets:make at 7, 0.0 M parameters" in text
    for name, message in (("nothing", "must return an nn.Module"), ("absent", "no function")):
        with pytest.raises(ValueError, match=message):
            command.plan(net=f"own_nets:{name}", shape="7")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"net": "dit-xxl"}, r"--net must be one of mlp, .* or module:function, got 'dit-xxl'"),
        ({"method": "gan"}, "--method must be one of flow, .*got 'gan'"),
        ({"shape": "4,x"}, "--shape must be numbers like 4,32,32, got '4,x'"),
        ({"shape": "16"}, "--net dit-s needs --shape C,H,W, got 16"),
        ({"dtype": "int4"}, "--dtype must be one of uint8, float32, got 'int4'"),
        ({"classes": -1}, "--classes must be >= 0, got -1"),
        ({"net": "mlp", "method": "lcm"}, "--method lcm needs --classes"),
        ({"tflops": 0.0}, "tflops must be > 0 TFLOP/s, got 0"),
        ({"batch": 100, "gpus": 8}, "batch 100 is not a multiple of 8 devices"),
        ({"gpus": 2, "parallel": "tp"}, "parallel must be"),
        ({"averages": -1}, "--averages must be >= 0"),
    ],
)
def test_mistakes_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command.plan(**options)  # type: ignore[arg-type]


def test_the_program_has_the_command() -> None:
    run = [sys.executable, "-m", "fastcm", "plan", "--net", "mlp", "--tflops", "1"]
    good = subprocess.run(run, capture_output=True, text=True, cwd=ROOT)
    assert good.returncode == 0 and "| student, forward |" in good.stdout, good.stderr
    bad = subprocess.run([*run, "--batch", "0"], capture_output=True, text=True, cwd=ROOT)
    assert bad.returncode == 2 and bad.stderr == "fastcm: batch must be >= 1, got 0\n"


def test_the_tables_of_the_documents_are_what_the_commands_print(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (ROOT / "docs/scale.md").read_text()
    shown = re.findall(r"    fastcm plan (--net dit-xl [^\n]*)\n\n(.*?)<!-- end -->", text, re.S)
    assert len(shown) == 2
    for options, wanted in shown:
        words = [word.removeprefix("--") for word in options.split()]
        flags = {name: True for name in ("checkpointing",) if name in words}
        words = [word for word in words if word not in flags]
        given: dict[str, object] = dict(zip(words[::2], map(_read, words[1::2])))
        assert planned(capsys, **given, **flags).strip() == wanted.strip()


def _read(word: str) -> object:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def test_training_takes_micro_batches(tmp_path: Path) -> None:
    """What a shortage of memory suggests."""
    ends = []
    for parts in (1, 4):
        out = tmp_path / str(parts)
        options = {"data": "digits", "method": "flow", "steps": 3, "batch": 16, "width": 16}
        given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        run = [sys.executable, "-m", "fastcm", "train", "--out", str(out), *given]
        run += ["--compile", "off", "--accumulate", str(parts)]
        done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert f"accumulate = {parts}\n" in (out / "run.toml").read_text()
        ends.append(Sampler.from_run(out, steps=1)(4, seed=0))
    assert torch.allclose(*ends, atol=1e-4)
    wrong = subprocess.run(
        [*run[:-1], "3", "--out", str(tmp_path / "x")], capture_output=True, text=True, cwd=ROOT
    )
    assert wrong.returncode == 2 and "not a multiple of accumulate 3" in wrong.stderr
