"""``fastcm sample`` into a folder: side by side, killed, stopped, and refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_sample_folder import CLASSES, files, network

import fastcm
from fastcm import cli
from fastcm.cli.sample import check_embedded
from fastcm.cli.sample_folder import SETTINGS
from fastcm.networks import MLP
from fastcm.sampling import Sampler


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a network with classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("runs") / "flow"
    data = fastcm.Dataset(torch.rand(32, 1, 4, 4), torch.arange(32) % CLASSES)
    net = network((1, 4, 4))
    options: dict[str, Any] = {"compile": False, "progress": False, "directory": path}
    fastcm.Trainer(net, fastcm.FlowMatching(), data=data, batch_size=8, **options).fit(1)
    return path


def command(run: Path, out: Path, *options: object) -> list[str]:
    form = ["sample", run, "--out", out, "--steps", 2, "--batch", 16, *options]
    return list(map(str, form))


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fastcm", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"COLUMNS": "80", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )


def here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> tuple[int, str, str]:
    """The command in this process: its exit code, output and errors."""
    monkeypatch.setattr(sys, "argv", ["fastcm", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, error = capsys.readouterr()
    return int(stop.value.code or 0), out, error


def test_two_processes_at_once_write_what_one_does(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [
        start(command(run, tmp_path / "both", "--first", first, "--n", n))
        for first, n in ((0, 100), (100, 60))
    ]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0] and not said[0][1] + said[1][1]
    code, out, _ = here(monkeypatch, capsys, command(run, tmp_path / "one", "--n", 160))
    assert code == 0
    assert re.fullmatch(r".*one: 160 drawn at \d+\.\d img/s, 0 there before\n", out)
    assert files(tmp_path / "both") == files(tmp_path / "one")
    code, out, _ = here(monkeypatch, capsys, command(run, tmp_path / "both", "--n", 160))
    assert (code, out) == (0, f"{tmp_path / 'both'}: 0 drawn, 160 there before\n")
    settings = json.loads((tmp_path / "both" / SETTINGS).read_text())
    assert settings == json.loads((tmp_path / "one" / SETTINGS).read_text())
    assert settings["step"] == 1 and settings["ema"] == 0 and settings["batch_size"] == 16


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL of POSIX")
def test_a_killed_command_continues_when_repeated(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    n = 2000
    process = start(command(run, tmp_path / "killed", "--n", n))
    try:
        until = time.monotonic() + 120
        while len(list(tmp_path.glob("killed/*.png"))) < 50:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.005)
    finally:
        process.kill()
        process.communicate()
    there = len(list(tmp_path.glob("killed/*.png")))
    assert there < n
    code, out, _ = here(monkeypatch, capsys, command(run, tmp_path / "killed", "--n", n))
    assert code == 0 and f" {n - there} drawn" in out and f" {there} there before" in out
    assert here(monkeypatch, capsys, command(run, tmp_path / "straight", "--n", n))[0] == 0
    assert files(tmp_path / "killed") == files(tmp_path / "straight")


@pytest.mark.usefixtures("default_handlers")
def test_a_command_stopped_by_sigterm_says_what_is_left(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = Sampler.__call__

    def stopping(self: Sampler, n: int, **options: Any) -> torch.Tensor:
        signal.raise_signal(signal.SIGTERM)
        return draw(self, n, **options)

    monkeypatch.setattr(Sampler, "__call__", stopping)
    code, out, _ = here(monkeypatch, capsys, command(run, tmp_path / "x", "--n", 40))
    assert code == 128 + signal.SIGTERM
    wanted = r".*x: stopped by SIGTERM: 16 drawn at .* img/s, 0 there before, 24 left for the same "
    assert re.fullmatch(wanted + r"command\n", out)


@pytest.mark.parametrize(
    ("out", "options", "code", "said"),
    [
        ("x", ["--n", 0], 0, "x: --n 0, nothing to draw, nothing written"),
        ("x", ["--n", -1], 2, "n must be >= 0, got -1"),
        ("x", ["--first", -1], 2, "first must be >= 0"),
        ("x.npy", ["--first", 2**32], 2, "first + n at most 2**32"),
        ("x.png", ["--format", "png"], 2, "x.png is one file"),
        ("x.npz", [], 2, "--out must end in .png or .npy, or name a folder"),
        ("x", ["--format", "gif"], 2, "format must be one of png, npz, pairs, got 'gif'"),
    ],
)
def test_bad_input_of_the_command_is_refused(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    out: str,
    options: list[object],
    code: int,
    said: str,
) -> None:
    found = here(monkeypatch, capsys, command(run, tmp_path / out, *options))
    assert found[0] == code and said in found[1 if code == 0 else 2], found
    assert not (tmp_path / out).exists()


def test_a_single_file_has_the_labels_of_its_indices_too(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.npy"
    here(monkeypatch, capsys, command(run, out, "--first", 4, "--n", 3))
    sampler = Sampler.from_run(run, steps=2, method="ode")
    wanted = sampler(7, cond=torch.arange(7) % CLASSES)[4:]
    np.testing.assert_allclose(np.load(out), wanted, rtol=0, atol=1e-5)


def test_a_folder_is_of_one_precision(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "samples"
    low = here(monkeypatch, capsys, command(run, out, "--n", 4, "--precision", "bf16"))
    assert low[0] == 0
    code, _, error = here(monkeypatch, capsys, command(run, out, "--n", 4))
    assert code == 2 and "precision: 'bf16' -> 'fp32'" in error


def test_a_folder_is_of_one_guidance_and_one_churn(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guided = ("--n", 8, "--guidance", 2)
    away = (*guided, "--guide", run)
    churned = ("--n", 8, "--method", "ode", "--churn")
    for name, first, other in (
        ("guide", away, guided),
        ("guidance", (*away, "--guidance-interval", "0.2,0.5"), away),
        ("guidance_rescale", (*away, "--guidance-rescale", 0.7), away),
        ("churn", (*churned, 2), (*churned, 3)),
    ):
        out = tmp_path / name
        assert here(monkeypatch, capsys, command(run, out, *first))[0] == 0
        assert name in json.loads((out / SETTINGS).read_text())
        code, _, error = here(monkeypatch, capsys, command(run, out, *other))
        assert code == 2 and name in error


def test_guidance_has_an_interval_and_is_rescaled(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, away = tmp_path / "x.npy", ("--n", 4, "--guide", run, "--guidance", 3)
    more = ("--guidance-interval", "0.2,0.5", "--guidance-rescale", 0.7, "--method", "ode")
    assert here(monkeypatch, capsys, command(run, out, *away, *more))[0] == 0
    guide = Sampler.from_run(run).net
    options: dict[str, Any] = {"steps": 2, "method": "ode", "guide": guide}
    sampler = Sampler.from_run(run, guidance_rescale=0.7, **options)
    wanted = sampler(4, cond=torch.arange(4) % CLASSES, guidance=[1.0, 3.0])
    np.testing.assert_allclose(np.load(out), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["interval", "rescale"])
def test_guidance_that_has_no_meaning_is_refused(
    name: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    option = (f"--guidance-{name}", "0.5")

    def error(*arguments: object) -> str:
        code, _, said = here(monkeypatch, capsys, [str(word) for word in arguments])
        assert code == 2
        return said

    sample = ("sample", run, "--out", tmp_path / "x")
    assert f"--guidance-{name} needs --guidance" in error(*sample, *option)
    embedding = Sampler(MLP((2,), width=8, num_classes=3, guided=True), fastcm.Linear())
    given = {"interval": None, "rescale": None, name: 0.5}
    with pytest.raises(ValueError, match=f"--guidance-{name} has no meaning for a network"):
        check_embedded(embedding, *given.values())
    if name == "interval":
        guided = (*sample, "--guidance", 2, "--guide", run, "--guidance-interval")
        for wrong in ("0.5", "0.7,0.2", "a,b"):
            assert "--guidance-interval must be LOW,HIGH" in error(*guided, wrong)
    else:
        pairs = ("pairs", "--teacher", run, "--out", tmp_path / "y")
        assert "--guidance-rescale needs --guidance" in error(*pairs, *option)
        guided = (*sample, "--guidance", 2, "--guide", run, "--guidance-rescale", 2)
        assert "guidance_rescale must be in [0, 1], got 2" in error(*guided)
    assert not (tmp_path / "x").exists() and not (tmp_path / "y").exists()


def test_a_guide_of_other_samples_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"compile": False, "progress": False, "directory": tmp_path / "other"}
    data = fastcm.Dataset(torch.rand(32, 1, 8, 8), torch.arange(32) % CLASSES)
    net = network((1, 8, 8))
    fastcm.Trainer(net, fastcm.FlowMatching(), data=data, batch_size=8, **options).fit(1)
    guided = ("--guidance", 2, "--guide", tmp_path / "other")
    code, _, error = here(monkeypatch, capsys, command(run, tmp_path / "out", *guided))
    assert code == 2 and "has samples (1, 8, 8)" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_rows_of_a_file_condition_the_samples_in_turn(
    suffix: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    labels = torch.tensor([1, 0, 1])
    file = tmp_path / f"labels{suffix}"
    if suffix == ".safetensors":
        save_file({"labels": labels}, file)
    elif suffix == ".npz":
        np.savez(file, labels=labels.numpy())
    else:
        np.save(file, labels.numpy())

    def drawn(name: str, *options: object) -> Any:
        code, _, error = here(monkeypatch, capsys, command(run, tmp_path / name, *options))
        assert code == 0, error
        return tmp_path / name

    whole = np.load(drawn("a.npy", "--n", 40, "--cond", file))
    for label in (0, 1):
        same = np.load(drawn(f"{label}.npy", "--n", 40, "--label", label))
        at = (labels[torch.arange(40) % 3] == label).numpy()
        np.testing.assert_array_equal(whole[at], same[at])
    part = np.load(drawn("b.npy", "--first", 7, "--n", 5, "--cond", file))
    np.testing.assert_allclose(part, whole[7:12], rtol=1e-4, atol=1e-6)
    folder = drawn("folder", "--n", 40, "--cond", file, "--format", "npz")
    held = [np.load(path) for path in sorted(folder.glob("*.npz"))]
    assert np.concatenate([h["arr_1"] for h in held]).tolist() == labels.repeat(14)[:40].tolist()
    code, _, error = here(monkeypatch, capsys, command(run, folder, "--n", 40, "--format", "npz"))
    assert code == 2 and "cond" in error


def test_a_condition_that_cannot_be_read_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "ragged.npz", a=np.zeros(3), b=np.zeros(2))
    np.save(tmp_path / "far.npy", np.full(3, CLASSES + 1))
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    for options, words in (
        (["none.npy"], "no such file"),
        (["labels.txt"], "must be a .npy, .npz or .safetensors file"),
        (["ragged.npz"], "as many rows of each array"),
        (["bad.safetensors"], "is not a readable .safetensors file"),
        (["far.npy"], "must hold labels in"),
        (["far.npy", "--label", "1"], "--label has no meaning beside --cond"),
    ):
        given = ["--cond", tmp_path / options[0], *options[1:]]
        code, _, error = here(monkeypatch, capsys, command(run, tmp_path / "x.npy", *given))
        assert code == 2 and words in " ".join(error.split()), (options, error)


def test_the_shift_of_a_run_is_that_of_its_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastcm.schedules import ShiftedGrid, sampling_times

    small = ["--width", "16", "--steps", "3", "--batch", "16", "--compile", "off"]
    for method in ("ct", "flow"):
        out = tmp_path / method
        form = ["train", "--method", method, "--shift", "3", *small, "--out", str(out)]
        assert here(monkeypatch, capsys, form)[0] == 0
    times = sampling_times(ShiftedGrid(3.0), 2, fastcm.Linear())
    plain = sampling_times(ShiftedGrid(1.0), 2, fastcm.Linear())
    for name, more, wanted in (("a", [], times), ("b", ["--shift", "1"], plain)):
        folder = tmp_path / name
        assert here(monkeypatch, capsys, [*command(tmp_path / "ct", folder), *more])[0] == 0
        assert json.loads((folder / "samples.json").read_text())["times"] == wanted
    form = ["train", "--method", "ct", "--shift", "3", "--grid", "karras", "--out", "x"]
    code, _, error = here(monkeypatch, capsys, form)
    assert code == 2 and "--shift says where the times lie" in error
