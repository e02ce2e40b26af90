"""Averages of the weights: decays against their definitions, and the update in float32."""

from __future__ import annotations

import math

import pytest
import torch

from fastcm.ema import EMA, CurriculumEMA, DelayedEMA, HalfLifeEMA, PowerEMA, WarmupEMA, update_
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


def test_a_warmup_by_a_power_is_that_of_its_formula():
    """1 - (1 + k / inv_gamma)^-power worked out: powers of 8, and squares of 1/2 and 1/3."""
    steps = torch.tensor([0, 7, 26, 10**9])
    cubic = WarmupEMA(0.9999, power=2 / 3)
    assert cubic.decay(steps).tolist() == pytest.approx([0.0, 3 / 4, 8 / 9, 0.9999], rel=1e-14)
    slow = WarmupEMA(0.8, inv_gamma=10.0, power=2.0, minimum=0.2)
    expected = [0.0, 0.2, 3 / 4, 0.8]  # 1 - 1.1^-2 is below 0.2, 1 - 3^-2 above 0.8
    assert slow.decay(torch.tensor([0, 1, 10, 20])).tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("start", [0, 5])
def test_a_warmup_and_a_delay_are_those_of_diffusers(start):
    """Which counts a step before it asks for its decay."""
    model = pytest.importorskip("diffusers.training_utils").EMAModel
    options = {"inv_gamma": 3.0, "power": 0.75}
    theirs = model(
        [],
        decay=0.99,
        min_decay=0.1,
        update_after_step=start,
        use_ema_warmup=True,
        **options,
    )
    ours = DelayedEMA(WarmupEMA(0.99, minimum=0.1, **options), start)
    steps = [0, 1, 4, 5, 6, 7, 20, 1000, 100_000]
    expected = [theirs.get_decay(k + 1) for k in steps]
    assert ours.decay(torch.tensor(steps)).tolist() == pytest.approx(expected, rel=1e-13)
    assert len(set(expected)) > 4


def test_a_half_life_ramps_up_with_the_images_seen():
    """EDM: 0.5^(B / min(half-life, ratio times images seen)), with 500 images of half-life."""
    average = HalfLifeEMA(images=500, batch_size=10, rampup=0.05)
    # after 20 steps 200 images, so a half-life of one batch; after 1,000 steps that of 50 batches
    found = average.decay(torch.tensor([0, 20, 40, 1000, 10**9])).tolist()
    assert found == pytest.approx([0.0, 0.5, 0.5**0.5, 0.5 ** (1 / 50), 0.5 ** (1 / 50)], rel=1e-14)
    assert found[-1] == EMA.half_life(500, 10).beta


def test_a_delayed_average_begins_with_the_weights_at_its_start():
    weights = [float(k * k) for k in range(8)]
    average = [torch.tensor([-1.0])]
    seen = []
    for k, p in enumerate(weights):
        beta = DelayedEMA(EMA(0.5), start=3).decay(torch.tensor(k))
        update_(average, [torch.tensor([p])], beta)
        seen.append(average[0].item())
    assert seen[:3] == weights[:3]
    expected = weights[2]
    for found, p in zip(seen[3:], weights[3:]):
        expected = 0.5 * (expected + p)
        assert found == expected
    k = torch.arange(20)
    shifted = DelayedEMA(PowerEMA(), 6).decay(k)
    assert torch.equal(shifted[6:], PowerEMA().decay(k[:14])) and (shifted[:6] == 0).all()


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
    for average in (
        EMA(0.9),
        EMA(0.9, warmup=True),
        PowerEMA(),
        CurriculumEMA(CMCurriculum(10)),
        WarmupEMA(),
        HalfLifeEMA(1000, 8),
        DelayedEMA(PowerEMA(), 7),
    ):
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
        lambda: WarmupEMA(1.0),
        lambda: WarmupEMA(inv_gamma=0.0),
        lambda: WarmupEMA(power=0.0),
        lambda: WarmupEMA(0.9, minimum=0.95),
        lambda: HalfLifeEMA(0, 8),
        lambda: HalfLifeEMA(100, 8, rampup=0.0),
        lambda: DelayedEMA(EMA(0.9), -1),
        lambda: PowerEMA(0.3),
    ):
        with pytest.raises(ValueError):
            make()
