"""Averages of the weights: decays against their definitions, and the update in float32."""

from __future__ import annotations

import math

import pytest
import torch

from fastcm.ema import EMA, CurriculumEMA, PowerEMA, update_
from fastcm.schedules import CMCurriculum, ICTCurriculum

STEPS = torch.tensor([0, 1, 8, 9, 90, 10_000, 10**9])


def test_a_constant_decay_is_constant_and_float64():
    beta = EMA(0.9999).decay(STEPS)
    assert beta.dtype == torch.float64
    assert beta.tolist() == [0.9999] * len(STEPS)


def test_warmup_is_the_minimum_with_one_plus_k_over_ten_plus_k():
    expected = [min(0.9, (1 + k) / (10 + k)) for k in STEPS.tolist()]
    assert EMA(0.9, warmup=True).decay(STEPS).tolist() == pytest.approx(expected, rel=1e-15)
    assert expected[0] == 0.1 and expected[-1] == 0.9


def test_half_life_halves_the_weight_of_a_step_after_so_many_images():
    beta = EMA.half_life(images=50_000, batch_size=128).beta
    assert beta ** (50_000 / 128) == pytest.approx(0.5)
    average, steps = 1.0, 0
    while average > 0.5:
        average += (1 - beta) * (0.0 - average)
        steps += 1
    assert steps == math.ceil(50_000 / 128)


def test_the_decay_of_consistency_training_follows_the_number_of_intervals():
    """mu(k) = exp(s0 ln mu0 / N), N counted before the + 1: exactly mu0 as long as N = s0."""
    curriculum = CMCurriculum(800_000)
    steps = torch.tensor([0, 1000, 400_000, 800_000])
    mu = CurriculumEMA(curriculum).decay(steps).tolist()
    for k, value in zip(steps.tolist(), mu):
        n = max(math.ceil(math.sqrt(k / 800_000 * (151**2 - 4) + 4) - 1), 1)
        assert value == pytest.approx(math.exp(2 * math.log(0.9) / n), rel=1e-14)
    assert mu[-1] == pytest.approx(0.9 ** (2 / 150))
    doubling = CurriculumEMA(ICTCurriculum(1000), mu0=0.8).decay(torch.tensor([0, 125]))
    assert doubling.tolist() == pytest.approx([0.8, math.sqrt(0.8)])


@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_power_function_exponents_of_edm2(std, gamma):
    g = PowerEMA(std).gamma
    assert g == pytest.approx(gamma, abs=5e-3)
    assert math.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3))) == pytest.approx(std, rel=1e-12)


def test_power_function_exponents_solve_the_cubic_over_the_whole_range():
    for std in (0.001, 0.01, 0.2, 0.28):
        g = PowerEMA(std).gamma
        terms = [g**3, 7 * g**2, (16 - std**-2) * g, 12 - std**-2]
        assert abs(math.fsum(terms)) <= 1e-12 * sum(map(abs, terms))
        assert g >= 0


@pytest.mark.parametrize("std", [0.05, 0.10, 0.2])
def test_the_power_average_weights_the_past_as_t_to_the_gamma(std):
    """Unroll the update over n steps: step t has weight (t / n)^gamma, of relative width std."""
    n = 4000
    average = PowerEMA(std)
    beta = average.decay(torch.arange(n))
    after = torch.cat([beta.flip(0).cumprod(0).flip(0)[1:], torch.ones(1, dtype=torch.float64)])
    profile = (1 - beta) * after
    assert profile.sum().item() == pytest.approx(1.0, abs=1e-12)
    t = (torch.arange(n, dtype=torch.float64) + 1) / n
    expected = t**average.gamma
    torch.testing.assert_close(
        profile[n // 2 :] / profile[-1], expected[n // 2 :], rtol=0.02, atol=1e-3
    )
    mean = (profile * t).sum()
    width = (profile * (t - mean).square()).sum().sqrt().item()
    assert width == pytest.approx(std, rel=0.01)


def test_the_first_power_update_copies_the_parameters():
    """However bad the initial average: beta(0) = 0."""
    average, p = [torch.full((5,), 1e30)], [torch.randn(5)]
    update_(average, p, PowerEMA().decay(torch.tensor(0)))
    assert torch.equal(average[0], p[0])


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 0.9, 0.9999, 0.999999])
def test_an_update_is_exact_to_the_last_bits_of_float32(beta):
    e, p = torch.randn(10_000), torch.randn(10_000)
    rate = torch.tensor(1.0 - beta).float().double()
    exact = e.double() + rate * (p.double() - e.double())
    got = e.clone()
    update_([got], [p], torch.tensor(beta, dtype=torch.float64))
    scale = torch.maximum(e.abs(), p.abs()).double()
    assert ((got.double() - exact).abs() <= 2 * 2.0**-24 * 2 * scale).all()


def test_the_average_of_low_precision_weights_is_not_rounded_to_their_precision():
    """1e-4 of a difference of 1 is below half an ulp of bfloat16 at 1."""
    e, p = torch.ones(3), torch.full((3,), 2.0, dtype=torch.bfloat16)
    for _ in range(100):
        update_([e], [p], torch.tensor(0.9999, dtype=torch.float64))
    assert e.dtype == torch.float32
    assert e.tolist() == pytest.approx([2 - 0.9999**100] * 3, rel=1e-5)


def test_equal_weights_stay_where_they_are_bit_for_bit():
    p = torch.randn(1000)
    e = p.clone()
    for beta in (0.1, 0.7, 0.999):
        update_([e], [p], torch.tensor(beta, dtype=torch.float64))
    assert torch.equal(e, p)


def test_an_update_writes_in_place_and_keeps_out_of_autograd():
    p = torch.nn.Parameter(torch.randn(4))
    e = p.detach().clone() + 1
    pointer = e.data_ptr()
    update_([e], [p], torch.tensor(0.5, dtype=torch.float64))
    assert e.data_ptr() == pointer and not e.requires_grad
    torch.testing.assert_close(e, p.detach() + 0.5)


def test_decays_run_on_a_device_without_reading_the_step_back():
    """On the meta device any .item() raises."""
    step = torch.zeros((), dtype=torch.int64, device="meta")
    for average in (EMA(0.9), EMA(0.9, warmup=True), PowerEMA(), CurriculumEMA(CMCurriculum(10))):
        beta = average.decay(step)
        assert beta.device.type == "meta" and beta.dtype == torch.float64 and beta.dim() == 0


def test_bad_constants_are_refused():
    for make in (
        lambda: EMA(0.0),
        lambda: EMA(1.0),
        lambda: EMA.half_life(0, 1),
        lambda: EMA.half_life(1000, 0),
        lambda: CurriculumEMA(CMCurriculum(10), mu0=1.0),
        lambda: PowerEMA(0.0),
        lambda: PowerEMA(0.3),
    ):
        with pytest.raises(ValueError):
            make()
