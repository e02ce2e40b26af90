"""The benchmarks' own program: what it records of a machine, how it judges, what it refuses."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pages import ROOT

import benchmarks.__main__ as program
from benchmarks import compare, conftest, harness, machine, missing, plots, report

ROW = {"id": "test_op[a]", "ms": {"fastcm": 1.0}, "eager/fastcm": 2.0, "fastcm/bare": 1.1}
BEFORE: dict[str, Any] = {
    "machine": {"cpu": "x", "torch": "2.13.0", "threads": 2},
    "rows": [{**ROW, "spread": {"eager/fastcm": [1.9, 2.1], "fastcm/bare": [1.05, 1.15]}}],
}


def after(**changed: Any) -> dict[str, Any]:
    made = copy.deepcopy(BEFORE)
    made["rows"][0] |= changed
    return made


def verdicts(second: dict[str, Any], **options: Any) -> dict[str, str]:
    return {c.ratio: c.verdict for c in compare.changes(BEFORE, second, **options)}


def test_ratios_are_those_of_the_rounds_with_their_spread() -> None:
    samples = {"eager": [2.0, 4.0, 6.0, 8.0, 10.0], "fastcm": [1.0, 1.0, 2.0, 2.0, 2.0]}
    found = harness.ratios(samples, ("eager", "fastcm"))
    assert found["eager/fastcm"] == 4.0 and found["rounds"] == 5  # of 2, 4, 3, 4, 5
    low, high = found["spread"]["eager/fastcm"]
    assert 2.0 < low < 3.0 and 4.0 < high < 5.0


def test_a_quick_look_takes_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    timers = {"a": lambda: 1.0, "b": lambda: 2.0}
    assert len(harness.interleaved(timers, 9)["a"]) == 9
    monkeypatch.setattr(harness, "QUICK", True)
    assert len(harness.interleaved(timers, 9)["a"]) == harness.QUICK_ROUNDS


def test_the_same_result_is_the_same() -> None:
    assert set(verdicts(BEFORE).values()) == {"same"}


@pytest.mark.parametrize(
    ("ratio", "value", "spread", "verdict"),
    [
        ("eager/fastcm", 1.5, [1.4, 1.6], "slower"),
        ("eager/fastcm", 2.5, [2.4, 2.6], "faster"),
        ("eager/fastcm", 1.5, [1.2, 1.95], "same"),  # its rounds reach into those of before
        ("fastcm/bare", 1.3, [1.25, 1.35], "slower"),  # an overhead: less is better
        ("fastcm/bare", 1.0, [0.99, 1.02], "faster"),
    ],
)
def test_a_change_counts_beyond_the_noise_of_both(
    ratio: str, value: float, spread: list[float], verdict: str
) -> None:
    second = after(**{ratio: value})
    second["rows"][0]["spread"][ratio] = spread
    assert verdicts(second)[ratio] == verdict
    assert verdicts(second, least=10.0)[ratio] == "same"


def test_of_every_ratio_it_is_known_which_way_is_better() -> None:
    for ratio, better in (("compiled/fastcm compiled", 3.0), ("ddp/alone", 1.0)):
        first = {ratio: 2.0, "spread": {ratio: [2.0, 2.0]}}
        second = {ratio: better, "spread": {ratio: [better, better]}}
        assert compare.verdict(ratio, first, second, 0.02) == "faster"
        assert compare.verdict(ratio, second, first, 0.02) == "slower"


def test_a_change_of_a_hundredth_is_none_however_quiet_the_rounds() -> None:
    quiet = {"eager/fastcm": [2.02, 2.02]}
    first = {"rows": [{**ROW, "spread": {"eager/fastcm": [2.0, 2.0]}}]}
    (change, *_) = compare.changes(first, after(**{"eager/fastcm": 2.02, "spread": quiet}))
    assert change.verdict == "same"


def test_rows_that_one_file_lacks_are_named_and_a_missing_spread_decides_nothing() -> None:
    second = {"rows": [{**ROW, "id": "test_op[b]"}]}
    assert {c.verdict for c in compare.changes(BEFORE, second)} == {"only before", "only after"}
    assert set(verdicts(after(spread={})).values()) == {"unknown"}


@pytest.mark.parametrize(
    ("second", "code", "said"),
    [
        (BEFORE, 0, "2 same"),
        (after(**{"eager/fastcm": 9.0, "spread": {"eager/fastcm": [9, 9]}}), 0, "faster"),
        (after(**{"eager/fastcm": 1.0, "spread": {"eager/fastcm": [1, 1]}}), 1, "slower"),
        (after(spread={}), 2, "measure it anew"),
        ({"rows": []}, 2, "only before"),
    ],
)
def test_the_exit_code_tells_a_machine(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    second: dict[str, Any],
    code: int,
    said: str,
) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, body in zip(files, (BEFORE, second)):
        file.write_text(json.dumps(body))
    assert program.main(["compare", *map(str, files)]) == code
    assert said in capsys.readouterr().out


def test_other_machines_are_noted() -> None:
    second = copy.deepcopy(BEFORE)
    second["machine"] |= {"torch": "2.14.0", "dirty": True}
    assert compare.differences(BEFORE, second) == [
        "torch: 2.13.0 and 2.14.0",
        "the second was measured on sources that were not committed",
    ]


def test_what_is_no_result_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(SystemExit) as stop:
        compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert stop.value.code == 2 and "is not the result of a benchmark" in capsys.readouterr().err


def test_the_record_says_what_numbers_depend_on() -> None:
    found = machine.machine()
    for name in ("date", "python", "torch", "threads", "cores", "cpu", "cpu_capability", "numpy"):
        assert found[name], name
    assert {"commit", "dirty", "compiler", "cpu_mhz", "memory_gib", "load"} <= found.keys()
    assert found["torch"] == torch.__version__
    assert json.loads(json.dumps(found)) == found


def test_sources_that_differ_from_the_commit_are_recorded(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    assert machine.dirty(tmp_path) is None  # no repository
    for name in machine.MEASURED[:3]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("1\n")
    (tmp_path / "benchmarks/results").mkdir()
    (tmp_path / "benchmarks/results/a.json").write_text("{}\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *command], check=True)
    assert machine.dirty(tmp_path) is False
    (tmp_path / "benchmarks/results/a.json").write_text("{}\n\n")
    assert machine.dirty(tmp_path) is False  # a result is no source
    (tmp_path / "kernels/a.py").write_text("2\n")
    assert machine.dirty(tmp_path) is True


def test_every_part_is_a_file_of_which_a_quick_look_takes_some_rows() -> None:
    files = {path.name for path in (ROOT / "benchmarks").glob("test_*.py")}
    assert {part.file for part in program.PARTS.values()} == files


def test_without_a_part_it_is_a_quick_look_at_all_of_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """And each has its share of the time that is left; what it would be in full is said."""
    calls: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append((command, env))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(program.subprocess, "run", run)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "ops_cpu.json").write_text('{"rows": [{"seconds": 60}, {"seconds": 30}]}')
    (tmp_path / "step_cpu.json").write_text('{"rows": [{"seconds": 60}, {}]}')
    assert program.main([]) == 0
    assert [command[5] for command, _ in calls] == [
        f"benchmarks/{part.file}" for part in program.PARTS.values()
    ]
    shares = [float(env["PART_SECONDS"]) for _, env in calls]
    assert shares[0] == pytest.approx(program.QUICK_SECONDS / len(calls), abs=1)
    assert shares[-1] == pytest.approx(program.QUICK_SECONDS, abs=1)  # what the others left
    assert all(env["QUICK"] == "1" for _, env in calls)
    said = capsys.readouterr().out
    assert "ops 1.5 min; optim unmeasured; step unmeasured" in said

    calls.clear()
    monkeypatch.setattr(program, "QUICK_SECONDS", 0)
    assert program.main([]) == 0 and not calls
    assert "plan: no time left" in capsys.readouterr().out

    assert program.main(["ops"]) == 0
    assert "QUICK" not in calls[0][1] and "PART_SECONDS" not in calls[0][1]

    calls.clear()
    assert program.main(["optimizer", "codegen"]) == program.main(["all"]) == 0
    ends = [command[-1] for command, _ in calls]
    assert ends[:2] == ["benchmarks/test_optim.py", "benchmarks.codegen"]
    assert len(ends[2:]) == len(program.PARTS) + 1 and ends[-1] == "benchmarks.codegen"


def test_rows_are_resumed_by_the_commit_and_none_begins_after_the_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(conftest, "_REPORTS", {})
    monkeypatch.setattr(conftest, "_START", time.monotonic())  # not what the tests before took
    first, second = (
        SimpleNamespace(name=f"test_op[{x}]", path=Path("test_ops.py"), fixturenames=["report"])
        for x in "ab"
    )
    conftest.pytest_collection_finish(SimpleNamespace(items=[first, second]))  # type: ignore[arg-type]
    made = conftest._report_of(first)  # type: ignore[arg-type]
    made.begin(first.name)
    made.add({"case": "a"})
    (row,) = json.loads((tmp_path / "ops_cpu.json").read_text())["rows"]
    assert row["id"] == "test_op[a]" and row["seconds"] >= 0

    def setup(item: Any, **environment: str) -> str:
        monkeypatch.setattr(conftest, "_REPORTS", {})
        for name in ("RESUME", "PART_SECONDS"):
            monkeypatch.setenv(name, environment.get(name, ""))
        try:
            conftest.pytest_runtest_setup(item)
        except pytest.skip.Exception as reason:
            return str(reason)
        return "runs"

    assert setup(first) == setup(second, RESUME="1") == "runs"
    assert setup(first, RESUME="1") == "measured before"
    assert setup(second, RESUME="1", PART_SECONDS="0") == "out of time: run again"
    assert setup(second, PART_SECONDS="0") == "out of time: run again"
    monkeypatch.setattr(harness, "machine", lambda: {"commit": "another"})
    assert setup(first, RESUME="1") == "runs"

    monkeypatch.setattr(missing, "PARTS", ("ops", "jvp"))
    (tmp_path / "ops_cpu.json").rename(tmp_path / "ops_gpu.json")
    with pytest.raises(SystemExit) as stop:
        missing.main()
    said = capsys.readouterr().out
    assert stop.value.code == 1 and "gpu-ops: 1 rows\n  missing test_op[b]" in said
    assert "gpu-jvp: nothing yet" in said


def test_a_gpu_s_parts_all_run_though_each_fails(tmp_path: Path) -> None:
    """`make gpu`, every line of it, with an interpreter that only notes what it was to run."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(f'#!/bin/sh\necho "$RESUME $PYTHONPATH $*" >> {log}\nexit 3\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "gpu", f"PYTHON={python}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0  # something is missing
    *runs, last = log.read_text().splitlines()
    assert last.split() == [".", "-m", "benchmarks.missing"]
    assert runs[0] == "1 . -m pytest -m gpu tests"
    files = [f"1 . -m pytest -s benchmarks/test_{name}.py" for name in missing.PARTS]
    assert sorted(runs[1:]) == sorted(files)
    assert {f"test_{name}.py" for name in missing.PARTS} <= {
        part.file for part in program.PARTS.values()
    }


def test_a_quick_look_at_a_part_measures_and_keeps_nothing(tmp_path: Path) -> None:
    """The smallest part, whole: its rows are checked, timed, and written where --out says."""
    held = {p: p.stat().st_mtime_ns for p in report.RESULTS.iterdir()}
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks", "parallel", "--quick", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((out / "parallel_cpu.json").read_text())["rows"]
    assert row["rounds"] == harness.QUICK_ROUNDS and "ddp/alone" in row["spread"]
    assert held == {p: p.stat().st_mtime_ns for p in report.RESULTS.iterdir()}


def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        program.main(["opps"])
    assert "no part opps: there are ops, optim" in capsys.readouterr().err
    monkeypatch.setattr(program, "NEEDED", {"nothing_of_that_name": "of-that-name"})
    with pytest.raises(SystemExit):
        program.main(["ops"])
    assert "need of-that-name: pip install" in capsys.readouterr().err


def test_without_a_checkout_the_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("typer")
    from fastcm import cli
    from fastcm.cli import bench

    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["fastcm", "bench", "ops"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "make bench" in capsys.readouterr().err


def test_the_command_hands_over_to_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("typer")
    from fastcm import cli

    file = tmp_path / "a.json"
    file.write_text(json.dumps(BEFORE))
    monkeypatch.setattr(sys, "argv", ["fastcm", "bench", "compare", str(file), str(file)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code and "2 same" in capfd.readouterr().out


def test_a_result_that_is_not_there_is_said_not_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(report.SECTIONS, "demo", ("no_such_file", report.tables.demo_table))
    monkeypatch.setitem(report.PAGES, "a.md", ("demo",))
    page = "<!-- demo:begin -->\nold\n<!-- demo:end -->\n"
    assert (
        report.render(page, "a.md") == f"<!-- demo:begin -->\n{report.ABSENT}\n<!-- demo:end -->\n"
    )


def test_a_plot_has_a_bar_for_every_value_on_the_right_side_of_the_line() -> None:
    rows = [plots.Bar("a & b", (2.0, 0.5)), plots.Bar("c", (4.0, None))]
    drawn = plots.bars("title", ("eager", "compiled"), rows, unit="ratio", line=1.0)
    assert drawn.count("<title>") == 3 and "a &amp; b" in drawn
    assert drawn == plots.bars("title", ("eager", "compiled"), rows, unit="ratio", line=1.0)
    bars = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"[^>]*><title>', drawn)
    (twice, _), (half, width), (four_times, _) = (tuple(map(float, bar)) for bar in bars)
    assert twice == four_times == pytest.approx(half + width, abs=0.2)  # the line, where 1 is
