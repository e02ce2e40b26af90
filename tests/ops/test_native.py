"""The operators in native code on a CPU, against the reference in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

import fastcm
from fastcm import losses, ops, rng
from fastcm.kernels import native as library
from fastcm.ops import Denoised, Noised, dispatch, native, reference
from fastcm.ops.dispatch import Door, door

pytestmark = pytest.mark.skipif(
    library.pointwise("noise") is None, reason="there is no C++ compiler"
)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 3), (1, 1), (3, 5), (2, 3, 4), (2, 1023), (3, 1025), (2, 4097), (40, 1024)]
METRICS = [losses.SquaredL2(), losses.L2(), losses.L1(), losses.PseudoHuber()]
KEY = fastcm.NoiseKey(2**62 + 1, 2**33 + 7, 2**32 - 9)


def exact(x: Any) -> Any:
    """An operand in float64; data in closed form stays what it is."""
    if isinstance(x, Noised):
        return Noised(x.x0 if x.x0.dtype == torch.uint8 else x.x0.double(), *_rest(x))
    if isinstance(x, Denoised):
        return Denoised(exact(x.x), x.F.double(), x.a, x.b)
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _rest(x: Noised) -> tuple[Any, ...]:
    return x.alpha, x.sigma, x.key, x.stream, x.first_sample


def rows(B: int, count: int) -> list[Tensor]:
    return [torch.rand(B, dtype=torch.float64) + 0.1 for _ in range(count)]


def data(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dtype == torch.uint8:
        return torch.randint(256, shape, dtype=dtype)
    return torch.randn(shape).to(dtype)


NORMAL = 5e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_noise_keeps_the_contract(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for stream, first in ((0, 0), (255, 4)):
        found = ops.noise(shape, KEY, stream=stream, first_sample=first, dtype=dtype)
        z = reference.noise(shape, KEY, stream=stream, first_sample=first, dtype=torch.float64)
        assert found.dtype == dtype
        if dtype == torch.float32:
            assert not found.numel() or (found.double() - z).abs().max() <= NORMAL
        else:
            plain = reference.noise(shape, KEY, stream=stream, first_sample=first).to(dtype)
            assert_close(found, z, plain, slack=NORMAL)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 513])
def test_uniform_numbers_are_those_of_the_reference_bit_for_bit(count: int) -> None:
    for key in (KEY, fastcm.NoiseKey(5, 7, 11)):
        for stream, first in ((0, 0), (255, 4)):
            found = ops.uniform(count, key, stream=stream, first_sample=first)
            assert torch.equal(found, rng.uniform(count, key, stream=stream, first_sample=first))


def test_extreme_words_make_extreme_normals() -> None:
    """Enough samples that radii near 0 and far out occur, and every quarter of the circle."""
    z = ops.noise((64, 2**16), fastcm.NoiseKey(1), stream=1)
    e = reference.noise((64, 2**16), fastcm.NoiseKey(1), stream=1, dtype=torch.float64)
    assert z.abs().max() > 4.9 and z.abs().min() < 1e-5
    assert (z.double() - e).abs().max() <= NORMAL


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("x_dtype", [*FLOATS, torch.uint8])
@pytest.mark.parametrize("out_dtype", FLOATS)
def test_noising(shape: tuple[int, ...], x_dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    x0, (a, b, c, d) = data(shape, x_dtype), rows(shape[0], 4)
    alpha, sigma = torch.stack([a, b]), torch.stack([c, d])
    settings: dict[str, Any] = {"stream": 3, "first_sample": 5}
    pair = ops.noising(x0, alpha, sigma.float(), KEY, out_dtype=out_dtype, **settings)
    one = ops.noising(x0, a, c.float(), KEY, out_dtype=out_dtype, **settings)
    assert torch.equal(pair[0], one) and isinstance(pair, tuple)
    plain = reference.noising(x0, alpha, sigma, KEY, out_dtype=out_dtype, **settings)
    truth = reference.noising(exact(x0), alpha, sigma, KEY, out_dtype=torch.float64, **settings)
    for found, p, e in zip(pair, plain, truth):
        assert_close(found, e, p, slack=2 * NORMAL)


def states(shape: tuple[int, ...]) -> Iterator[Any]:
    """Operands in every form."""
    for dtype in FLOATS:
        yield data(shape, dtype)
    for dtype in (*FLOATS, torch.uint8):
        a, s = rows(shape[0], 2)
        yield Noised(data(shape, dtype), a, s.float(), KEY, 7, 3)


@pytest.mark.parametrize("shape", SHAPES)
def test_boundary_and_euler_step(shape: tuple[int, ...]) -> None:
    a, b, c, d, w = rows(shape[0], 5)
    slack = 5 * NORMAL
    for x, dtype in itertools.product(states(shape), FLOATS):
        F, G = data(shape, dtype), data(shape, dtype)
        truth = reference.boundary(exact(x), F.double(), a, b)
        found = ops.boundary(x, F, a, b.float())
        assert_close(found, truth, reference.boundary(x, F, a, b), slack=slack)
        for guided, scaled in itertools.product((False, True), (False, True)):
            more: dict[str, Any] = {"scale": c if scaled else None}
            if guided:
                more |= {"v_uncond": G, "guidance": w}
            truth = reference.euler_step(
                exact(x), F.double(), a, **{k: exact(v) for k, v in more.items()}
            )
            plain = reference.euler_step(x, F, a, **more)
            assert_close(ops.euler_step(x, F, a, **more), truth, plain, slack=slack)
            both = ops.euler_step(x, F, a, **more, input_scale=d, input_dtype=dtype)
            assert_close(both[0], truth, plain, slack=slack)
            second = reference.scaled(plain, d, dtype)
            assert_close(both[1], reference.scaled(truth, d, torch.float64), second, slack=slack)


@pytest.mark.parametrize("shape", SHAPES)
def test_sampler_update_and_scale(shape: tuple[int, ...]) -> None:
    a, b, c, d = rows(shape[0], 4)
    for x_dtype, dtype in itertools.product(FLOATS, FLOATS):
        x, F = data(shape, x_dtype), data(shape, dtype)
        for more in ({}, {"F_uncond": data(shape, dtype), "guidance": 3 * a}):
            more = {"stream": 9, "first_sample": 2, **more}
            found = ops.sampler_update(x, F, a, b, c, d, KEY, **more)
            for scale, moved in ((None, found), (a, reference.lift(a, found) * found)):
                pair = ops.sampler_update(
                    x, F, a, b, c, d, KEY, **more, input_scale=scale, input_dtype=dtype
                )
                assert torch.equal(pair[0], found) and torch.equal(pair[1], moved.to(dtype))
            plain = reference.sampler_update(x, F, a, b, c, d, KEY, **more)
            more = {k: v.double() if isinstance(v, Tensor) else v for k, v in more.items()}
            truth = reference.sampler_update(x.double(), F.double(), a, b, c, d, KEY, **more)
            assert_close(found, truth, plain, slack=2 * NORMAL)
        truth, plain = reference.scaled(x.double(), c, torch.float64), reference.scaled(x, c, dtype)
        assert_close(native.scale(x, c.float(), dtype), truth, plain)


def targets(shape: tuple[int, ...], x: Any, dtype: torch.dtype) -> Iterator[Any]:
    a, b, c, d = rows(shape[0], 4)
    yield data(shape, torch.float32)
    if isinstance(x, Noised):  # another version of the same data under the same noise
        version = Noised(x.x0, a, b, x.key, x.stream, x.first_sample)
        yield version
        yield Denoised(version, data(shape, dtype), c, d)
    yield Noised(data(shape, torch.uint8), a, b, KEY, 8)
    yield Denoised(data(shape, torch.float32), data(shape, dtype), c, d)


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_loss_and_gradient(shape: tuple[int, ...], metric: losses.SampleMetric) -> None:
    a, b, w = rows(shape[0], 3)
    forms = list(states(shape))
    for x, dtype in zip((forms[0], forms[1], forms[6]), FLOATS):
        F = data(shape, dtype)
        for target, weight in itertools.product(targets(shape, x, dtype), (None, w)):
            settings: dict[str, Any] = {"metric": metric, "weight": weight}
            values, gradient = native.consistency_loss_and_gradient(F, x, a, b, target, **settings)
            _, slope = reference.consistency_loss_and_gradient(F, x, a, b, target, **settings)
            truth, exactly = reference.consistency_loss_and_gradient(
                F.double(), exact(x), a, b, exact(target), **settings
            )
            D = F[0].numel()
            torch.testing.assert_close(values.double(), truth, rtol=2e-5, atol=1e-4 * D**0.5)
            assert gradient.dtype == dtype
            if not isinstance(metric, losses.L1):  # whose gradient jumps where a residual is 0
                assert_close(gradient, exactly, slope, slack=1e-4)
            else:
                assert (gradient.double() - exactly).abs().gt(1e-2).float().mean() < 1e-2


def test_the_gradient_comes_through_autograd_too() -> None:
    a, b, w = rows(3, 3)
    x, y, F = (torch.randn(3, 50) for _ in range(3))
    results = []
    for compute in (ops, reference):
        leaf = F.clone().requires_grad_()
        mean, values = compute.consistency_loss(leaf, x, a, b, y, metric=METRICS[3], weight=w)
        (alone,) = torch.autograd.grad((values * w).sum() + mean, leaf, retain_graph=True)
        (of_mean,) = torch.autograd.grad(mean, leaf)
        results.append((mean.detach(), values.detach(), alone, of_mean))
    assert door(F, differentiable=False) is Door.NATIVE
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("B", [1, 3, 64])
def test_bits_depend_neither_on_threads_nor_on_the_batch(B: int) -> None:
    shape = (B, 3, 101, 131)
    x0, F, G = data(shape, torch.uint8), torch.randn(shape), torch.randn(shape)
    a, b, c, d = rows(B, 4)
    x, y = Noised(x0, a, b, KEY), Noised(x0, c, d, KEY)

    def work(rows_: slice) -> list[Tensor]:
        first = rows_.start or 0

        def cut(v: Any) -> Any:
            if isinstance(v, Noised):
                return Noised(v.x0[rows_], v.alpha[rows_], v.sigma[rows_], KEY, 0, first)
            return v[rows_]

        x_, F_, G_, a_, b_ = map(cut, (x, F, G, a, b))
        y_ = cut(y)
        y_ = Noised(x_.x0, y_.alpha, y_.sigma, KEY, 0, first)
        target = Denoised(y_, G_, a_, b_)
        values, gradient = native.consistency_loss_and_gradient(
            F_, x_, a_, b_, target, metric=METRICS[3]
        )
        return [
            ops.noise((len(F_), *shape[1:]), KEY, stream=2, first_sample=first),
            ops.boundary(x_, F_, a_, b_),
            ops.sampler_update(G_, F_, a_, b_, b_, a_, KEY, stream=20, first_sample=first),
            values,
            gradient * (len(F_) / B),
        ]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = work(slice(None))
        torch.set_num_threads(3)
        together = work(slice(None))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, alone, together))
    if B == 64:  # a power of two: the gradient's factor is exact
        halves = [work(slice(0, 32)), work(slice(32, 64))]
        for whole, *parts in zip(alone, *halves):
            assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_and_where_it_is(bad: float) -> None:
    a, b = rows(2, 2)
    for dtype in FLOATS:
        x, F = data((2, 37), dtype), data((2, 37), dtype)
        F[1, 36] = bad
        out = ops.boundary(x, F, a, b)
        assert torch.equal(out.isfinite(), F.isfinite())
        low = ops.euler_step(x, F, a, input_dtype=dtype)[1]
        assert torch.equal(low.isnan(), F.isnan()) and torch.equal(low.isinf(), F.isinf())
        values, gradient = native.consistency_loss_and_gradient(F, x, a, b, x, metric=METRICS[3])
        assert values.isfinite().tolist() == [True, False]
        assert gradient[0].isfinite().all() and not gradient[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_a_low_precision_is_read_and_rounded_as_torch_does(
    dtype: torch.dtype,
) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[None]
    one = torch.ones(1)
    wide = native.scale(every, one, torch.float32)
    assert torch.equal(wide.nan_to_num(7.5), every.float().nan_to_num(7.5))
    assert torch.equal(wide.signbit(), every.float().signbit())
    bits = torch.randint(-(2**31), 2**31, (1, 2**18)).to(torch.int32)
    near = every.float().view(torch.int32)[:, ::16] + torch.randint(-(2**13), 2**13, (1, 2**12))
    for x in (bits.view(torch.float32), near.to(torch.int32).view(torch.float32)):
        found, wanted = native.scale(x, one, dtype), x.to(dtype)
        assert torch.equal(found.isnan(), wanted.isnan())
        keep = ~wanted.isnan()
        assert torch.equal(found[keep].view(torch.int16), wanted[keep].view(torch.int16))


def test_layouts_are_kept_where_no_noise_is_made() -> None:
    x, F, G = (torch.randn(3, 4, 6, 5) for _ in range(3))
    a, b = rows(3, 2)
    last = [t.to(memory_format=torch.channels_last) for t in (x, F, G)]
    for one, other in (
        (ops.boundary(x, F, a, b), ops.boundary(*last[:2], a, b)),
        (
            ops.euler_step(x, F, a, v_uncond=G, guidance=b),
            ops.euler_step(*last[:2], a, v_uncond=last[2], guidance=b),
        ),
    ):
        assert torch.equal(one, other)
        assert other.is_contiguous(memory_format=torch.channels_last)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert torch.equal(ops.boundary(strided, F, a, b), ops.boundary(x, F, a, b))
    noisy = ops.noising(last[0], a, b, KEY)
    assert isinstance(noisy, Tensor) and torch.equal(noisy, ops.noising(x, a, b, KEY))


def test_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3)
    leaf = x.clone().requires_grad_()
    assert door(x) is Door.NATIVE and door(x, None, x.bfloat16()) is Door.NATIVE
    assert door(leaf) is Door.REFERENCE and door(leaf, differentiable=False) is Door.NATIVE
    with torch.no_grad():
        assert door(leaf) is Door.NATIVE
    assert door(x, x.double()) is Door.REFERENCE
    assert door(x.to("meta")) is Door.REFERENCE
    ways = []

    def seen(x: Tensor) -> Tensor:
        ways.append(door(x))
        return x.sin()

    torch.func.jvp(seen, (x,), (x,))
    torch.fx.experimental.proxy_tensor.make_fx(seen)(x)
    with torch.autograd.forward_ad.dual_level():
        seen(torch.autograd.forward_ad.make_dual(x, x))
    assert ways == [Door.REFERENCE] * 3
    monkeypatch.setattr(dispatch, "_has_native", lambda: False)
    assert door(x) is Door.REFERENCE


def test_compiled_noise_is_the_eager_noise_bit_for_bit() -> None:
    """With torch before 2.13 to rounding: 6e-7 were seen on 2.11."""
    x, a = torch.randn(3, 37), torch.rand(3, dtype=torch.float64)

    def work(x: Tensor, a: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        k = fastcm.NoiseKey.wrap(key)
        pair = ops.noising(x, torch.stack([a, a]), torch.stack([a, 1 - a]), k)
        update = ops.sampler_update(x, x, a, a, a, a, k, stream=rng.SAMPLE)
        return (*pair, update, ops.noise((3, 5), k, stream=4), ops.uniform(5, k, stream=1))

    compiled = torch.compile(work, fullgraph=True)
    for key in (KEY.tensor, fastcm.NoiseKey(4, 2).tensor):
        for found, wanted in zip(compiled(x, a, key), work(x, a, key), strict=True):
            atol = 0.0 if torch.__version__ >= (2, 13) else 2e-6
            torch.testing.assert_close(found, wanted, rtol=0.0, atol=atol)


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: type(m).__name__)
def test_a_residual_that_is_no_number_is_none_in_any_form_of_the_gradient(
    metric: losses.SampleMetric,
) -> None:
    F, x, c = torch.randn(3, 40), torch.randn(3, 40), torch.ones(3)
    F[1, 7] = float("nan")
    leaf = F.clone().requires_grad_()
    mean, values = reference.consistency_loss(leaf, x, c, c, x.cos(), metric=metric)
    mean.backward()
    assert leaf.grad is not None
    explicit = reference.consistency_loss_and_gradient(F, x, c, c, x.cos(), metric=metric)[1]
    found = native.consistency_loss_and_gradient(F, x, c, c, x.cos(), metric=metric)[1]
    for gradient in (leaf.grad, explicit, found):
        assert torch.equal(gradient.isnan(), found.isnan()), metric
    assert found[1, 7].isnan() and found[0].isfinite().all() and values[0].isfinite()
