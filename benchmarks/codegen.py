"""What the kernels compile to, without a GPU: ``python -m benchmarks.codegen [--out DIR]``.

What `benchmarks.launches` records is compiled, and the machine code read. Instructions are static
counts of the whole kernel, start-up and rare branches included, over the elements of one thread (of
one iteration, in a loop): an upper bound. Bytes are those of the samples or parameters that a
kernel reads and writes. A kernel lies on the memory side of the ridge if its bytes take longer at
the H200's copy bandwidth than its instructions at its issue rate.

Results go to codegen.json in DIR, by default $OUT or benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.launches import Launch, cases
from fastcm.kernels import launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
RESOURCES = {"sm_80": (8, 163 << 10), "sm_90": (9, 227 << 10), "sm_100": (10, 227 << 10)}
"""Major compute capability, and bytes of shared memory that one program may have."""

ISSUE_RATE = 3.0e13
"""H200: 132 SMs x 128 lanes x 1.76 GHz, instructions of one lane per second."""

BANDWIDTH = 4.2e12
"""H200: bytes per second that a large copy reaches."""


def compile_launch(item: Launch, target: GPUTarget) -> Any:
    source = ASTSource(item.kernel, item.signature, item.constants, item.attributes)
    options = {"num_warps": item.num_warps}
    if item.num_stages is not None:
        options["num_stages"] = item.num_stages
    return triton.compile(source, target=target, options=options)


def dump(binary: bytes, *flags: str) -> str:
    """What the cuobjdump of the triton wheel says of a cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tool), *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_cuda(compiled: Any) -> dict[str, Any]:
    code = dump(compiled.asm["cubin"], "-sass")
    usage = dump(compiled.asm["cubin"], "--dump-resource-usage")
    opcode = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+ )?([A-Z][A-Z0-9_.]*)"
    counts = Counter(re.findall(opcode, code, re.MULTILINE))
    resource = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    access: Counter[int] = Counter()
    for op, count in counts.items():
        if op.startswith(("LDG", "STG")):
            width = re.search(r"\.(128|64|U16|S16|U8|S8|16|8)\b", op)
            access[int(width[1].lstrip("US")) if width else 32] += count
    return {
        "registers": resource["REG"],
        "stack": resource["STACK"] + resource.get("LOCAL", 0),
        "spills": sum(n for op, n in counts.items() if op.startswith(("LDL", "STL"))),
        "shared": compiled.metadata.shared,
        "access": access,
        "instructions": sum(n for op, n in counts.items() if op != "NOP"),
    }


def read_hip(compiled: Any) -> dict[str, Any]:
    code = compiled.asm["amdgcn"]
    number = {key: int(n) for key, n in re.findall(r"\.(\w+):\s+(\d+)$", code, re.MULTILINE)}
    opcode = r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)"
    counts = Counter(re.findall(opcode, code, re.MULTILINE))
    bits = {"dwordx4": 128, "dwordx2": 64, "dword": 32, "short": 16, "ushort": 16, "ubyte": 8}
    access: Counter[int] = Counter()
    for op, count in counts.items():
        if op.startswith(("global_", "buffer_")):
            suffix = re.search(r"_(dwordx4|dwordx2|dword|ushort|short|ubyte)", op)
            if suffix:
                access[bits[suffix[1]]] += count
    return {
        "registers": number["vgpr_count"],
        "stack": number["private_segment_fixed_size"],
        "spills": number["vgpr_spill_count"] + number["sgpr_spill_count"],
        "shared": compiled.metadata.shared,
        "access": access,
        "instructions": sum(counts.values()),
    }


def ridge(bytes_per_element: float, instructions_per_element: float) -> str:
    """What an H200 waits for: the memory, or the issue of instructions."""
    moving, issuing = bytes_per_element / BANDWIDTH, instructions_per_element / ISSUE_RATE
    return "memory" if moving > issuing else "issue"


def measure(task: tuple[str, str]) -> list[dict[str, Any]]:
    """Compile one specialisation for one target and describe each of its kernels."""
    case, arch = task
    target = TARGETS[arch]
    machine = launch.Target(target.warp_size, fast=target.backend == "cuda")
    with (
        patch.object(launch, "target", lambda x: machine),
        patch.object(launch, "resources", lambda device: RESOURCES.get(arch, (0, 64 << 10))),
    ):
        launches = cases()[case]
    rows = []
    for item in launches:
        compiled = compile_launch(item, target)
        if arch == "sm_90":
            compile_launch(item.in_compiled_code(), target)  # raises where it cannot be
        code = (read_cuda if target.backend == "cuda" else read_hip)(compiled)
        constants = item.constants
        if "BLOCK" in constants:
            block = constants["BLOCK"] + constants.get("TAIL", 0)
        else:  # attention
            block = constants["BLOCK_M"] * constants["D"]
        elements = block / (item.num_warps * target.warp_size)
        noised = constants.get("X_NOISED", "key_ptr" in item.signature)
        normals = noised + (constants.get("Y_NOISED", 0) and not constants["SAME_NOISE"])
        per_element = code["instructions"] / elements
        moved = sum(item.widths)
        access = code.pop("access")
        # the floats of one thread in vectors, of 16 bytes where it owns as many
        pieces: Counter[int] = Counter()
        for width in item.widths:
            if width > 1:
                bits = min(128, 8 * width * constants.get("VECTOR", 1))
                pieces[bits] += 8 * width * elements / bits
        full = all(access[bits] >= count for bits, count in pieces.items())
        # single 16-bit floats are the masked end of a tensor: each operand once
        full &= access[16] <= elements * item.widths.count(2)
        rows.append(
            {
                "kernel": item.kernel.__name__,
                "case": case,
                "target": arch,
                **code,
                "access": {str(bits): access[bits] for bits in sorted(access)},
                "vector_bits": min(pieces) if full and pieces else max(access, default=0),
                "full_width": full,
                "instructions_per_element": round(per_element, 1),
                "instructions_per_normal": round(per_element / normals, 1) if normals else None,
                "bytes_per_element": moved,
                "ridge": ridge(moved, per_element) if moved and target.backend == "cuda" else None,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    heads = {
        "kernel": "kernel", "case": "case", "target": "target", "registers": "regs",
        "stack": "stack", "spills": "spills", "shared": "shared", "vector_bits": "bits",
        "instructions_per_element": "inst/elem", "instructions_per_normal": "inst/normal",
        "bytes_per_element": "bytes/elem", "ridge": "ridge",
    }  # fmt: skip
    cells = [list(heads.values())]
    cells += [["" if row[key] is None else str(row[key]) for key in heads] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel and read the machine code.")
    default = os.environ.get("OUT") or Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=Path(default), help="folder of codegen.json")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("unset TRITON_INTERPRET: interpreted kernels do not compile")
    tasks = [(case, arch) for arch in args.targets for case in cases()]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        rows = [row for part in pool.map(measure, tasks) for row in part]
    rows.sort(key=lambda row: (row["kernel"], row["case"], row["target"]))
    print(table(rows))
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"triton": triton.__version__, "rows": rows}
    (args.out / "codegen.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
