"""The command line as a user meets it."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch

import fastcm
from fastcm import cli
from fastcm.cli import demo, recipes, tables

TINY = ["--width", "16", "--batch", "16", "--compile", "off", "--data", "digits"]


def process(*arguments: object, fails: bool = False, both: bool = False) -> str:
    """Run the command in a process of its own; returns what it printed, if `both` also its log."""
    result = subprocess.run(
        [sys.executable, "-m", "fastcm", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={"COLUMNS": "200", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    said = verdict(result.returncode, result.stdout, result.stderr, fails)
    return said + result.stderr if both else said


def fastcm_(*arguments: object, fails: bool = False) -> str:
    """The same in this process, which saves the seconds of a start; as one line, without wraps."""
    out, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fastcm", *map(str, arguments)])
        patch.setenv("COLUMNS", "200")
        with redirect_stdout(out), redirect_stderr(error), pytest.raises(SystemExit) as stop:
            cli.main()
    said, complained = (" ".join(stream.getvalue().split()) for stream in (out, error))
    return verdict(stop.value.code or 0, said, complained, fails)


def verdict(code: int | str, out: str, error: str, fails: bool) -> str:
    """What was printed, of a command that ended as it should."""
    assert code == (2 if fails else 0), (out, error)
    assert "Traceback" not in error
    return error if fails else out


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "flow"
    process("train", "--method", "flow", "--steps", 20, *TINY, "--out", out)
    return out


def test_train_writes_a_run_that_can_be_sampled(flow: Path, tmp_path: Path) -> None:
    assert json.loads((flow / "run.json").read_text())["method"] == "flow"
    sampler = fastcm.Sampler.from_run(flow, steps=1, ema=0)
    x = sampler(5, seed=0)
    assert x.shape == (5, 1, 8, 8) and torch.isfinite(x).all()
    process("sample", flow, "--n", 5, "--out", tmp_path / "x.npy")
    assert np.array_equal(np.load(tmp_path / "x.npy"), x.numpy())
    fastcm_("sample", flow, "--n", 9, "--out", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    fastcm_("sample", flow, "--n", 3, "--first", 7, "--out", tmp_path / "folder")
    names = sorted(p.name for p in (tmp_path / "folder").iterdir())
    assert names == ["000007.png", "000008.png", "000009.png", "samples.json"]


def test_a_profile_says_where_the_time_of_a_step_goes(tmp_path: Path) -> None:
    run = ["train", "--method", "flow", *TINY, "--out", tmp_path / "run", "--profile", "--steps"]
    assert "--profile needs 70 steps" in fastcm_(*run, 69, fails=True)
    assert not (tmp_path / "run").exists()
    said = process(*run, 70, both=True)
    table = (tmp_path / "run" / "profile" / "table.txt").read_text()
    assert table in said and "steps 61 to 70 on cpu" in table and "network, backward" in table
    trace = json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())
    assert any(e["name"] == "fastcm: backward" for e in trace["traceEvents"])
    assert "profile" not in (tmp_path / "run" / "run.toml").read_text()
    assert "but 0 are to be taken" in fastcm_(*run, 70, "--resume", fails=True)


def test_the_form_of_the_issue_resumes_where_it_was_stopped(tmp_path: Path) -> None:
    form = ["train", "--method", "ct", "--net", "mlp", "--steps", 60, "--save-every", 25, *TINY]
    fastcm_(*form, "--out", tmp_path / "straight")
    fastcm_(*form, "--out", tmp_path / "stopped")
    last = tmp_path / "stopped" / "checkpoints" / "step_000000060"
    shutil.rmtree(last)  # as if killed between the saves at 50 and 60
    assert "at step 50" in fastcm_(*form, "--out", tmp_path / "stopped", "--resume")
    weights = [
        (tmp_path / run / "checkpoints" / "step_000000060" / "average_0.safetensors").read_bytes()
        for run in ("straight", "stopped")
    ]
    assert weights[0] == weights[1]


def stopped(command: list[str], run: Path, more: Callable[[int], None]) -> str:
    """Start a command, do `more` once it has taken a step, end it by SIGTERM; its output."""
    environment = {"COLUMNS": "200", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    before = (run / "metrics.jsonl").stat().st_size if run.exists() else 0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            while not (
                (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > before
            ):
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
            more(process.pid)
            process.send_signal(signal.SIGTERM)
            out, error = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0 and error == "", (out, error)
    return out


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM kills at once there")
def test_sigterm_saves_and_prints_the_command_that_resumes(tmp_path: Path) -> None:
    run = tmp_path / "a run"
    options = ["--method", "flow", "--steps", 10**6, "--log-every", 1, "--save-every", 0]
    form = list(map(str, ["train", *options, *TINY, "--keep-every", 10**5, "--out", run]))

    def second(pid: int) -> None:
        error = fastcm_(*form, "--resume", fails=True)
        assert f"{run} is in use: process {pid} (" in error and "choose another" in error

    out = stopped([sys.executable, "-m", "fastcm", *form], run, second)
    said = re.fullmatch(r"(.*): stopped by SIGTERM at step (\d+), continue with: (.*)\n", out)
    assert said is not None and said[1] == str(run), out
    command = shlex.split(said[3])
    assert command == [sys.executable, "-m", "fastcm", *form, "--resume"]
    again = stopped(command, run, lambda pid: None).splitlines()
    assert again[0] == f"resumed {run} at step {said[2]}"
    assert again[1].endswith(said[3])  # as it was: --resume is there already
    steps = [p.name for p in (run / "checkpoints").iterdir()]
    assert f"step_{int(said[2]):09d}" in steps and len(steps) == 2


def test_checkpoints_are_kept_for_ever_and_metrics_written_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    options = ["--method", "flow", "--steps", 9, "--save-every", 2, "--keep", 1]
    more = ["--keep-every", 3, "--tensorboard", "--out", tmp_path / "run"]
    fastcm_("train", *options, *TINY, *more)
    steps = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert steps == ["step_000000003", "step_000000006", "step_000000009"]
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))


def test_distillation_starts_from_the_teacher(flow: Path, tmp_path: Path) -> None:
    out = tmp_path / "cd"
    fastcm_("train", "--method", "cd", "--teacher", flow, "--steps", 3, *TINY, "--out", out)
    student = fastcm.Sampler.from_run(out, ema=-1).net.state_dict()
    teacher = fastcm.Sampler.from_run(flow).net.state_dict()
    assert all((student[k] - v).abs().max() < 0.01 for k, v in teacher.items())
    assert any(not torch.equal(student[k], v) for k, v in teacher.items())


def test_evaluate_prints_the_floor_the_samples_and_the_gap(flow: Path) -> None:
    out = fastcm_("evaluate", flow, "--steps", 1, "--ode", 3, "--n", 64)
    rows = re.findall(r"(training data|multistep|ode)\D+(\d*)\D+(\d+\.\d+)\D+(\d+\.\d+)", out)
    assert [row[0] for row in rows] == ["training data", "multistep", "ode"]
    assert float(rows[0][3]) < float(rows[1][3])
    assert re.search(r"consistency gap over 40 intervals: mean \d", out)


def test_conditional_runs_draw_the_label_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--conditional", "--condition-dropout", 0.2, "--sample-every", 2]
    fastcm_("train", "--method", "flow", "--steps", 4, *options, *TINY, "--out", out)
    assert (out / "samples" / "step_000000004.png").exists()
    a, b = tmp_path / "a.npy", tmp_path / "b.npy"
    fastcm_("sample", out, "--n", 2, "--label", 3, "--guidance", 2.0, "--out", a)
    fastcm_("sample", out, "--n", 2, "--label", 3, "--out", b)
    assert not np.array_equal(np.load(a), np.load(b))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "ddpm"], f"--method must be one of {', '.join(tables.METHODS)}"),
        (["--method", "flow", "--intervals", "40"], "--intervals has no meaning for --method flow"),
        (["--method", "stepwise", "--intervals", "0"], "phases must be >= 1, got 0"),
        (["--method", "stepwise", "--intervals", "cm"], "--intervals must be a number for"),
        (["--method", "ct", "--teacher", "x"], "--teacher has no meaning for --method ct"),
        (["--method", "cd"], "--method cd needs --teacher"),
        (["--metric", "lpiips"], "--metric must be one of"),
        (["--metric", "lpips"], "--metric lpips and --lpips-weights FILE"),
        (["--guidance", "2", "--method", "cd", "--teacher", "x"], "--guidance needs --conditional"),
        (["--intervals", "many"], "--intervals must be a number or one of cm, ict"),
        (["--prediction", "eps"], "prediction 'eps' cannot recover data"),
        (["--data", "nowhere.npz"], "nowhere.npz"),
        (["--size", "16"], "size applies to a folder"),
        (["--channels", "1"], "channels applies to a folder"),
        (["--steps", "0"], "--steps must be >= 1"),
        (["--lr", "-1"], "--lr must be > 0"),
        (["--target-ema", "1.5"], r"EMA decay must be in (0, 1), got 1.5"),
        (["--precision", "fp8"], "precision must be"),
        (["--method", "cd", "--teacher", "nowhere"], "no checkpoint in nowhere"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    tmp_path: Path,
    options: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["fastcm", "train", *options, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.startswith("fastcm: ")
    assert not (tmp_path / "run").exists()


def test_a_run_directory_is_not_overwritten(flow: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in flow.rglob("*")}
    again = ["train", "--method", "flow", *TINY, "--out", flow]
    assert "holds a run already" in fastcm_(*again, "--steps", 20, fails=True)
    error = fastcm_(*again, "--steps", 30, "--resume", fails=True)
    assert "run of other settings: --steps: 20 -> 30" in error
    assert before == {p: p.stat().st_mtime_ns for p in flow.rglob("*")}


def test_a_refused_resume_writes_no_settings(flow: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(flow, copy)
    (copy / "run.json").unlink()
    options = ["train", "--method", "flow", "--steps", 20, *TINY[2:], "--out", copy, "--resume"]
    assert "network.width: 16 -> 24" in fastcm_(*options, "--width", 24, fails=True)
    assert "at step 20" in fastcm_(*options, "--width", 16)
    assert "it has no run.json" in fastcm_("evaluate", copy, fails=True)
    (copy / "run.json").write_text("{}")
    assert "does not hold the settings" in fastcm_("evaluate", copy, fails=True)


def test_evaluate_notices_other_data(tmp_path: Path) -> None:
    file, out = tmp_path / "x.npy", tmp_path / "run"
    np.save(file, np.random.rand(50, 2).astype(np.float32))
    fastcm_("train", "--method", "flow", "--steps", 2, *TINY[:-2], "--data", file, "--out", out)
    np.save(file, np.random.rand(50, 2).astype(np.float32))
    assert "is not what it was trained on: contents" in fastcm_("evaluate", out, fails=True)


def test_resume_of_nothing_starts(tmp_path: Path) -> None:
    fastcm_("train", "--steps", 2, *TINY, "--out", tmp_path / "new", "--resume")
    assert (tmp_path / "new" / "checkpoints" / "step_000000002").is_dir()


def test_sampling_what_is_no_run_is_refused(tmp_path: Path, flow: Path) -> None:
    x = tmp_path / "x.png"
    assert "no checkpoint in" in process("sample", tmp_path, "--out", x, fails=True)
    assert "--label needs a run" in fastcm_("sample", flow, "--label", 1, "--out", x, fails=True)
    guided = ("sample", flow, "--guide", flow, "--out", tmp_path / "z.npy")
    assert "4 samples" in fastcm_(*guided, "--guidance", 2, "--n", 4)
    assert "--guide needs --guidance" in fastcm_(*guided, fails=True)
    churned = ("sample", flow, "--churn", "2,0.1,5", "--method")
    assert "16 samples" in fastcm_(
        *churned, "ode", "--steps", 2, "--n", 16, "--out", tmp_path / "y.png"
    )
    assert "--churn has a meaning" in fastcm_(*churned, "multistep", "--out", x, fails=True)
    assert "--churn must be S_CHURN" in fastcm_(
        *churned[:3], "2,1", *("--method", "ode"), "--out", x, fails=True
    )
    assert "--solver has a meaning" in fastcm_(
        "sample", flow, "--method", "multistep", "--solver", "heun", "--out", x, fails=True
    )
    assert "--guidance needs a run" in fastcm_(
        "sample", flow, "--guidance", 2, "--out", x, fails=True
    )
    assert "is the directory of a run" in fastcm_("sample", flow, "--out", flow, fails=True)
    assert not x.exists()


def test_the_demo_distils_to_one_step(tmp_path: Path) -> None:
    """A tenth of the demo: the order of its figures, not their size."""
    from dataclasses import replace

    from rich.console import Console

    full_flow, full_cd = demo.FLOW, demo.distillation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "FLOW", replace(full_flow, steps=250))
        patch.setattr(demo, "distillation", lambda teacher: replace(full_cd(teacher), steps=200))
        demo.run(tmp_path, Console(quiet=True))
    report = json.loads((tmp_path / "report.json").read_text())
    distance = {k: v["frechet"] for k, v in report["distances to held-out digits"].items()}
    assert distance["training data"] < distance["distilled, 1 step"] < distance["ReFlow, 1 step"]
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_info_names_versions() -> None:
    out = fastcm_("info")
    assert fastcm.__version__ in out and torch.__version__ in out


def test_help_describes_every_option() -> None:
    out = fastcm_("train", "--help")
    for field in recipes.Recipe.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in out
