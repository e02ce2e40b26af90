"""The launches that `benchmarks.codegen` compiles, recorded from the launchers on meta tensors.

What is compiled is what real arguments produce: dtypes, 16-byte alignment and divisible sizes,
launch configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastcm.kernels import (
    adam_ema,
    affine,
    attention_jvp,
    consistency_loss,
    grad_norm,
    launch,
    noising,
    tick,
)
from fastcm.kernels.noising import State
from fastcm.kernels.tables import Segment

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
U8, BF16, FP16, FP32 = torch.uint8, torch.bfloat16, torch.float16, torch.float32
FP64, I32, I64 = torch.float64, torch.int32, torch.int64
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
    """Bytes of each element that is read or written: of the sample tensors, or as told."""
    num_stages: int | None = None

    def in_compiled_code(self) -> Launch:
        """The same with the types that torch.compile gives to numbers: float64 and int64."""
        wider = {"fp32": "fp64", "i32": "i64"}
        signature = {name: wider.get(kind, kind) for name, kind in self.signature.items()}
        return replace(self, signature=signature)


@dataclass
class Recorder:
    """Stands in for a kernel: keeps the launches that it is asked for."""

    kernel: Any
    widths: tuple[int, ...] | None = None
    """Bytes of each access per element, of kernels that find their operands through a table."""
    launches: list[Launch] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.record

    def record(
        self, *args: Any, num_warps: int, num_stages: int | None = None, **constants: Any
    ) -> None:
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
        widths = self.widths
        if widths is None:
            widths = tuple(sorted(t.element_size() for t in samples.values()))
        self.launches.append(
            Launch(self.kernel, signature, constants, attributes, num_warps, widths, num_stages)
        )


def samples(dtype: torch.dtype, D: int, offset: int = 0) -> Tensor:
    return torch.empty(B * D + offset, dtype=dtype, device="meta")[offset:].view(B, D)


def per_sample(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(*shape, B, dtype=dtype, device="meta")


def state(dtype: torch.dtype, D: int) -> State:
    key = torch.empty(3, dtype=torch.int64, device="meta")
    return State(samples(dtype, D), per_sample(), per_sample(), key)


def name(dtype: torch.dtype) -> str:
    return POINTERS[dtype][1:]


def noising_case(*dtypes: torch.dtype, D: int = 3072, offset: int = 0) -> list[Launch]:
    x0, *outs = (samples(dtype, D, offset) for dtype in dtypes)
    recorder = Recorder(noising.noising_kernel)
    key = torch.empty(3, dtype=torch.int64, device="meta")
    noising.launch_noising(
        x0,
        list(zip(*(per_sample(len(outs)) for _ in range(2)))),
        key,
        *outs,
        stream=0,
        kernel=recorder,
    )
    return recorder.launches


def noise_case(dtype: torch.dtype) -> list[Launch]:
    recorder = Recorder(noising.noising_kernel)
    key = torch.empty(3, dtype=torch.int64, device="meta")
    noising.launch_noise(samples(dtype, 3072), key, stream=0, kernel=recorder)
    return recorder.launches


def uniform_case() -> list[Launch]:
    recorder = Recorder(noising.uniform_kernel, ())
    key, out = (torch.empty(n, dtype=t, device="meta") for n, t in ((3, I64), (B, FP64)))
    noising.launch_uniform(out, key, stream=1, kernel=recorder)
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


def sampler_case(
    x: torch.dtype, F: torch.dtype, guided: bool = False, scaled: torch.dtype | None = None
) -> list[Launch]:
    recorder = Recorder(affine.sampler_update_kernel)
    a, b, alpha, sigma, guidance = (per_sample(dtype=FP64 if guided else FP32) for _ in range(5))
    key = torch.empty(3, dtype=torch.int64, device="meta")
    out = samples(x, 3072)
    extra = {"F_uncond": samples(F, 3072), "guidance": guidance} if guided else {}
    if scaled is not None:
        extra |= {"scaled_out": samples(scaled, 3072), "out_scale": a}
    affine.launch_sampler_update(
        samples(x, 3072), samples(F, 3072), a, b, alpha, sigma, key, out,
        stream=16, **extra, kernel=recorder,
    )  # fmt: skip
    return recorder.launches


def loss_case(
    x: Tensor | State,
    y: Tensor | State,
    F: torch.dtype,
    D: int,
    metric: int,
    mapped: bool = True,
    few: int = B,
) -> list[Launch]:
    """With the configuration of a batch of `few` samples."""
    names = ("loss_kernel", "loss_partial_kernel", "loss_finish_kernel")
    one, partial, finish = (Recorder(getattr(consistency_loss, kernel)) for kernel in names)
    size, config = consistency_loss.loss_scratch_size(few, D), None
    if size:
        config = launch.chunked(few, D, F.itemsize, launch.target(samples(F, D)).warp_size)
        size = B * launch.chunks(D, config)
    target_F = samples(F, D) if mapped else None
    target_a, target_b = (per_sample() if mapped else None for _ in range(2))
    consistency_loss.launch_consistency_loss(
        samples(F, D), x, per_sample(), per_sample(), y, target_F, target_a, target_b,
        per_sample(), per_sample(), samples(F, D), metric=metric,
        scratch=torch.empty(size, device="meta") if size else None, config=config,
        kernel=one, partial_kernel=partial, finish_kernel=finish,
    )  # fmt: skip
    return one.launches + partial.launches + finish.launches


def meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def tables_of(
    parameter: torch.dtype, gradient: torch.dtype, aligned: bool
) -> tuple[Tensor, Tensor, Segment]:
    """Tables of 100 tensors in 5000 chunks."""
    segment = Segment(0, 5000, parameter, gradient, aligned)
    return meta(5, 100, dtype=I64), meta(2, 5000, dtype=I32), segment


def norm_case(gradient: torch.dtype, aligned: bool = True) -> list[Launch]:
    recorder = Recorder(grad_norm.grad_norm_kernel, (gradient.itemsize,))
    tensors, chunks, segment = tables_of(FP32, gradient, aligned)
    partial = meta(5000, dtype=FP64)
    grad_norm.launch_grad_norm(tensors, chunks, [segment], partial, kernel=recorder)
    return recorder.launches


def finish_case() -> list[Launch]:
    recorder = Recorder(grad_norm.grad_norm_finish_kernel, (FP64.itemsize,))
    partial, bounds, sums = meta(5000, dtype=FP64), meta(3, dtype=I64), meta(2, dtype=FP64)
    grad_norm.launch_grad_norm_finish(partial, bounds, sums, kernel=recorder)
    return recorder.launches


def tick_case(radam: bool, clipped: bool) -> list[Launch]:
    recorder = Recorder(tick.tick_kernel, ())
    hyper, limit, sums = meta(2, 6, dtype=FP64), meta(1, dtype=FP64), meta(2, dtype=FP64)
    tick.launch_tick(
        meta(5, 100, dtype=I64), hyper, limit, sums if clipped else None, meta(100),
        meta(100, 8), meta(3), meta(1), meta(3, dtype=I64),
        meta(1, 4, dtype=FP64) if clipped else None, radam=radam, kernel=recorder,
    )  # fmt: skip
    return recorder.launches


def sweep_case(
    parameter: torch.dtype = FP32,
    gradient: torch.dtype = FP32,
    averages: int = 1,
    mask: int = 0,
    shadow: torch.dtype | None = None,
    aligned: bool = True,
) -> list[Launch]:
    acc = FP64 if parameter == FP64 else FP32
    master = parameter in (BF16, FP16)
    shadows = 0 if shadow is None else 1 + mask.bit_count()
    # the parameter, both moments, averages and master come and go
    state = (parameter.itemsize, *[acc.itemsize] * (2 + averages + master))
    written = () if shadow is None else (shadow.itemsize,) * shadows
    recorder = Recorder(adam_ema.sweep_kernel, (gradient.itemsize, *state, *state, *written))
    adam_ema.launch_sweep(
        *tables_of(parameter, gradient, aligned), meta(2, 6400, dtype=acc),
        meta(averages, dtype=I64), meta(100, 8, dtype=acc), meta(2 + averages, dtype=acc),
        masters=meta(6400, dtype=acc) if master else None,
        shadows=None if shadow is None else meta(shadows, dtype=I64), shadow_dtype=shadow,
        mask=mask, kernel=recorder,
    )  # fmt: skip
    return recorder.launches


def attention_case(
    dtype: torch.dtype, D: int, tangents: str = "qkv", causal: bool = False, M: int = 1024
) -> list[Launch]:
    """Heads inside of tokens; M keys for 1024 rows."""
    recorder = Recorder(attention_jvp.attention_jvp_kernel, ())
    q, k, v, o, to = (
        meta(2, n, 4, D, dtype=dtype).transpose(1, 2) for n in (1024, M, M, 1024, 1024)
    )
    given = (torch.empty_like(x) if n in tangents else None for n, x in zip("qkv", (q, k, v)))
    attention_jvp.launch_attention_jvp(
        q, k, v, *given, o, to, meta(2, 4, 1024), causal=causal, scale=0.1, kernel=recorder
    )
    return recorder.launches


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
    for dtype in (FP32, BF16):
        rows[f"normals {name(dtype)}"] = noise_case(dtype)
    rows["uniform"] = uniform_case()
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
    rows["x fp32, F bf16, guided by fp64, z"] = sampler_case(FP32, BF16, guided=True)
    rows["x fp32, F bf16, z -> fp32 bf16"] = sampler_case(FP32, BF16, scaled=BF16)
    huber, squared = consistency_loss.PSEUDO_HUBER, consistency_loss.SQUARED_L2
    for D in (3072, 16384, 65536):
        x = state(FP32, D)
        rows[f"one noise, F fp32, D {D}"] = loss_case(x, same(x), FP32, D, huber)
    for F, D in ((FP32, 16384), (BF16, 16384), (FP32, 65536)):
        x = state(F, D)
        rows[f"one noise, F {name(F)}, D {D}, 8 samples"] = loss_case(
            x, same(x), F, D, huber, few=8
        )
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
    return rows | optimizer_cases() | attention_cases()


def optimizer_cases() -> dict[str, list[Launch]]:
    return {
        "norm of fp32": norm_case(FP32),
        "norm of bf16": norm_case(BF16),
        "norm of fp32, misaligned": norm_case(FP32, aligned=False),
        "norm of all chunks": finish_case(),
        "adamw": tick_case(radam=False, clipped=False),
        "adamw, clipped": tick_case(radam=False, clipped=True),
        "radam, clipped": tick_case(radam=True, clipped=True),
        "p fp32, g fp32": sweep_case(averages=0),
        "p fp32, g fp32, 1 average": sweep_case(),
        "p fp32, g fp32, 3 averages, shadows bf16": sweep_case(averages=3, mask=5, shadow=BF16),
        "p fp32, g bf16, 1 average": sweep_case(gradient=BF16),
        "p bf16, g bf16, 1 average": sweep_case(BF16, BF16),
        "p fp16, g fp32, 1 average, shadow fp16": sweep_case(FP16, FP32, shadow=FP16),
        "p fp64, g fp64, 1 average": sweep_case(FP64, FP64),
        "p fp32, g fp32, 1 average, misaligned": sweep_case(aligned=False),
        "p bf16, g bf16, 1 average, misaligned": sweep_case(BF16, BF16, aligned=False),
    }


def attention_cases() -> dict[str, list[Launch]]:
    return {
        "attention bf16, D 64": attention_case(BF16, 64),
        "attention fp16, D 72, 1000 keys": attention_case(FP16, 72, M=1000),
        "attention bf16, D 96, causal": attention_case(BF16, 96, causal=True),
        "attention bf16, D 128": attention_case(BF16, 128),
        "attention bf16, D 128, tangent of q": attention_case(BF16, 128, "q", M=77),
    }
