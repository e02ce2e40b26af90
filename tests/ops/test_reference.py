"""The operations around the network: their formulas, closed forms, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastcm import ops, rng
from fastcm.ops import Denoised, Noised, validation
from fastcm.rng import NoiseKey

B, D = 3, 10


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_noising_is_alpha_x0_plus_sigma_z():
    x0, alpha, sigma = torch.randn(B, 2, 5), vector(0.9, 0.5, 0.0), vector(0.1, 2.0, 1.0)
    key = NoiseKey(4, 2)
    z = ops.noise(x0.shape, key, stream=rng.DATA, dtype=torch.float64)
    x = ops.noising(x0, alpha, sigma, key, stream=rng.DATA)
    assert x.dtype == torch.float32
    for i in range(B):
        exact = alpha[i] * x0[i].double() + sigma[i] * z[i]
        torch.testing.assert_close(x[i].double(), exact, rtol=0, atol=1e-5)
    half = ops.noising(x0, alpha, sigma, key, stream=rng.DATA, out_dtype=torch.bfloat16)
    assert torch.equal(half, x.bfloat16())


def test_bytes_stand_for_minus_one_to_one():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, -1)
    x = ops.noising(levels, vector(1.0), vector(0.0), NoiseKey(0))
    assert x.dtype == torch.float32
    expected = torch.tensor([v / 127.5 - 1 for v in range(256)])
    torch.testing.assert_close(x[0], expected, rtol=0, atol=1e-7)
    assert (x[0, 0], x[0, 255]) == (-1.0, 1.0)


def test_a_pair_of_times_shares_its_noise():
    x0, key = torch.randn(B, D), NoiseKey(7)
    alpha, sigma = torch.rand(2, B), torch.rand(2, B) + 0.5
    x_t, x_s = ops.noising(x0, alpha, sigma, key, first_sample=5)
    z_t = (x_t - alpha[0][:, None] * x0) / sigma[0][:, None]
    z_s = (x_s - alpha[1][:, None] * x0) / sigma[1][:, None]
    torch.testing.assert_close(z_t, z_s, rtol=0, atol=1e-5)
    for row, x in enumerate((x_t, x_s)):
        assert torch.equal(x, ops.noising(x0, alpha[row], sigma[row], key, first_sample=5))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_closed_form_is_the_stored_float32_tensor_bit_for_bit(dtype):
    x0 = (torch.randn(B, D) * 50 + 100).clamp(0, 255).to(dtype)
    alpha, sigma, a, b = (torch.rand(B, dtype=torch.float64) for _ in range(4))
    key, F = NoiseKey(1, 2), torch.randn(B, D)
    stored = ops.noising(x0, alpha, sigma, key, stream=9, first_sample=4, out_dtype=torch.float32)
    closed = Noised(x0, alpha, sigma, key, stream=9, first_sample=4)
    assert torch.equal(ops.boundary(closed, F, a, b), ops.boundary(stored, F, a, b))
    assert torch.equal(ops.euler_step(closed, F, a), ops.euler_step(stored, F, a))
    one, other = (ops.consistency_loss(F, x, a, b, torch.zeros(B, D)) for x in (closed, stored))
    assert torch.equal(one[1], other[1])


def test_rounding_the_state_to_bfloat16_destroys_the_residual_of_neighbouring_times():
    """A constant velocity field on the linear path, t - s = 1 / 1280: f(x_t) - f(x_s) is
    (x_t - t v) - (x_s - s v) = (t - s) (z - x0 - v), known in closed form."""
    B, D = 64, 192
    t = torch.linspace(0.2, 1.0, B, dtype=torch.float64)
    s = t - 1 / 1280
    x0, v, key = torch.randn(B, D), torch.randn(B, D), NoiseKey(3)
    z = ops.noise((B, D), key, stream=rng.NOISE, dtype=torch.float64)
    exact = (t - s)[:, None] * (z - x0.double() - v.double())

    def residual(x_t: Tensor | Noised, x_s: Tensor | Noised) -> Tensor:
        one = torch.ones_like(t)
        return (ops.boundary(x_t, v, one, -t) - ops.boundary(x_s, v, one, -s)).double()

    closed = [Noised(x0, 1 - at, at, key) for at in (t, s)]
    stored = [ops.noising(x0, 1 - at, at, key, out_dtype=torch.bfloat16) for at in (t, s)]
    scale = exact.square().mean().sqrt()
    error = [(residual(*form) - exact).square().mean().sqrt() / scale for form in (closed, stored)]
    assert error[0] < 1e-3
    assert error[1] > 1.0


def test_a_closed_form_stays_accurate_for_a_low_precision_network():
    """Its output is bfloat16, the state in float32 all the same."""
    t, x0, key = vector(0.3, 0.6, 0.9), torch.randn(B, D), NoiseKey(5)
    F = torch.randn(B, D).bfloat16()
    f = ops.boundary(Noised(x0, 1 - t, t, key), F, torch.ones(B), -t)
    assert f.dtype == torch.float32
    z = ops.noise((B, D), key, stream=rng.NOISE, dtype=torch.float64)
    lifted = t[:, None]
    exact = (1 - lifted) * x0 + lifted * z - lifted * F.double()
    torch.testing.assert_close(f.double(), exact, rtol=0, atol=1e-5)


def test_an_euler_step_with_guidance_is_its_formula():
    x, v, u = (torch.randn(B, D, dtype=torch.float64) for _ in range(3))
    dt, w, scale = vector(0.1, 0.2, 0.3), vector(0.0, 1.0, 7.5), vector(1.0, 0.5, -2.0)
    got = ops.euler_step(x, v, dt, v_uncond=u, guidance=w, scale=scale)
    for i in range(B):
        exact = scale[i] * x[i] - dt[i] * (u[i] + w[i] * (v[i] - u[i]))
        torch.testing.assert_close(got[i], exact, rtol=1e-12, atol=1e-14)
    plain = ops.euler_step(x, v, dt)
    torch.testing.assert_close(plain, x - dt[:, None] * v, rtol=1e-12, atol=1e-14)
    # w = 0 is unconditional, w = 1 conditional
    torch.testing.assert_close(got[0], ops.euler_step(x, u, dt)[0])
    torch.testing.assert_close(got[1], 0.5 * x[1] - 0.2 * v[1])


def test_a_sampler_update_renoises_the_denoised():
    x, F = (torch.randn(B, D, dtype=torch.float64) for _ in range(2))
    a, b, alpha, sigma = (torch.randn(B, dtype=torch.float64) for _ in range(4))
    key, stream = NoiseKey(6), rng.SAMPLE + 2
    got = ops.sampler_update(x, F, a, b, alpha, sigma, key, stream=stream, first_sample=11)
    z = ops.noise((B, D), key, stream=stream, first_sample=11, dtype=torch.float64)
    for i in range(B):
        exact = alpha[i] * (a[i] * x[i] + b[i] * F[i]) + sigma[i] * z[i]
        torch.testing.assert_close(got[i], exact, rtol=1e-12, atol=1e-12)


def test_an_empty_batch_is_no_special_case():
    x, none = torch.zeros(0, D), torch.zeros(0)
    assert ops.noising(x, none, none, NoiseKey(0)).shape == (0, D)
    assert ops.boundary(x, x, none, none).shape == (0, D)
    assert ops.euler_step(x, x, none).shape == (0, D)


x, v = torch.zeros(B, D), torch.zeros(B)
key = NoiseKey(0)
ok = Noised(x, v, v, key)
GOOD = {
    ops.noising: {"x0": x, "alpha": v, "sigma": v, "key": key},
    ops.boundary: {"x": x, "F": x, "a": v, "b": v},
    ops.euler_step: {"x": x, "v": x, "dt": v},
    ops.sampler_update: {
        **{"x": x, "F": x, "a": v, "b": v, "alpha": v, "sigma": v},
        **{"key": key, "stream": 16},
    },
    ops.consistency_loss: {"F": x, "x_t": x, "a": v, "b": v, "target": x},
}
SAMPLES = [
    (torch.zeros(B), ValueError),
    (torch.zeros(B, D, dtype=torch.int64), TypeError),
    ([[0.0] * D] * B, TypeError),
]
OTHERS = [
    (torch.zeros(B + 1, D), ValueError),
    (torch.zeros(1, D), ValueError),
    (torch.zeros(B, D, device="meta"), ValueError),
]
COEFFICIENTS = [
    (0.5, TypeError),
    (torch.zeros(()), ValueError),
    (torch.zeros(B + 1), ValueError),
    (torch.zeros(B, 1), ValueError),
    (torch.zeros(B, dtype=torch.int64), ValueError),
    (torch.zeros(B, device="meta"), ValueError),
]
KEYS = [
    ("key", torch.zeros(3, dtype=torch.int64), TypeError),
    ("key", 0, TypeError),
    ("key", NoiseKey(0, device="meta"), ValueError),
    ("stream", 256, ValueError),
    ("stream", -1, ValueError),
    ("first_sample", 2**32, ValueError),
    ("first_sample", -1, ValueError),
]
BAD = [
    *[(op, n, *bad) for op, n in ((ops.noising, "x0"), (ops.boundary, "x")) for bad in SAMPLES],
    *[(op, n, *bad) for op, n in ((ops.euler_step, "x"), (ops.consistency_loss, "x_t"))
      for bad in SAMPLES],
    *[(op, n, *bad) for op, n in ((ops.boundary, "F"), (ops.euler_step, "v"))
      for bad in SAMPLES + OTHERS],
    *[(ops.sampler_update, n, *bad) for n in ("x", "F") for bad in SAMPLES],
    *[(ops.consistency_loss, n, *bad) for n in ("F", "target") for bad in SAMPLES + OTHERS],
    *[(op, n, *bad) for op, names in ((ops.noising, ("alpha", "sigma")), (ops.boundary, "ab"),
      (ops.euler_step, ("dt", "scale")), (ops.consistency_loss, ("a", "weight")),
      (ops.sampler_update, ("a", "b", "alpha", "sigma"))) for n in names for bad in COEFFICIENTS],
    *[(op, *bad) for op in (ops.noising, ops.sampler_update) for bad in KEYS],
    (ops.noising, "out_dtype", torch.uint8, TypeError),
    (ops.noising, "alpha", torch.zeros(3, B), ValueError),
    (ops.noising, "alpha", torch.zeros(2, B), ValueError),
    (ops.euler_step, "v_uncond", x, ValueError),
    (ops.euler_step, "guidance", v, ValueError),
    (ops.sampler_update, "F_uncond", x, ValueError),
    (ops.sampler_update, "guidance", v, ValueError),
    (ops.boundary, "x", Noised(torch.zeros(B), v, v, key), ValueError),
    (ops.boundary, "x", Noised(x, torch.zeros(B + 1), v, key), ValueError),
    (ops.boundary, "x", Noised(x, v, v, key, stream=300), ValueError),
]  # fmt: skip


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}{value.device}".removeprefix("torch.")
    return type(value).__name__


@pytest.mark.parametrize(
    ("op", "name", "value", "error"),
    BAD,
    ids=[f"{op.__name__}-{name}-{describe(value)}" for op, name, value, _ in BAD],
)
def test_a_bad_argument_is_refused_by_name_and_type(op, name, value, error):
    named = "alpha|stream|x0" if isinstance(value, Noised) else rf"\b{name}\b"
    op(**GOOD[op])
    with pytest.raises(error, match=named):
        op(**{**GOOD[op], name: value})


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("x", torch.zeros(1, D)),
        ("x", torch.zeros(B, 1)),
        ("x", torch.zeros(B, D, device="meta")),
        ("x", Noised(torch.zeros(1, D), torch.zeros(1), torch.zeros(1), key)),
        ("F", torch.zeros(B, 1)),
        ("F", torch.zeros(B, D, device="meta")),
        ("a", torch.zeros(1)),
        ("b", torch.zeros(B, device="meta")),
    ],
    ids=lambda value: value if isinstance(value, str) else describe(value),
)
def test_a_target_in_closed_form_is_checked_part_by_part(part, value):
    """What would broadcast is refused too."""
    target = Denoised(**{"x": x, "F": x, "a": v, "b": v, part: value})
    with pytest.raises(ValueError, match="target"):
        ops.consistency_loss(x, x, v, v, target)


def test_a_noised_target_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="target"):
        ops.consistency_loss(x, x, v, v, Noised(x[:1], v[:1], v[:1], key))
    assert torch.isfinite(ops.consistency_loss(x, ok, v, v, ok)[0])


class Counting(TorchDispatchMode):
    """Counts what reaches torch."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_checks_compute_nothing():
    """A check that converts uint8 data to look at its shape costs five bytes an element."""
    F, a = torch.randn(3, 4, 5), torch.rand(3)
    x = Noised(torch.zeros(3, 4, 5, dtype=torch.uint8), a, a, NoiseKey(0))
    with Counting() as torch_:
        validation.check_map("x", x, F, a, a)
        validation.check_state("target", x, like=F)
        validation.check_state("target", F, like=F)
    assert torch_.calls == 0
