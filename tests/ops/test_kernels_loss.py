"""The consistency loss: value and gradient against float64 autograd through the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import tolerances
import torch
from torch import Tensor

from fastcm import losses, rng
from fastcm.kernels import consistency_loss, launch
from fastcm.kernels.consistency_loss import launch_consistency_loss, loss_scratch_size
from fastcm.kernels.launch import LaunchConfig
from fastcm.kernels.noising import State
from fastcm.ops import reference
from fastcm.ops.reference import Denoised, Noised

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
C = 0.03
METRICS = {
    consistency_loss.SQUARED_L2: losses.SquaredL2(),
    consistency_loss.L2: losses.L2(),
    consistency_loss.L1: losses.L1(),
    consistency_loss.PSEUDO_HUBER: losses.PseudoHuber(C),
}
FORMS = [
    "x tensor, target tensor",
    "x noised, target tensor",
    "x noised, target noised alike",
    "x noised, target noised otherwise",
    "x noised, target mapped tensor",
    "x noised, target mapped noised alike",
    "x tensor, target mapped noised otherwise",
]
TWO_LAUNCHES = LaunchConfig(256, num_warps=1, STEPS=2)


@dataclass
class Problem:
    """One loss, as the reference and the kernels take it."""

    F: Tensor
    x: Tensor | Noised
    a: Tensor
    b: Tensor
    target: Tensor | Noised | Denoised
    weight: Tensor | None
    metric: int = consistency_loss.PSEUDO_HUBER

    @classmethod
    def draw(cls, form: str, B: int, D: int, dtype: torch.dtype, device: torch.device) -> Problem:
        alpha, sigma, alpha_s, sigma_s, a, b, target_a, target_b, weight = (
            torch.rand(9, B, device=device) + 0.5
        )
        key = rng.NoiseKey(2**40, 2**33 + 5, 2**32 - 2, device=device)
        x0, tensor, F, target_F = torch.randn(4, B, D, device=device)
        F, target_F = F.to(dtype), target_F.to(dtype)
        student, teacher = form.split(", ")
        x = Noised(x0, alpha, sigma, key, 4, 3) if student == "x noised" else tensor
        target = x0 + 0.1
        if "alike" in teacher:
            target = Noised(x0, alpha_s, sigma_s, key, 4, 3)
        elif "otherwise" in teacher:
            pixels = torch.randint(0, 256, (B, D), dtype=torch.uint8, device=device)
            target = Noised(pixels, alpha_s, sigma_s, key, 5, 3)
        if "mapped" in teacher:
            target = Denoised(target, target_F, target_a, target_b)
        return cls(F, x, a, b, target, weight)

    def solve(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The reference's values and gradient, with arithmetic in `dtype`."""
        F, x, target = self.F, self.x, self.target
        if dtype == torch.float64:
            F = F.double()
            x = x.double() if isinstance(x, Tensor) else x
            if isinstance(target, Denoised):
                target = replace(target, F=target.F.double())
        F = F.detach().requires_grad_()
        metric = METRICS[self.metric]
        _, values = reference.consistency_loss(
            F, x, self.a, self.b, target, metric=metric, weight=self.weight
        )
        if values.numel() and F.numel():
            values.sum().backward()
        return values.detach(), torch.zeros_like(F) if F.grad is None else F.grad

    def launch(self, config: LaunchConfig | None = None, two: bool = False, **kwargs):
        """The kernels' values and gradient."""

        def state(x: Tensor | Noised) -> State:
            if isinstance(x, Tensor):
                return State(x)
            return State(x.x0, x.alpha, x.sigma, x.key.tensor, x.stream, x.first_sample)

        mapped = isinstance(self.target, Denoised)
        maps = (self.target.F, self.target.a, self.target.b) if mapped else (None, None, None)
        B, D = self.F.shape
        loss, grad = self.F.new_empty(B, dtype=torch.float32), torch.empty_like(self.F)
        size = loss_scratch_size(B, D)
        if two:
            size = B * launch.chunks(D, config)
        launch_consistency_loss(
            self.F, state(self.x), self.a, self.b,
            state(self.target.x if mapped else self.target), *maps, self.weight, loss, grad,
            metric=self.metric, c=C, config=config,
            scratch=self.F.new_empty(size, dtype=torch.float32) if size else None, **kwargs,
        )  # fmt: skip
        return loss, grad

    def check(self, **kwargs) -> None:
        loss, grad = self.launch(**kwargs)
        (exact, exact_grad), (plain, plain_grad) = (
            self.solve(dtype) for dtype in (torch.float64, torch.float32)
        )
        D = self.F.shape[1]
        # what 4e-6 in every normal of x and target can do to a sum of D residuals
        slack = 1e-5 * exact.abs() + 1e-5 * D**0.5
        tolerances.assert_close(loss, exact, plain, slack)
        scale = max(exact_grad.abs().max().item(), 1e-3) if exact_grad.numel() else 0.0
        assert grad.dtype == self.F.dtype
        if self.metric == consistency_loss.L1:
            # the sign of a residual below the accuracy of its operands is free
            different = (grad.double() - exact_grad).abs() > 2 * tolerances.BF16_ULP * scale
            assert different.sum() <= max(1, 1e-3 * different.numel())
        else:
            tolerances.assert_close(grad, exact_grad, plain_grad, 2e-5 * max(scale, 1.0))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("form", FORMS)
def test_every_metric_and_target_form_agrees_with_float64_autograd(form, metric, device):
    problem = Problem.draw(form, 2, 1000, torch.float32, device)
    problem.metric = metric
    problem.check()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("form", FORMS)
def test_two_launches_agree_with_float64_autograd(form, metric, device):
    problem = Problem.draw(form, 2, 600, torch.float32, device)
    problem.metric = metric
    problem.check(config=TWO_LAUNCHES, two=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("B", "D"), [(0, 8), (3, 1), (1, 3), (3, 1023), (1, 1024), (1, 3072), (1, 4097)]
)
def test_every_dtype_and_shape_agrees_with_float64_autograd(B, D, dtype, device):
    Problem.draw("x noised, target mapped noised alike", B, D, dtype, device).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("B", "D"), [(1, 8192), (1, 8192 + 7), (1, 16384), (17, 16384), (1, 16391)]
)
def test_samples_around_the_limits_of_one_launch_agree(B, D, dtype, device):
    assert (loss_scratch_size(B, D) == 0) == (D == 8192 or B == 17)
    Problem.draw("x noised, target mapped noised alike", B, D, dtype, device).check()


# samples, elements: elements and warps of a program, programs of a sample
PROGRAMS = {
    (8, 3072): (2048 + 1024, 4, 1),
    (64, 3072): (2048 + 1024, 4, 1),
    (512, 3072): (2048 + 1024, 4, 1),
    (8, 16384): (1024, 2, 16),
    (16, 16384): (2048, 4, 8),
    (17, 16384): (8192 + 8192, 16, 1),
    (64, 16384): (8192 + 8192, 16, 1),
    (512, 16384): (8192 + 8192, 16, 1),
    (1, 65536): (1024, 2, 64),
    (8, 65536): (4096, 8, 16),
    (512, 65536): (4096, 8, 16),
}


@pytest.mark.parametrize(("B", "D"), PROGRAMS)
def test_large_samples_of_small_batches_are_spread_over_many_programs(B, D):
    launches = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **form: launches.append((grid, form))

    F, x, target, grad = torch.empty(4, B, D, device="meta")
    a, b, loss = torch.empty(3, B, device="meta")
    size = loss_scratch_size(B, D)
    launch_consistency_loss(
        F, x, a, b, target, None, None, None, None, loss, grad,
        metric=consistency_loss.SQUARED_L2,
        scratch=torch.empty(size, device="meta") if size else None,
        kernel=Recorder(), partial_kernel=Recorder(), finish_kernel=Recorder(),
    )  # fmt: skip
    elements, warps, programs = PROGRAMS[B, D]
    assert len(launches) == (1 if programs == 1 else 2)
    for grid, form in launches:
        assert grid == (B * programs,)
        assert form["BLOCK"] + form.get("TAIL", 0) == elements
        assert form["num_warps"] == warps


def test_the_order_of_a_sum_does_not_depend_on_the_machine(monkeypatch):
    """Nothing that chooses a configuration asks how many multiprocessors there are."""
    forbidden = lambda *args: pytest.fail("asked the device")  # noqa: E731
    for name in ("get_device_properties", "get_device_capability", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, forbidden)
    for B, D in PROGRAMS:
        assert loss_scratch_size(B, D) == B * PROGRAMS[B, D][2] * (PROGRAMS[B, D][2] > 1)


def test_noise_is_shared_only_between_versions_of_one_sample_under_one_noise(device):
    x0, alpha, sigma, other = torch.zeros(4, 2, device=device)
    key = rng.NoiseKey(1, device=device).tensor
    x = State(x0, alpha, sigma, key, 1, 2)
    assert x.same_noise(State(x0, sigma, alpha, key, 1, 2))
    for change in (
        {"x": other}, {"key": key.clone()}, {"stream": 2}, {"first_sample": 0},
        {"alpha": None, "sigma": None},
    ):  # fmt: skip
        assert not x.same_noise(replace(x, **change))
        assert not replace(x, **change).same_noise(x)


def test_one_and_two_launches_give_the_same_loss(device):
    problem = Problem.draw(FORMS[5], 3, 1000, torch.float32, device)
    (loss, grad), (loss2, grad2) = problem.launch(), problem.launch(TWO_LAUNCHES, two=True)
    assert torch.allclose(loss, loss2, rtol=1e-6, atol=0)
    assert torch.allclose(grad, grad2, rtol=1e-5, atol=0)


def test_the_loss_of_a_sample_does_not_depend_on_its_batch(device):
    problem = Problem.draw(FORMS[1], 3, 1000, torch.float32, device)
    loss, grad = problem.launch()
    x = problem.x
    last = Problem(
        problem.F[2:],
        Noised(x.x0[2:], x.alpha[2:], x.sigma[2:], x.key, x.stream, x.first_sample + 2),
        problem.a[2:],
        problem.b[2:],
        problem.target[2:],
        problem.weight[2:],
    )
    for whole, alone in zip((loss, grad), last.launch()):
        assert torch.equal(whole[2:], alone)


def test_an_empty_sample_has_no_loss(device):
    loss, _ = Problem.draw(FORMS[0], 3, 0, torch.float32, device).launch()
    assert torch.equal(loss, torch.zeros(3, device=device))


def test_no_weight_is_a_weight_of_one(device):
    problem = Problem.draw(FORMS[5], 2, 100, torch.float32, device)
    free = replace(problem, weight=None).launch()
    one = replace(problem, weight=torch.ones(2, device=device)).launch()
    assert all(torch.equal(first, second) for first, second in zip(free, one))
    replace(problem, weight=None).check()
    replace(problem, weight=None).check(config=TWO_LAUNCHES, two=True)


def test_the_gradient_may_be_float32_for_a_bfloat16_network(device):
    problem = Problem.draw(FORMS[0], 2, 1000, torch.bfloat16, device)
    loss, grad = torch.empty(2, device=device), torch.empty(2, 1000, device=device)
    launch_consistency_loss(
        problem.F, problem.x, problem.a, problem.b, problem.target, None, None, None, None,
        loss, grad, metric=consistency_loss.SQUARED_L2,
    )  # fmt: skip
    a, b = problem.a.double()[:, None], problem.b.double()[:, None]
    exact = 2 * b * (a * problem.x.double() + b * problem.F.double() - problem.target.double())
    assert (grad - exact).abs().max() <= 2e-6 * exact.abs().max()


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_a_zero_residual_has_zero_loss_and_zero_gradient(metric, two, device):
    problem = Problem.draw("x noised, target mapped noised alike", 2, 600, torch.float32, device)
    problem.target = Denoised(problem.x, problem.F, problem.a, problem.b)
    problem.metric = metric
    loss, grad = problem.launch(TWO_LAUNCHES, two=True) if two else problem.launch()
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("metric", METRICS)
def test_a_nan_in_the_network_output_is_not_hidden(metric, device):
    problem = Problem.draw(FORMS[5], 2, 300, torch.float32, device)
    problem.metric = metric
    problem.F[0, 299] = float("nan")
    loss, grad = problem.launch()
    assert loss[0].isnan() and grad[0, 299].isnan()
    assert loss[1].isfinite() and grad[1].isfinite().all()


def test_views_at_any_offset_give_the_same_values_and_nothing_outside(device):
    problem = Problem.draw(FORMS[0], 2, 33, torch.float32, device)
    loss, expected = problem.launch()
    for offset in range(41):
        F, x, target = (
            torch.cat((t.new_zeros(offset), t.flatten()))[offset:].view(2, 33)
            for t in (problem.F, problem.x, problem.target)
        )
        memory = torch.full((160,), 7.0, device=device)
        grad, value = memory[offset : offset + 66].view(2, 33), torch.empty_like(loss)
        launch_consistency_loss(
            F, x, problem.a, problem.b, target, None, None, None, problem.weight, value, grad,
            metric=problem.metric, c=C,
        )  # fmt: skip
        assert torch.equal(grad, expected) and torch.equal(value, loss)
        assert (memory[:offset] == 7).all() and (memory[offset + 66 :] == 7).all()


def test_neighbouring_times_need_and_get_a_float32_state(device):
    """At t - s = 1/1280 the residual is a thousandth of its operands; the networks see bfloat16."""
    B, D, t, s = 2, 1000, 0.6, 0.6 - 1 / 1280
    key = rng.NoiseKey(3, device=device)
    x0 = torch.randn(B, D, device=device)
    ones = torch.ones(B, device=device)
    x_t = Noised(x0, (1 - t) * ones, t * ones, key)
    x_s = Noised(x0, (1 - s) * ones, s * ones, key)
    velocity = reference.noise(x0.shape, key, stream=rng.NOISE) - x0
    F = (0.5 * velocity).bfloat16()
    metric = consistency_loss.SQUARED_L2
    problem = Problem(F, x_t, ones, -t * ones, Denoised(x_s, F, ones, -s * ones), None, metric)
    exact = problem.solve(torch.float64)[0]
    regenerated, _ = problem.launch()
    stored = replace(problem, x=reference.regenerate(x_t, torch.float32)).launch()[0]
    rounded = replace(problem, x=reference.regenerate(x_t, torch.bfloat16).float()).launch()[0]
    assert ((regenerated - exact) / exact).abs().max() < 1e-3
    assert ((stored - exact) / exact).abs().max() < 1e-3
    assert ((rounded - exact) / exact).abs().min() > 1


@pytest.mark.gpu
def test_the_bits_repeat_on_a_gpu():
    for B, D in ((8, 3072), (8, 16384), (64, 16384), (8, 200_000)):
        problem = Problem.draw(FORMS[5], B, D, torch.bfloat16, torch.device("cuda"))
        first = problem.launch()
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(first, problem.launch()))
