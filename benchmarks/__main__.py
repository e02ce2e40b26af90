"""The benchmarks by name.

python -m benchmarks [PART ...] [--quick] [--out DIR]
    PART: ops, optim (or optimizer), step, sampling, jvp, attention, parallel, data, plan, lora,
    codegen (what the kernels compile to), or all; without one, a quick look at all that is
    timed, within some minutes
python -m benchmarks compare BEFORE.json AFTER.json
python -m benchmarks report [--check]

Each part is checked against float64 before any clock starts. Results go to --out, else to
benchmarks/results; those of a quick look, few rounds of few rows, nowhere unless --out is given.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import compare, report

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Part:
    """A file of benchmarks, and which of its rows a quick look takes."""

    file: str
    quick: str = ""
    """An expression of pytest's -k; all rows if empty."""


PARTS = {
    "ops": Part("test_ops.py", "cifar and fp32"),
    "optim": Part("test_optim.py", "10 or drift"),
    "step": Part("test_step.py", "MLP-CT-256-fp32 or MLP-MeanFlow"),
    "sampling": Part("test_sampling.py", "MLP and not 512"),
    "jvp": Part("test_jvp.py", "MLP-MeanFlow-fp32"),
    "attention": Part("test_attention.py"),
    "parallel": Part("test_parallel.py", "MLP and not scaling"),
    "data": Part("test_data.py"),
    "plan": Part("test_plan.py", "MLP and not 1024"),
    "lora": Part("test_lora.py", "256x4"),
}
CODEGEN = "codegen"
"""What no clock is needed for: of it there is no quick look."""
ALSO = {"optimizer": "optim"}
"""Other names of parts."""
QUICK_SECONDS = 300
"""Of a quick look: each part has its share of what is left, and begins no row after that."""
NEEDED = {"pytest": "pytest"}


def missing() -> list[str]:
    """The packages to install before anything can be measured."""
    return [
        package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None
    ]


def cost(name: str) -> str:
    """What a part took in full, as benchmarks/results has it."""
    path = report.RESULTS / f"{name}_cpu.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    if not rows or any("seconds" not in row for row in rows):
        return f"{name} unmeasured"
    return f"{name} {sum(row['seconds'] for row in rows) / 60:.1f} min"


def command(name: str, *, quick: bool) -> list[str]:
    if name == CODEGEN:
        return [sys.executable, "-m", "benchmarks.codegen"]
    part = PARTS[name]
    chosen = ["-k", part.quick] if quick and part.quick else []
    return [sys.executable, "-m", "pytest", "-s", "-q", f"benchmarks/{part.file}", *chosen]


def measure(names: Sequence[str], *, quick: bool, out: Path | None) -> int:
    """Run parts one after another, each in a process of its own; 1 if one failed."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or (Path(scratch) if quick else report.RESULTS)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OUT": str(folder.resolve())}
        if quick:
            environment["QUICK"] = "1"
        failed = []
        begin = time.monotonic()
        for i, name in enumerate(names):
            start = time.monotonic()
            if quick:
                share = (QUICK_SECONDS - (start - begin)) / (len(names) - i)
                if share <= 0:
                    print(f"{name}: no time left, take it by its name")
                    continue
                environment = {**environment, "PART_SECONDS": f"{share:.0f}"}
            done = subprocess.run(command(name, quick=quick), cwd=ROOT, env=environment)
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
            if done.returncode:
                failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}")
    elif quick and out is None:
        print("A quick look, of which nothing is kept: --out DIR keeps it.")
        print(f"In full, all or some by name: {'; '.join(map(cost, names))}.")
    else:
        print(f"Results are in {folder}")
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["compare"]:
        return compare.main(given[1:])
    if given[:1] == ["report"]:
        return report.main(given[1:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", help="of the above; a quick look at all if absent")
    parser.add_argument("--quick", action="store_true", help="few rounds of few rows")
    parser.add_argument("--out", type=Path, help="folder of the JSON")
    options = parser.parse_args(given)
    names = [ALSO.get(name, name) for name in options.parts or ["all"]]
    unknown = sorted({*names} - {*PARTS, CODEGEN, "all"})
    if unknown:
        parser.error(f"no part {', '.join(unknown)}: there are {', '.join(PARTS)}, {CODEGEN}, all")
    if missing():
        parser.error(f"the benchmarks need {', '.join(missing())}: pip install '.[bench]'")
    quick = options.quick or not options.parts
    if "all" in names:
        names = [*PARTS, *([] if quick else [CODEGEN])]
    return measure(list(dict.fromkeys(names)), quick=quick, out=options.out)


if __name__ == "__main__":
    sys.exit(main())
