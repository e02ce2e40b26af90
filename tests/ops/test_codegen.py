"""What the kernels compile to for each GPU, read from machine code that no GPU is needed for."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton compiles on Linux only")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """The report of one run, in a process where kernels are compiled and not interpreted."""
    out = tmp_path_factory.mktemp("codegen")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.codegen", "--out", str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads((out / "codegen.json").read_text())["rows"]


def offenders(rows: list[Row], bad: Callable[[Row], bool]) -> list[str]:
    return [f"{r['kernel']} ({r['case']}) on {r['target']}: {r}" for r in rows if bad(r)]


def test_every_kernel_compiles_for_every_target(rows):
    compiled = {(row["kernel"], row["target"]) for row in rows}
    kernels = {
        "noising_kernel",
        "uniform_kernel",
        "boundary_kernel",
        "scale_kernel",
        "euler_kernel",
        "sampler_update_kernel",
        "loss_kernel",
        "loss_partial_kernel",
        "loss_finish_kernel",
        "grad_norm_kernel",
        "grad_norm_finish_kernel",
        "tick_kernel",
        "sweep_kernel",
        "attention_jvp_kernel",
    }
    targets = {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert compiled == {(kernel, target) for kernel in kernels for target in targets}


def test_no_parameter_has_a_name_that_the_launcher_of_compiled_code_takes():
    """It is ``def launcher(<parameters>, stream)`` with grids before: a second `stream` is a
    syntax error, and the compiled step would run eagerly."""
    taken = {
        "stream",
        "grid",
        "grid_0",
        "grid_1",
        "grid_2",
        "function",
        "runner",
        "bin",
        "launcher",
    }
    sources = [file.read_text() for file in (ROOT / "kernels").glob("*.py")]
    for tree in map(ast.parse, sources):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                assert not {a.arg for a in node.args.args} & taken, node.name


def test_nothing_spills_or_lives_in_local_memory(rows):
    assert offenders(rows, lambda row: row["spills"] > 0 or row["stack"] > 0) == []


def test_attention_fits_into_shared_memory_and_moves_in_vectors(rows):
    limits = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}
    attention = [row for row in rows if row["kernel"] == "attention_jvp_kernel"]
    assert len(attention) == 20
    assert offenders(attention, lambda r: not 0 < r["shared"] <= 1024 * limits[r["target"]]) == []
    assert offenders(attention, lambda row: "16" in row["access"] or "8" in row["access"]) == []


def test_aligned_floats_move_in_whole_vectors(rows):
    aligned = [row for row in rows if "odd" not in row["case"] and "misal" not in row["case"]]
    assert len(aligned) > 80
    assert offenders(aligned, lambda row: not row["full_width"]) == []


def test_pixels_move_at_least_4_at_a_time(rows):
    pixels = [row for row in rows if row["case"].startswith("u8") and row["target"] == "sm_90"]
    assert pixels
    assert offenders(pixels, lambda row: bool({"8", "16"} & set(row["access"]))) == []


def test_equal_dtypes_need_no_shared_memory(rows):
    cases = ("fp32 -> fp32", "fp32 -> fp32 fp32", "bf16 -> bf16 bf16", "fp16 -> fp16")
    same = [row for row in rows if row["case"] in cases]
    assert same
    assert offenders(same, lambda row: row["shared"] > 0) == []


def test_parameters_move_in_vectors_of_their_own(rows):
    sweeps = [r for r in rows if r["kernel"] == "sweep_kernel" and "misal" not in r["case"]]
    narrow = [row for row in sweeps if "16" in row["case"]]
    assert 0 < len(narrow) < len(sweeps)
    # 8 bytes of a 16-bit operand, so that one thread owns the same elements of all
    assert offenders(sweeps, lambda row: row["shared"] > 0) == []
    assert offenders(sweeps, lambda r: r["vector_bits"] != (64 if r in narrow else 128)) == []


def test_the_sweep_moves_36_bytes_with_one_average_and_the_norm_4(rows):
    moved = {(row["kernel"], row["case"]): row["bytes_per_element"] for row in rows}
    assert moved["sweep_kernel", "p fp32, g fp32, 1 average"] == 36
    assert moved["grad_norm_kernel", "norm of fp32"] == 4


def test_the_norm_waits_for_memory_although_it_reads_only(rows):
    norm = [r for r in rows if r["case"] == "norm of fp32" and r["target"] == "sm_90"]
    assert norm
    assert offenders(norm, lambda row: row["ridge"] != "memory") == []


def test_a_normal_costs_at_most_40_instructions_on_sm_90(rows):
    noising = [r for r in rows if r["kernel"] == "noising_kernel" and r["target"] == "sm_90"]
    assert noising
    assert offenders(noising, lambda row: row["instructions_per_normal"] > 40) == []


def test_float32_kernels_wait_for_the_memory_of_an_h200(rows):
    wide = [r for r in rows if r["target"] == "sm_90" and r["bytes_per_element"] >= 8]
    aligned = [row for row in wide if "odd" not in row["case"] and "misal" not in row["case"]]
    assert aligned
    assert offenders(aligned, lambda row: row["ridge"] != "memory") == []
