"""What the kernels compile to, without a GPU: ``python -m benchmarks.codegen [--out DIR]``.

The launchers run on meta tensors with a recorder in place of each kernel, so what is compiled is
what real arguments produce: dtypes, 16-byte alignment and divisible sizes, launch configuration.
Then the machine code is read. Instructions are static counts of the whole kernel, start-up
included, over the elements of one thread (of one iteration, in a loop): an upper bound. Bytes are
those of the samples a kernel reads and writes. A kernel lies on the memory side of the ridge if
its bytes take longer at the H200's copy bandwidth than its instructions at its issue rate.

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
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastcm.kernels import affine, consistency_loss, launch, noising
from fastcm.kernels.noising import State

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ISSUE_RATE = 3.0e13
"""H200: 132 SMs x 128 lanes x 1.76 GHz, instructions of one lane per second."""

BANDWIDTH = 4.2e12
"""H200: bytes per second that a large copy reaches."""

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}
U8, BF16, FP16, FP32 = torch.uint8, torch.bfloat16, torch.float16, torch.float32
B = 512


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch, ready to compile."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], list[list[object]]]
    num_warps: int
    widths: tuple[int, ...]
    """Bytes of each element of the sample tensors, those read before those written."""


@dataclass
class Recorder:
    """Stands in for a kernel: keeps the launches that it is asked for."""

    kernel: Any
    launches: list[Launch] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.record

    def record(self, *args: Any, num_warps: int, **constants: Any) -> None:
        signature: dict[str, str] = {}
        attributes: dict[tuple[int, ...], list[list[object]]] = {}
        constants = dict(constants)
        samples: dict[int, Tensor] = {}
        for index, (param, value) in enumerate(zip(self.kernel.params, args)):
            if isinstance(value, Tensor):
                signature[param.name] = POINTERS[value.dtype]
                aligned = (value.data_ptr() or 16 * value.storage_offset()) % 16 == 0
                if value.dim() > 1 and value.shape[0] == B:
                    samples[id(value)] = value
            elif isinstance(value, float):
                signature[param.name], aligned = "fp32", False
            elif value == 1 and not param.do_not_specialize:
                constants[param.name], aligned = 1, False
                signature[param.name] = "constexpr"
            else:
                signature[param.name] = "i32"
                aligned = value % 16 == 0 and not param.do_not_specialize
            if aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        for param in self.kernel.params[len(args) :]:
            signature[param.name] = "constexpr"
        widths = tuple(sorted(t.element_size() for t in samples.values()))
        self.launches.append(
            Launch(self.kernel, signature, constants, attributes, num_warps, widths)
        )


def samples(dtype: torch.dtype, D: int, offset: int = 0) -> Tensor:
    return torch.empty(B * D + offset, dtype=dtype, device="meta")[offset:].view(B, D)


def per_sample(*shape: int) -> Tensor:
    return torch.empty(*shape, B, device="meta")


def state(dtype: torch.dtype, D: int) -> State:
    key = torch.empty(3, dtype=torch.int64, device="meta")
    return State(samples(dtype, D), per_sample(), per_sample(), key)


def name(dtype: torch.dtype) -> str:
    return POINTERS[dtype][1:]


def noising_case(*dtypes: torch.dtype, D: int = 3072, offset: int = 0) -> list[Launch]:
    x0, *outs = (samples(dtype, D, offset) for dtype in dtypes)
    recorder = Recorder(noising.noising_kernel)
    key = torch.empty(3, dtype=torch.int64, device="meta")
    noising.launch_noising(x0, per_sample(len(outs), 2), key, *outs, stream=0, kernel=recorder)
    return recorder.launches


def boundary_case(x: Tensor | State, F: torch.dtype, out: torch.dtype) -> list[Launch]:
    recorder = Recorder(affine.boundary_kernel)
    affine.launch_boundary(
        x, samples(F, 3072), per_sample(), per_sample(), samples(out, 3072), kernel=recorder
    )
    return recorder.launches


def scale_case(g: torch.dtype, out: torch.dtype, out2: torch.dtype | None) -> list[Launch]:
    recorder = Recorder(affine.scale_kernel)
    second = () if out2 is None else (per_sample(), samples(out2, 3072))
    affine.launch_scale(
        samples(g, 3072), per_sample(), samples(out, 3072), *second, kernel=recorder
    )
    return recorder.launches


def euler_case(x: Tensor | State, v: torch.dtype, scaled: torch.dtype | None) -> list[Launch]:
    recorder = Recorder(affine.euler_kernel)
    extra: dict[str, Any] = {}
    if scaled is not None:
        extra = {"v_uncond": samples(v, 3072), "scaled_out": samples(scaled, 3072)}
        extra |= {name: per_sample() for name in ("guidance", "scale", "out_scale")}
    affine.launch_euler(
        x, samples(v, 3072), per_sample(), samples(FP32, 3072), **extra, kernel=recorder
    )
    return recorder.launches


def sampler_case(x: torch.dtype, F: torch.dtype) -> list[Launch]:
    recorder = Recorder(affine.sampler_update_kernel)
    a, b, alpha, sigma = (per_sample() for _ in range(4))
    key = torch.empty(3, dtype=torch.int64, device="meta")
    out = samples(x, 3072)
    affine.launch_sampler_update(
        samples(x, 3072), samples(F, 3072), a, b, alpha, sigma, key, out,
        stream=16, kernel=recorder,
    )  # fmt: skip
    return recorder.launches


def loss_case(
    x: Tensor | State, y: Tensor | State, F: torch.dtype, D: int, metric: int, mapped: bool = True
) -> list[Launch]:
    names = ("loss_kernel", "loss_partial_kernel", "loss_finish_kernel")
    one, partial, finish = (Recorder(getattr(consistency_loss, kernel)) for kernel in names)
    size = consistency_loss.loss_scratch_size(B, D)
    target_F = samples(F, D) if mapped else None
    target_a, target_b = (per_sample() if mapped else None for _ in range(2))
    consistency_loss.launch_consistency_loss(
        samples(F, D), x, per_sample(), per_sample(), y, target_F, target_a, target_b,
        per_sample(), per_sample(), samples(F, D), metric=metric,
        scratch=torch.empty(size, device="meta") if size else None,
        kernel=one, partial_kernel=partial, finish_kernel=finish,
    )  # fmt: skip
    return one.launches + partial.launches + finish.launches


def same(x: State) -> State:
    """Another time of the same sample: the same x0 and noise."""
    return State(x.x, per_sample(), per_sample(), x.key)


def cases() -> dict[str, list[Launch]]:
    """Each specialisation by name, with the launches that it takes."""
    rows: dict[str, list[Launch]] = {}
    for dtypes in (
        (FP32, FP32), (FP32, FP32, FP32), (FP32, BF16, FP32), (BF16, BF16, BF16), (FP16, FP16),
        (U8, FP32), (U8, BF16, BF16), (U8, FP32, BF16),
    ):  # fmt: skip
        rows[f"{name(dtypes[0])} -> {' '.join(map(name, dtypes[1:]))}"] = noising_case(*dtypes)
    rows["fp32 -> fp32, D odd"] = noising_case(FP32, FP32, D=3073)
    rows["fp32 -> fp32, misaligned"] = noising_case(FP32, FP32, offset=1)
    rows["x fp32, F fp32 -> fp32"] = boundary_case(samples(FP32, 3072), FP32, FP32)
    rows["x fp32, F bf16 -> fp32"] = boundary_case(samples(FP32, 3072), BF16, FP32)
    rows["x from u8, F bf16 -> bf16"] = boundary_case(state(U8, 3072), BF16, BF16)
    rows["g fp32 -> bf16"] = scale_case(FP32, BF16, None)
    rows["g fp32 -> fp32 fp32"] = scale_case(FP32, FP32, FP32)
    rows["x fp32, v fp32"] = euler_case(samples(FP32, 3072), FP32, None)
    rows["x from fp32, v bf16, guided -> fp32 bf16"] = euler_case(state(FP32, 3072), BF16, BF16)
    rows["x fp32, F fp32, z"] = sampler_case(FP32, FP32)
    rows["x fp32, F bf16, z"] = sampler_case(FP32, BF16)
    huber, squared = consistency_loss.PSEUDO_HUBER, consistency_loss.SQUARED_L2
    for D in (3072, 16384, 65536):
        x = state(FP32, D)
        rows[f"one noise, F fp32, D {D}"] = loss_case(x, same(x), FP32, D, huber)
    x = state(BF16, 3072)
    rows["one noise, F bf16, D 3072"] = loss_case(x, same(x), BF16, 3072, huber)
    x = state(FP32, 16384)
    rows["two noises, F fp32, D 16384"] = loss_case(x, state(FP32, 16384), FP32, 16384, huber)
    x = state(U8, 3072)
    rows["velocity, F bf16, D 3072"] = loss_case(x, same(x), BF16, 3072, squared, mapped=False)
    rows["x from fp32, target fp32 F fp32, D 3072"] = loss_case(
        state(FP32, 3072), samples(FP32, 3072), FP32, 3072, consistency_loss.L2
    )
    rows["x fp32, target fp32, L1, D 16384"] = loss_case(
        samples(FP32, 16384), samples(FP32, 16384), FP32, 16384, consistency_loss.L1, mapped=False
    )
    return rows


def compile_launch(item: Launch, target: GPUTarget) -> Any:
    source = ASTSource(item.kernel, item.signature, item.constants, item.attributes)
    return triton.compile(source, target=target, options={"num_warps": item.num_warps})


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
    with patch.object(launch, "target", lambda x: machine):
        launches = cases()[case]
    rows = []
    for item in launches:
        compiled = compile_launch(item, target)
        code = (read_cuda if target.backend == "cuda" else read_hip)(compiled)
        constants = item.constants
        block = constants["BLOCK"] + constants.get("TAIL", 0)
        elements = block / (item.num_warps * target.warp_size)
        noised = constants.get("X_NOISED", "key_ptr" in item.signature)
        normals = noised + (constants.get("Y_NOISED", 0) and not constants["SAME_NOISE"])
        per_element = code["instructions"] / elements
        moved = sum(item.widths)
        access = code.pop("access")
        # the floats of one thread, in 16-byte pieces
        pieces = sum(width for width in item.widths if width > 1) * elements / 16
        rows.append(
            {
                "kernel": item.kernel.__name__,
                "case": case,
                "target": arch,
                **code,
                "access": {str(bits): access[bits] for bits in sorted(access)},
                "vector_bits": 128 if access[128] == pieces else max(access, default=0),
                "full_width": access[128] >= pieces,
                "instructions_per_element": round(per_element, 1),
                "instructions_per_normal": round(per_element / normals, 1) if normals else None,
                "bytes_per_element": moved,
                "ridge": ridge(moved, per_element) if target.backend == "cuda" else None,
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
