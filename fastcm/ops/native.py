"""The operators in native code on a CPU: what `registered` is on a GPU, without a dispatcher.

Operands are valid and eager, in float32, bfloat16 or float16, data in closed form also in uint8;
results are those of `reference`. Only the loss is differentiable, and comes with its gradient.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcm.kernels import native
from fastcm.losses import PseudoHuber, SampleMetric
from fastcm.ops.operands import coefficient, layout, optional, restored, same_noise
from fastcm.ops.reference import Denoised, Noised
from fastcm.ops.registered import METRICS
from fastcm.rng import NoiseKey
from fastcm.tracing import is_profiled, part

CODES = {
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.uint8: 4,
    torch.float64: 5,
    torch.int64: 6,
}
NOTHING = (0, 0, 0)
NO_NOISE = 3 * NOTHING + (0, 0)
_CPU = torch.device("cpu")


def _call(name: str, like: Sequence[int], *arguments: float, form: str = "") -> None:
    """Call a function with its structure: B, D and the threads, then the arguments."""
    function = native.pointwise(name)
    assert function is not None
    form = form or f"{3 + len(arguments)}q"
    threads = torch.get_num_threads()
    given = struct.pack(form, like[0], math.prod(like[1:]), threads, *arguments)
    if is_profiled():
        with part(name):
            error = function(given)
    else:
        error = function(given)
    if error:
        native.refuse(name, error)


def packed(t: Tensor | None) -> tuple[int, int, int]:
    """A contiguous tensor as the structures hold it."""
    return NOTHING if t is None else (t.data_ptr(), CODES[t.dtype], t.numel())


def _state(x: Tensor | Noised) -> tuple[tuple[int, ...], object]:
    """A tensor or closed form as the structures hold it, and what must live as long as the call."""
    if isinstance(x, Tensor):
        x = x.contiguous()
        return (x.data_ptr(), CODES[x.dtype], x.numel(), *NO_NOISE), x
    held = (
        x.x0.contiguous(),
        coefficient(x.alpha),
        coefficient(x.sigma),
        x.key.tensor.contiguous(),
    )
    return (*(number for t in held for number in packed(t)), x.stream, x.first_sample), held


def _empty(like: Tensor) -> Tensor:
    """A contiguous float32 result; `like` is contiguous."""
    if like.dtype == torch.float32:
        return torch.empty_like(like)  # a third of the time of the other
    return torch.empty(like.shape, dtype=torch.float32, device=_CPU)


def noise(
    shape: Sequence[int], key: NoiseKey, *, stream: int, first_sample: int, dtype: torch.dtype
) -> Tensor:
    """Standard normals."""
    make = torch.ops.fastcm.cpu_noise if torch.compiler.is_compiling() else _noise
    out: Tensor = make(shape, key.tensor, stream, first_sample, dtype)
    return out


def _noise(
    shape: Sequence[int], key: Tensor, stream: int, first_sample: int, dtype: torch.dtype
) -> Tensor:
    key, out = key.contiguous(), torch.empty(shape, dtype=dtype, device=_CPU)
    _call("noise", shape, *packed(key), stream, first_sample, *packed(out))
    return out


def uniform(count: int, key: NoiseKey, *, stream: int, first_sample: int) -> Tensor:
    """One number of (0, 1) for each sample, float64 ``[count]``."""
    make = torch.ops.fastcm.cpu_uniform if torch.compiler.is_compiling() else _uniform
    out: Tensor = make(count, key.tensor, stream, first_sample)
    return out


def _uniform(count: int, key: Tensor, stream: int, first_sample: int) -> Tensor:
    key, out = key.contiguous(), torch.empty(count, dtype=torch.float64, device=_CPU)
    _call("uniform", (count,), *packed(key), stream, first_sample, *packed(out))
    return out


def noising(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: NoiseKey,
    *,
    stream: int,
    first_sample: int,
    out_dtype: torch.dtype,
) -> Sequence[Tensor]:
    """alpha x0 + sigma z for each of one or two rows of ``alpha, sigma [K, B]``, with one z."""
    make = torch.ops.fastcm.cpu_noising if torch.compiler.is_compiling() else _noising
    out: Sequence[Tensor] = make(x0, alpha, sigma, key.tensor, stream, first_sample, out_dtype)
    return out


def _noising(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: Tensor,
    stream: int,
    first_sample: int,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    state, _held = _state(Noised(x0, alpha, sigma, NoiseKey.wrap(key), stream, first_sample))
    out = [torch.empty(x0.shape, dtype=out_dtype, device=_CPU) for _ in alpha]
    second = out[1] if len(out) > 1 else None
    _call("noising", x0.shape, *state, *packed(out[0]), *packed(second))
    return out


def boundary(x: Tensor | Noised, F: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a x + b F."""
    back = None
    if isinstance(x, Tensor):
        (x_, F_), back = layout(x, F)
        assert x_ is not None and F_ is not None
        x, F = x_, F_
    F, a, b = F.contiguous(), coefficient(a), coefficient(b)
    (state, _held), out = _state(x), _empty(F)
    operands = (*packed(F), *packed(a), *packed(b), *packed(out))
    _call("boundary", F.shape, *state, *operands)
    return restored(out, back)


def scale(g: Tensor, c: Tensor, out_dtype: torch.dtype) -> Tensor:
    """c g."""
    (g_,), back = layout(g)
    assert g_ is not None
    c_, out = optional(c), torch.empty(g_.shape, dtype=out_dtype, device=_CPU)
    _call("scale", g_.shape, *packed(g_), *packed(c_), *packed(out))
    return restored(out, back)


def euler_step(
    x: Tensor | Noised,
    v: Tensor,
    dt: Tensor,
    *,
    v_uncond: Tensor | None,
    guidance: Tensor | None,
    scale: Tensor | None,
    input_scale: Tensor | None,
    input_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """scale x - dt (v_u + guidance (v - v_u)), and input_scale times that where a dtype asks."""
    back = None
    if isinstance(x, Tensor):
        (x_, v_, v_uncond), back = layout(x, v, v_uncond)
        assert x_ is not None and v_ is not None
        x, v = x_, v_
    v = v.contiguous()
    v_uncond = None if v_uncond is None else v_uncond.contiguous()
    rows = [optional(c) for c in (dt, guidance, scale, input_scale)]
    (state, _held), out = _state(x), _empty(v)
    second = None
    if input_dtype is not None:
        second = torch.empty(v.shape, dtype=input_dtype, device=_CPU)
    tensors = (v, rows[0], v_uncond, *rows[1:], out, second)
    _call("euler_step", v.shape, *state, *(n for t in tensors for n in packed(t)))
    return restored(out, back), None if second is None else restored(second, back)


def sampler_update(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The arguments and results of ``torch.ops.fastcm.sampler_update``."""
    compiling = torch.compiler.is_compiling()
    update = torch.ops.fastcm.cpu_sampler_update if compiling else _sampler_update
    out: tuple[Tensor, Tensor] = update(*arguments)
    return out


def _sampler_update(
    x: Tensor,
    F: Tensor,
    a: Tensor,
    b: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: Tensor,
    stream: int,
    first_sample: int,
    F_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    x, F, key = x.contiguous(), F.contiguous(), key.contiguous()
    rows = (coefficient(c) for c in (a, b, alpha, sigma))
    tensors: list[Tensor | None] = [x, F, *rows, key]
    tensors += [None if F_uncond is None else F_uncond.contiguous(), optional(guidance)]
    tensors.append(optional(input_scale))
    out = _empty(x)
    wanted = input_dtype is not None
    second = torch.empty(x.shape if wanted else 0, dtype=input_dtype or x.dtype, device=_CPU)
    operands = [n for t in tensors for n in packed(t)]
    results = *packed(out), *packed(second if wanted else None)
    _call("sampler_update", x.shape, *operands, stream, first_sample, *results)
    return out, second


def _sampler_results(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out, dtype = x.new_empty(x.shape, dtype=torch.float32), rest[12] if len(rest) > 11 else None
    return out, x.new_empty(0 if dtype is None else x.shape, dtype=dtype or torch.float32)


# What makes noise is an operator, too, which compiled code calls and does not look into.
_library = torch.library.Library("fastcm", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema, _function, _fake in (
    (
        "cpu_noise(SymInt[] shape, Tensor key, int stream, int first_sample, ScalarType dtype)"
        " -> Tensor",
        _noise,
        lambda shape, key, stream, first, dtype: key.new_empty(shape, dtype=dtype),
    ),
    (
        "cpu_uniform(SymInt count, Tensor key, int stream, int first_sample) -> Tensor",
        _uniform,
        lambda count, key, stream, first: key.new_empty(count, dtype=torch.float64),
    ),
    (
        "cpu_noising(Tensor x0, Tensor alpha, Tensor sigma, Tensor key, int stream, "
        "int first_sample, ScalarType out_dtype) -> Tensor[]",
        _noising,
        lambda x0, alpha, sigma, key, stream, first, dtype: [
            x0.new_empty(x0.shape, dtype=dtype) for _ in range(alpha.shape[0])
        ],
    ),
    (
        "cpu_sampler_update(Tensor x, Tensor F, Tensor a, Tensor b, Tensor alpha, Tensor sigma, "
        "Tensor key, int stream, int first_sample, Tensor? F_uncond=None, Tensor? guidance=None, "
        "Tensor? input_scale=None, ScalarType? input_dtype=None) -> (Tensor, Tensor)",
        _sampler_update,
        _sampler_results,
    ),
):
    _library.define(_schema)  # type: ignore[no-untyped-call]
    _name = _schema.partition("(")[0]
    _library.impl(_name, _function, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fastcm::{_name}", _fake)


_LOSS = f"{3 + 3 + 14 + 6 + 14 + 1 + 12 + 1}q2d6q"


def consistency_loss_and_gradient(
    F: Tensor,
    x_t: Tensor | Noised,
    a: Tensor,
    b: Tensor,
    target: Tensor | Noised | Denoised,
    *,
    metric: SampleMetric,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``[B]`` values, and the derivative of their mean in F, in its dtype."""
    y = target.x if isinstance(target, Denoised) else target
    shared = isinstance(x_t, Noised) and isinstance(y, Noised) and same_noise(x_t, y)
    mapped = (target.F, target.a, target.b) if isinstance(target, Denoised) else (None,) * 3
    F, target_F = F.contiguous(), None if mapped[0] is None else mapped[0].contiguous()
    (x_state, _x), (y_state, _y) = _state(x_t), _state(y)
    rows = [optional(c) for c in (a, b, *mapped[1:], weight)]
    values = torch.empty(F.shape[:1], dtype=torch.float32, device=_CPU)
    gradient = torch.empty(F.shape, dtype=F.dtype, device=_CPU)
    c = 1.0
    if isinstance(metric, PseudoHuber):
        c = metric.scale(F.shape[1:].numel())
    _call(
        "consistency_loss",
        F.shape,
        *packed(F),
        *x_state,
        *packed(rows[0]),
        *packed(rows[1]),
        *y_state,
        int(shared),
        *packed(target_F),
        *(n for t in rows[2:] for n in packed(t)),
        METRICS.index(type(metric)),
        c,
        1.0 / max(len(F), 1),
        *packed(values),
        *packed(gradient),
        form=_LOSS,
    )
    return values, gradient


class _Loss(torch.autograd.Function):
    """Values whose gradient was made along with them."""

    @staticmethod
    def forward(ctx: Any, F: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return scale(gradient, g * len(g), gradient.dtype), None, None


def differentiable(F: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
    """`values`, with `gradient` as the derivative of their mean in F."""
    out: Tensor = _Loss.apply(F, values, gradient)  # type: ignore[no-untyped-call]
    return out
