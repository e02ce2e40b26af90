"""The operators against plain PyTorch: ``python -m pytest benchmarks/test_ops.py``.

Columns: `eager`, as a good engineer writes it; `compiled`, the same under torch.compile; `fastcm`,
the operator as it is called, native code on a CPU; there also `in compiled code`, the operator
under torch.compile, its plain reference but for noise. Rows go to results/ops_{cpu,gpu}.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcm
from benchmarks.harness import Case, Report, measure, near_zero
from fastcm import losses, ops, rng
from fastcm.ops import Denoised, Noised, reference
from fastcm.ops.loss import consistency_loss_and_gradient

SHAPES = {
    "cifar": (512, 3, 32, 32),
    "latents": (64, 4, 64, 64),
    "video": (4, 16, 21, 60, 104),
}
if torch.cuda.is_available():
    SHAPES["beyond L2"] = (16384, 3, 32, 32)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KEY = fastcm.NoiseKey(1, 2, device=DEVICE)
F32, F64 = torch.float32, torch.float64
SIZE = {torch.float32: 4, torch.bfloat16: 2, torch.uint8: 1}

Build = Callable[[tuple[int, ...], torch.dtype], Case]


def column(c: Tensor, x: Tensor) -> Tensor:
    return c.view(-1, *[1] * (x.dim() - 1))


def coefficients(B: int, count: int) -> list[Tensor]:
    return [torch.rand(B, device=DEVICE) * 0.8 + 0.1 for _ in range(count)]


def samples(shape: tuple[int, ...], dtype: torch.dtype, count: int) -> list[Tensor]:
    return [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(count)]


def case(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    plain: Callable[..., Any],
    ours: Callable[..., Any],
    arguments: tuple[Any, ...],
    exact: Any,
    moved: int,
    *,
    noise: Tensor | None = None,
    stream: int = rng.NOISE,
) -> Case:
    """`plain(*arguments, z)` draws its own noise for the clock, and is checked on ours."""
    compiled = torch.compile(plain, dynamic=False)
    extra = () if noise is None else (None,)
    given = () if noise is None else (noise,)
    columns = {
        "eager": lambda: plain(*arguments, *extra),
        "compiled": lambda: compiled(*arguments, *extra),
        "fastcm": lambda: ours(*arguments),
    }
    check = {
        "eager": lambda: plain(*arguments, *given),
        "compiled": lambda: compiled(*arguments, *given),
        "fastcm": lambda: ours(*arguments),
    }
    if DEVICE.type == "cpu":
        fast = torch.compile(ours, dynamic=False)
        columns["in compiled code"] = check["in compiled code"] = lambda: fast(*arguments)
    outputs = exact if isinstance(exact, tuple) else (exact,)
    slack: tuple[Tensor | float, ...] = (0.0,) * len(outputs)
    if noise is not None and DEVICE.type == "cuda":
        slack = (near_zero(shape, KEY, stream),) * len(outputs)
    return Case(name, shape, dtype, columns, check, outputs, moved * math.prod(shape), slack)


def noise_pair(shape: tuple[int, ...], dtype: torch.dtype, source: Any = None) -> Case:
    """Two noisy versions of one batch, as consistency training needs them."""
    (x0,) = samples(shape, dtype, 1)
    if source == torch.uint8:
        x0 = torch.randint(256, shape, dtype=torch.uint8, device=DEVICE)
    a = torch.stack(coefficients(shape[0], 2))
    s = torch.stack(coefficients(shape[0], 2))

    def plain(x0: Tensor, a: Tensor, s: Tensor, z: Tensor | None) -> tuple[Tensor, ...]:
        x = x0.float() / 127.5 - 1 if x0.dtype == torch.uint8 else x0.float()
        z = torch.randn_like(x) if z is None else z
        return tuple((column(a[i], x) * x + column(s[i], x) * z).to(dtype) for i in (0, 1))

    def ours(x0: Tensor, a: Tensor, s: Tensor) -> Any:
        return ops.noising(x0, a, s, KEY, out_dtype=dtype)

    exact = reference.noising(x0, a, s, KEY, stream=rng.NOISE, out_dtype=F64)
    z = reference.noise(shape, KEY, stream=rng.NOISE)
    moved = SIZE[x0.dtype] + 2 * SIZE[dtype]
    name = "noising from uint8" if source else "noise pair"
    return case(name, shape, dtype, plain, ours, (x0, a, s), exact, moved, noise=z)


def noising_uint8(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    """The same from uint8 pixels."""
    return noise_pair(shape, dtype, source=torch.uint8)


def euler_guidance(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    """The teacher's guided Euler step from one batched output, and the next network input."""
    (x,) = samples(shape, F32, 1)
    v, u = torch.cat(samples(shape, dtype, 2)).chunk(2)
    dt, w, c_in = coefficients(shape[0], 3)

    def plain(x: Tensor, v: Tensor, u: Tensor, dt: Tensor, w: Tensor, c: Tensor) -> Any:
        v, u = v.float(), u.float()
        x_s = x - column(dt, x) * (u + column(w, x) * (v - u))
        return x_s, (column(c, x) * x_s).to(dtype)

    def ours(x: Tensor, v: Tensor, u: Tensor, dt: Tensor, w: Tensor, c: Tensor) -> Any:
        return ops.euler_step(x, v, dt, v_uncond=u, guidance=w, input_scale=c, input_dtype=dtype)

    x_s = reference.euler_step(x.double(), v.double(), dt, v_uncond=u.double(), guidance=w)
    exact = x_s, column(c_in, x_s).double() * x_s
    moved = 4 + 2 * SIZE[dtype] + 4 + SIZE[dtype]
    return case("Euler + guidance", shape, dtype, plain, ours, (x, v, u, dt, w, c_in), exact, moved)


def boundary(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    """a x + b F."""
    (x,), (F,) = samples(shape, F32, 1), samples(shape, dtype, 1)
    a, b = coefficients(shape[0], 2)

    def plain(x: Tensor, F: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return column(a, x) * x + column(b, x) * F.float()

    exact = reference.boundary(x.double(), F.double(), a, b)
    moved = 4 + SIZE[dtype] + 4
    return case("boundary", shape, dtype, plain, ops.boundary, (x, F, a, b), exact, moved)


def loss_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    """Both boundary maps, pseudo-Huber, weight: the loss and its gradient to F.

    Plain PyTorch reads x_t and x_s that the noising stored in float32. So does fastcm on a CPU, as
    its objectives do; on a GPU it regenerates them.
    """
    (x0,) = samples(shape, dtype, 1)
    F, F_s = samples(shape, dtype, 2)
    at, st, as_, ss, a, b, c, d, w = coefficients(shape[0], 9)
    x_t, x_s = reference.noising(
        x0, torch.stack([at, as_]), torch.stack([st, ss]), KEY, stream=rng.NOISE, out_dtype=F32
    )
    huber = losses.PseudoHuber().scale(math.prod(shape[1:]))

    def plain(F: Tensor, F_s: Tensor, x_t: Tensor, x_s: Tensor) -> tuple[Tensor, Tensor]:
        F = F.detach().requires_grad_()
        f = column(a, x_t) * x_t + column(b, x_t) * F.float()
        with torch.no_grad():
            y = column(c, x_s) * x_s + column(d, x_s) * F_s.float()
        squared = (f - y).square().flatten(1).sum(1)
        loss = (w * ((squared + huber**2).sqrt() - huber)).mean()
        return loss.detach(), torch.autograd.grad(loss, F)[0]

    def ours(F: Tensor, F_s: Tensor, x_t: Tensor, x_s: Tensor) -> tuple[Tensor, Tensor]:
        F = F.detach().requires_grad_()
        source: Any = x_t
        s_source: Any = x_s
        if DEVICE.type == "cuda":
            source, s_source = Noised(x0, at, st, KEY), Noised(x0, as_, ss, KEY)
        target = Denoised(s_source, F_s, c, d)
        loss, _, gradient = consistency_loss_and_gradient(F, source, a, b, target, weight=w)
        if gradient is None:
            (gradient,) = torch.autograd.grad(loss, F)
        return loss.detach(), gradient

    leaf = F.double().requires_grad_()
    mean, _ = reference.consistency_loss(
        leaf,
        Noised(x0.double(), at, st, KEY),
        a,
        b,
        Denoised(Noised(x0.double(), as_, ss, KEY), F_s.double(), c, d),
        metric=losses.PseudoHuber(),
        weight=w,
    )
    exact = mean.detach(), torch.autograd.grad(mean, leaf)[0]
    # F twice, the gradient, and x0, or x_t and x_s where they are stored
    moved = 3 * SIZE[dtype] + (8 if DEVICE.type == "cpu" else SIZE[dtype])
    return case("loss + gradient", shape, dtype, plain, ours, (F, F_s, x_t, x_s), exact, moved)


def sampler_update(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    """Denoise and add fresh noise."""
    (x,), (F,) = samples(shape, F32, 1), samples(shape, dtype, 1)
    a, b, al, si = coefficients(shape[0], 4)

    def plain(
        x: Tensor, F: Tensor, a: Tensor, b: Tensor, al: Tensor, si: Tensor, z: Tensor | None
    ) -> Tensor:
        f = column(a, x) * x + column(b, x) * F.float()
        z = torch.randn_like(f) if z is None else z
        return column(al, x) * f + column(si, x) * z

    def ours(x: Tensor, F: Tensor, a: Tensor, b: Tensor, al: Tensor, si: Tensor) -> Tensor:
        return ops.sampler_update(x, F, a, b, al, si, KEY, stream=rng.SAMPLE)

    exact = reference.sampler_update(x.double(), F.double(), a, b, al, si, KEY, stream=rng.SAMPLE)
    z = reference.noise(shape, KEY, stream=rng.SAMPLE)
    moved = 4 + SIZE[dtype] + 4
    arguments = (x, F, a, b, al, si)
    return case(
        "sampler update",
        shape,
        dtype,
        plain,
        ours,
        arguments,
        exact,
        moved,
        noise=z,
        stream=rng.SAMPLE,
    )


BUILDS: tuple[Build, ...] = (
    noise_pair,
    noising_uint8,
    euler_guidance,
    boundary,
    loss_gradient,
    sampler_update,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("build", BUILDS, ids=lambda b: b.__name__)
def test_op(build: Build, shape: str, dtype: torch.dtype, report: Report, benchmark: Any) -> None:
    if DEVICE.type == "cpu" and shape == "video" and dtype == torch.bfloat16:
        pytest.skip("compiling every shape for the CPU takes long; video stays in float32")
    torch.manual_seed(0)
    torch._dynamo.reset()
    built = build(SHAPES[shape], dtype)
    row = measure(built)
    benchmark.extra_info.update({k: v for k, v in row.items() if k.endswith("/fastcm")})
    benchmark.pedantic(built.columns["fastcm"], rounds=3, warmup_rounds=1)
    row["shape_name"] = shape
    report.add(row)
    ratios = "  ".join(f"{k} {v:.2f}" for k, v in row.items() if k.endswith("/fastcm"))
    print(f"\n{built.id}: {row['ms']['fastcm']:.3f} ms  {ratios}")


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the bandwidth of a GPU's memory")
def test_copy(report: Report) -> None:
    """The floor of all others: 2 GiB read and written, far beyond any cache."""
    source = torch.empty(2**31, dtype=torch.uint8, device=DEVICE)
    sink, edges = torch.empty_like(source), [torch.cuda.Event(enable_timing=True) for _ in "ab"]
    times = []
    for _ in range(12):
        edges[0].record()
        sink.copy_(source)
        edges[1].record()
        edges[1].synchronize()
        times.append(edges[0].elapsed_time(edges[1]) / 1e3)
    seconds = sorted(times)[len(times) // 2]
    report.add({"case": "copy", "bytes": 2**32, "ms": {"copy": 1e3 * seconds}})
    print(f"\ncopy: {2**32 / seconds / 1e12:.2f} TB/s")
