"""Metrics, weights and the consistency loss: formulas, gradients, and where gradients go."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastcm import losses, ops, rng
from fastcm.losses import (
    L1,
    L2,
    ElementwiseHuber,
    ElementwiseL2,
    Karras,
    MinSNR,
    PseudoHuber,
    SquaredL2,
)
from fastcm.ops import Denoised, Noised, reference
from fastcm.paths import Linear, TrigFlow, VarianceExploding, VariancePreserving
from fastcm.rng import NoiseKey

METRICS = [
    SquaredL2(),
    L2(),
    L1(),
    PseudoHuber(),
    PseudoHuber(c=0.3),
    ElementwiseHuber(),
    ElementwiseHuber(c=0.3),
    ElementwiseL2(),
]
B, SHAPE = 4, (4, 2, 3)


def double(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def formula(metric, r: list[float]) -> float:
    """Of one sample, in plain Python."""
    squared = math.fsum(v * v for v in r)
    if isinstance(metric, SquaredL2):
        return squared
    if isinstance(metric, L2):
        return math.sqrt(squared)
    if isinstance(metric, L1):
        return math.fsum(abs(v) for v in r)
    if isinstance(metric, ElementwiseL2):
        return squared / len(r)
    if isinstance(metric, ElementwiseHuber):
        return math.fsum(math.hypot(v, metric.c) - metric.c for v in r) / len(r)
    c = 0.00054 * math.sqrt(len(r)) if metric.c is None else metric.c
    return math.sqrt(squared + c * c) - c


@pytest.mark.parametrize("metric", METRICS, ids=str)
def test_a_metric_is_its_formula_over_the_whole_sample(metric):
    f, target = double(*SHAPE), double(*SHAPE)
    expected = [formula(metric, (f[i] - target[i]).flatten().tolist()) for i in range(B)]
    assert metric(f, target).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("metric", METRICS, ids=str)
def test_a_metrics_gradient_is_the_derivative_of_its_value(metric):
    r = double(*SHAPE, grad=True)
    (expected,) = torch.autograd.grad(metric.value(r).sum(), r)
    torch.testing.assert_close(metric.gradient(r.detach()), expected, rtol=1e-12, atol=1e-14)


def test_metrics_of_elements_are_those_of_the_script_of_lcm():
    """mean(sqrt(r^2 + c^2) - c), c = 0.001, and the mean square, of 3, 4 and 0 thousandths."""
    r = torch.tensor([[3e-3, 4e-3, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    huber = (math.sqrt(10) + math.sqrt(17) - 2) / 3 * 1e-3
    assert ElementwiseHuber()(r, 0 * r).tolist() == pytest.approx([huber, 0.0], rel=1e-12)
    assert ElementwiseL2()(r, 0 * r).tolist() == pytest.approx([25e-6 / 3, 0.0], rel=1e-12)
    whole = (math.sqrt(26) - 1) * 1e-3
    assert PseudoHuber(1e-3)(r, 0 * r)[0].item() == pytest.approx(whole, rel=1e-12)
    f, target = double(*SHAPE), double(*SHAPE)
    assert ElementwiseL2()(f, target).mean().item() == pytest.approx(
        torch.nn.functional.mse_loss(f, target).item()
    )
    by_script = (((f - target) ** 2 + 1e-6).sqrt() - 1e-3).mean().item()
    assert ElementwiseHuber()(f, target).mean().item() == pytest.approx(by_script, rel=1e-12)


def test_pseudo_huber_keeps_its_accuracy_for_tiny_residuals():
    """sqrt(s + c^2) - c would cancel in float32; r^2 / 2c remains."""
    r = torch.full((1, 4), 1e-5)
    expected = formula(PseudoHuber(0.5), [1e-5] * 4)
    assert PseudoHuber(0.5)(r, torch.zeros_like(r)).item() == pytest.approx(4e-10, rel=1e-5)
    assert expected == pytest.approx(4e-10, rel=1e-3)


def test_the_pseudo_huber_constant_grows_with_the_dimension():
    assert PseudoHuber().scale(3 * 32 * 32) == pytest.approx(0.00054 * math.sqrt(3072))
    assert PseudoHuber(0.25).scale(3072) == 0.25


def test_the_pseudo_huber_gradient_is_b_w_r_over_root_over_batch():
    F, x, target = double(*SHAPE, grad=True), double(*SHAPE), double(*SHAPE)
    a, b, w = double(B), double(B), double(B).exp()
    c = 0.2
    mean, _ = ops.consistency_loss(F, x, a, b, target, metric=PseudoHuber(c), weight=w)
    (gradient,) = torch.autograd.grad(mean, F)
    for i in range(B):
        r = a[i] * x[i] + b[i] * F[i].detach() - target[i]
        expected = b[i] * w[i] * r / torch.sqrt(r.square().sum() + c**2) / B
        torch.testing.assert_close(gradient[i], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("metric", METRICS, ids=str)
def test_a_zero_residual_costs_nothing_and_pulls_nowhere(metric, dtype):
    f = torch.randn(SHAPE, dtype=dtype, requires_grad=True)
    loss = metric(f, f.detach().clone())
    assert loss.tolist() == [0.0] * B
    (gradient,) = torch.autograd.grad(loss.sum(), f)
    assert (gradient == 0).all()


def test_the_loss_is_the_mean_of_the_weighted_samples():
    F, x, target = (torch.randn(SHAPE) for _ in range(3))
    a, b, w = (torch.rand(B) for _ in range(3))
    mean, each = ops.consistency_loss(F, x, a, b, target, metric=L1(), weight=w)
    for i in range(B):
        r = a[i].double() * x[i].double() + b[i].double() * F[i].double() - target[i].double()
        assert each[i].item() == pytest.approx(w[i].item() * r.abs().sum().item(), rel=1e-5)
    assert mean.item() == pytest.approx(each.mean().item(), rel=1e-6)
    plain = ops.consistency_loss(F, x, a, b, target, metric=L1())[1]
    torch.testing.assert_close(plain * w, each)


def closed_forms() -> tuple[Noised, Denoised, Tensor, Tensor]:
    x0 = double(*SHAPE, grad=True)
    y, target_F = double(*SHAPE, grad=True), double(*SHAPE, grad=True)
    noised = Noised(x0, torch.rand(B), torch.rand(B), NoiseKey(1))
    target = Denoised(y, target_F, torch.rand(B), torch.rand(B))
    return noised, target, x0, y


def custom(f: Tensor, target: Tensor) -> Tensor:
    return (f - target).pow(4).flatten(1).sum(1)


@pytest.mark.parametrize("metric", [PseudoHuber(), custom], ids=["built in", "callable"])
@pytest.mark.parametrize("form", ["tensor", "closed"])
@pytest.mark.parametrize("which", ["x_t", "target"])
def test_the_gradient_goes_to_the_student_output_only(which, form, metric):
    """A target network's output or a state that requires gradient is a constant here."""
    F = double(*SHAPE, grad=True)
    x, target, x0, y = closed_forms()
    others = [x0, y, target.F]
    if form == "tensor":
        others.append(double(*SHAPE, grad=True))
        x, target = (others[-1], target) if which == "x_t" else (x, others[-1])
    mean, _ = ops.consistency_loss(F, x, torch.rand(B), torch.rand(B), target, metric=metric)
    student, *rest = torch.autograd.grad(mean, [F, *others], allow_unused=True)
    assert student.abs().max() > 0
    assert [g for g in rest if g is not None] == []


@pytest.mark.parametrize("metric", [PseudoHuber(), custom], ids=["built in", "callable"])
def test_the_coefficients_and_the_weight_get_no_gradient(metric):
    F, x, target = (double(*SHAPE, grad=True) for _ in range(3))
    a, b, w = (torch.rand(B, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mean, _ = ops.consistency_loss(F, x, a, b, target, metric=metric, weight=w)
    assert torch.autograd.grad(mean, [a, b, w], allow_unused=True) == (None, None, None)


@pytest.mark.parametrize("metric", METRICS, ids=str)
def test_the_loss_passes_gradcheck_in_the_student_output(metric):
    F = double(*SHAPE, grad=True)
    x, target, _, _ = closed_forms()
    a, b, w = torch.rand(B), 0.5 + torch.rand(B), torch.rand(B)

    def mean(F: Tensor) -> Tensor:
        return reference.consistency_loss(F, x, a, b, target, metric=metric, weight=w)[0]

    assert torch.autograd.gradcheck(mean, F)


def test_boundary_and_euler_step_pass_gradcheck():
    x, F, u = (double(*SHAPE, grad=True) for _ in range(3))
    a, b, w, scale = (double(B) for _ in range(4))
    assert torch.autograd.gradcheck(lambda x, F: reference.boundary(x, F, a, b), (x, F))
    noised = Noised(double(*SHAPE), torch.rand(B), torch.rand(B), NoiseKey(3))
    assert torch.autograd.gradcheck(lambda F: reference.boundary(noised, F, a, b), F)

    def step(x: Tensor, v: Tensor, u: Tensor) -> Tensor:
        return reference.euler_step(x, v, b, v_uncond=u, guidance=w, scale=scale)

    assert torch.autograd.gradcheck(step, (x, F, u))


def test_any_callable_serves_as_a_metric():
    f, target = torch.randn(SHAPE), torch.randn(SHAPE)
    one, zero = torch.ones(B), torch.zeros(B)

    def largest(f: Tensor, target: Tensor) -> Tensor:
        return (f - target).abs().flatten(1).amax(1)

    mean, each = ops.consistency_loss(f, f, zero, one, target, metric=largest)
    assert torch.equal(each, largest(f, target)) and mean == each.mean()
    with pytest.raises(ValueError, match="metric"):
        ops.consistency_loss(f, f, zero, one, target, metric=lambda f, y: (f - y).abs())
    with pytest.raises(TypeError, match="metric"):
        ops.consistency_loss(f, f, zero, one, target, metric="huber")


def test_a_bfloat16_network_is_compared_in_float32():
    F = torch.randn(SHAPE, requires_grad=True)
    half = F.detach().bfloat16().requires_grad_()
    target, one = torch.randn(SHAPE), torch.ones(B)
    mean, _ = ops.consistency_loss(half, target, 0 * one, one, target, metric=SquaredL2())
    assert mean.dtype == torch.float32
    expected = (half.detach().double() - target.double()).square().flatten(1).sum(1).mean()
    assert mean.item() == pytest.approx(expected.item(), rel=1e-6)
    mean.backward()
    assert half.grad.dtype == torch.bfloat16 and half.grad.abs().max() > 0


def test_weights_are_their_formulas():
    values = [0.1, 0.35, 0.8]
    t = torch.tensor(values, dtype=torch.float64)
    s = t - 0.05
    path = Linear()
    snr = [((1 - v) / v) ** 2 for v in values]
    assert losses.uniform(t, s, path).tolist() == [1.0] * 3
    assert losses.inverse_gap(t, s, path).tolist() == pytest.approx([20.0] * 3)
    assert losses.inverse_square(t, s, path).tolist() == pytest.approx([v**-2 for v in values])
    assert losses.snr(t, s, path).tolist() == pytest.approx(snr)
    assert MinSNR()(t, s, path).tolist() == pytest.approx([min(v, 5.0) for v in snr])
    assert max(snr) > 5 > min(snr)
    assert MinSNR(1e9)(t, s, path).tolist() == pytest.approx(snr)
    edm = [(v * v + 0.25) / (v * 0.5) ** 2 for v in values]
    assert Karras()(t, s, VarianceExploding()).tolist() == pytest.approx(edm)
    abar = VariancePreserving().at(t * 900).alpha.square()
    got = losses.snr(t * 900, s, VariancePreserving())
    torch.testing.assert_close(got, abar / (1 - abar), rtol=1e-9, atol=0)


def test_the_karras_weight_makes_a_denoiser_error_an_error_of_the_edm_network():
    """lambda c_out^2 = 1, on every path after rescaling."""
    t = torch.tensor([0.05, 0.9, 1.4], dtype=torch.float64)
    at = TrigFlow(0.5).at(t)
    level = at.sigma / at.alpha
    c_out = 0.5 * level / (level**2 + 0.25).sqrt()
    torch.testing.assert_close(
        Karras(0.5)(t, t, TrigFlow(0.5)) * c_out**2, torch.ones(3, dtype=torch.float64)
    )


def test_bad_constants_are_refused():
    for make in (
        lambda: PseudoHuber(0.0),
        lambda: PseudoHuber(-1.0),
        lambda: ElementwiseHuber(0.0),
        lambda: MinSNR(0.0),
        lambda: Karras(-0.5),
    ):
        with pytest.raises(ValueError):
            make()


def test_the_target_in_closed_form_is_the_tensor_it_stands_for():
    F, x0 = torch.randn(SHAPE), torch.randn(SHAPE)
    a, b, alpha, sigma = (torch.rand(B) for _ in range(4))
    key = NoiseKey(2, 3)
    y = ops.noising(x0, alpha, sigma, key, stream=rng.DATA)
    noised = Noised(x0, alpha, sigma, key, rng.DATA)
    G = torch.randn(SHAPE)
    for closed, tensor in (
        (noised, y),
        (Denoised(noised, G, b, a), ops.boundary(y, G, b, a)),
        (Denoised(y, G, b, a), ops.boundary(y, G, b, a)),
    ):
        one = ops.consistency_loss(F, x0, a, b, closed)[1]
        assert torch.equal(one, ops.consistency_loss(F, x0, a, b, tensor)[1])


def test_weights_by_the_signal_to_noise_ratio():
    """On the linear path SNR = ((1 - t) / t)^2: 9 at t = 1/4, 1/9 at t = 3/4."""
    t = torch.tensor([0.25, 0.75], dtype=torch.float64)
    for weight, expected in (
        (losses.snr, [9.0, 1 / 9]),
        (losses.snr_plus_one, [10.0, 10 / 9]),
        (losses.truncated_snr, [9.0, 1.0]),
        (losses.MinSNR(5.0), [5.0, 1 / 9]),
    ):
        torch.testing.assert_close(weight(t, t, Linear()), torch.tensor(expected).double())
