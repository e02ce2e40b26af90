"""Training methods on networks simple enough to work the loss out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastcm import losses, ops, rng
from fastcm.losses import L2, SquaredL2
from fastcm.objectives import Batch, ConsistencyDistillation, ConsistencyTraining, FlowMatching
from fastcm.parameterization import Parameterization
from fastcm.paths import Linear, TrigFlow, VarianceExploding, VariancePreserving
from fastcm.rng import NoiseKey
from fastcm.schedules import CMCurriculum, KarrasGrid, LogNormal, UniformTime


class Net(nn.Module):
    """F = function(x, t, cond) with one parameter on top, and a record of every call."""

    def __init__(self, function=lambda x, t, cond: 0.5 * x + t[:, None]) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.function = function
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        self.calls.append((x, t, cond))
        return self.gain * self.function(x, t, cond)


def zero(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
    return torch.zeros_like(x)


def drawn(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The data, the noise and the uniforms of the times of a batch, in float64."""
    x0, first = batch.x0.double(), batch.first_sample
    z = ops.noise(x0.shape, batch.key, stream=rng.NOISE, first_sample=first, dtype=torch.float64)
    return x0, z, rng.uniform(len(x0), batch.key, stream=rng.TIME, first_sample=first)


def test_flow_matching_is_the_weighted_squared_error_of_the_velocity():
    batch = Batch(torch.randn(8, 5), NoiseKey(3, 9), first_sample=100)
    objective = FlowMatching(times=UniformTime(), weight=losses.inverse_square)
    loss = objective.loss(Net(), batch)
    x0, z, t = drawn(batch)
    for i in range(8):
        x_t = (1 - t[i]) * x0[i] + t[i] * z[i]
        v = 0.5 * x_t + t[i]
        expected = (v - (z[i] - x0[i])).square().sum() / t[i] ** 2
        assert loss.per_sample[i].item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss.mean.item() == pytest.approx(loss.per_sample.mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    "p",
    [
        Parameterization(VarianceExploding(), "edm"),
        Parameterization(VariancePreserving(), "eps"),
        Parameterization(VariancePreserving(), "v"),
        Parameterization(TrigFlow(), "v"),
        Parameterization(Linear(), "x0"),
    ],
    ids=str,
)
def test_flow_matching_has_no_loss_where_the_network_knows_the_target(p):
    """Given c_in x_t and c_noise(t), as the preconditioning says."""
    batch = Batch(torch.randn(6, 4), NoiseKey(1))
    objective = FlowMatching(p, times=UniformTime())
    x0, z, u = drawn(batch)
    t = p.path.t_min + u * (p.path.t_max - p.path.t_min)
    P, Q = (c[:, None] for c in p.target(t))
    net = Net(lambda x, t, cond: (P * x0 + Q * z).float())
    assert objective.loss(net, batch).mean.item() < 1e-9
    at, c_in = p.path.at(t), p.c_in(t)
    x_t = at.alpha[:, None] * x0 + at.sigma[:, None] * z
    x_t = x_t if c_in is None else c_in[:, None] * x_t
    torch.testing.assert_close(net.calls[0][0].double(), x_t, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net.calls[0][1], p.c_noise(t))


@pytest.mark.parametrize("path", [Linear(), TrigFlow(), VariancePreserving()], ids=str)
def test_with_one_interval_the_target_is_the_data_exactly(path):
    seen = []

    def spy(f: Tensor, target: Tensor) -> Tensor:
        seen.append(target)
        return (f - target).flatten(1).square().sum(1)

    batch = Batch(torch.randn(4, 3), NoiseKey(2))
    objective = ConsistencyTraining(Parameterization(path), discretization=1, metric=spy)
    loss = objective.loss(Net(), batch, Net(lambda x, t, cond: 1e3 * x))
    assert torch.equal(seen[0], batch.x0)
    assert torch.isfinite(loss.mean)


def test_consistency_training_compares_neighbouring_times_of_one_noise():
    """n = 5 on the linear path: |f(x_t, t) - f_target(x_s, s)|^2 / (t - s)."""
    batch = Batch(torch.randn(16, 3), NoiseKey(4, 5), first_sample=7)
    target = Net(lambda x, t, cond: x * t[:, None])
    loss = ConsistencyTraining(discretization=5, metric=SquaredL2()).loss(Net(), batch, target)
    x0, z, u = drawn(batch)
    for i in range(16):
        t = (math.floor(5 * u[i].item()) + 1) / 5
        s = t - 0.2
        x_t, x_s = (1 - t) * x0[i] + t * z[i], (1 - s) * x0[i] + s * z[i]
        residual = x_t - t * (0.5 * x_t + t) - (x_s - s * (x_s * s))
        expected = residual.square().sum().item() / 0.2
        assert loss.per_sample[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_curriculum_is_read_at_the_step_of_the_key():
    objective = ConsistencyTraining(discretization=CMCurriculum(100, s0=2, s1=10))
    for step, n in ((0, 1), (100, 10)):
        net = Net()
        objective.loss(net, Batch(torch.randn(64, 2), NoiseKey(0, step)), Net())
        k = net.calls[0][1].double() * n
        torch.testing.assert_close(k, k.round(), rtol=0, atol=1e-6)
        assert set(k.round().tolist()) == set(range(1, n + 1))


def point_mass(p: Parameterization, c: float) -> Net:
    """The network whose denoiser is c everywhere."""

    def function(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        path = p.path
        t = path.time_of(t.double()).clamp(path.t_min, path.t_max)
        c_in = p.c_in(t)
        x = x.double() if c_in is None else x.double() / c_in[:, None]
        a, b, _, _ = (k[:, None] for k in p.coefficients(t))
        return torch.where(b.abs() < 1e-6, 0.0, (c - a * x) / b).float()

    return Net(function)


@pytest.mark.parametrize("path", [Linear(), TrigFlow()], ids=str)
def test_the_perfect_consistency_function_of_a_point_has_no_loss(path):
    p, c = Parameterization(path), 0.75
    batch = Batch(torch.full((256, 4), c), NoiseKey(6))
    objective = ConsistencyTraining(p, discretization=20, metric=SquaredL2())
    assert objective.loss(point_mass(p, c), batch, point_mass(p, c)).per_sample.max() < 1e-8
    wrong = objective.loss(point_mass(p, 0.0), batch, point_mass(p, 0.0)).per_sample
    assert wrong.max() > 1  # the rows with s = 0 see the data


GAUSSIAN = 0.6
"""Standard deviation of Gaussian data, whose flow and its solution have closed forms."""


def flow(x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
    t = t.double()[:, None]
    variance = ((1 - t) * GAUSSIAN) ** 2 + t**2
    return ((t - (1 - t) * GAUSSIAN**2) / variance * x).float()


def solution(x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
    """F of f(x, t) = x s / sqrt((1-t)^2 s^2 + t^2), the end of the trajectory through x."""
    t = t.double()[:, None]
    scale = GAUSSIAN / (((1 - t) * GAUSSIAN) ** 2 + t**2).sqrt()
    return torch.where(t > 0, (1 - scale) / t * x, 0.0).float()


def test_distilling_an_exact_teacher_leaves_only_the_error_of_an_euler_step():
    """Second order in the step, so a quarter at twice the intervals."""
    x0 = GAUSSIAN * torch.randn(4000, 2)
    error = []
    for n in (20, 40):
        objective = ConsistencyDistillation(
            Net(flow), discretization=n, metric=L2(), weight=losses.uniform
        )
        batch = Batch(x0, NoiseKey(8))
        error.append(objective.loss(Net(solution), batch, Net(solution)).mean.item())
    assert error[0] < 0.01
    assert 3.4 < error[0] / error[1] < 4.6
    # an untrained student is far from it
    assert objective.loss(Net(zero), batch, Net(solution)).mean.item() > 100 * error[1]


@pytest.mark.parametrize("w", [0.0, 1.0, 3.5])
def test_guidance_is_one_batched_teacher_call_and_its_formula(w):
    """Student and target output 0, so f = x and the residual is (t - s) v."""
    teacher = Net(lambda x, t, cond: cond[:, None].expand_as(x))
    objective = ConsistencyDistillation(
        teacher,
        guidance=w,
        null_condition=-2.0,
        metric=SquaredL2(),
        weight=lambda t, s, path: 1 / (t - s) ** 2,
    )
    cond = torch.randn(6)
    batch = Batch(torch.randn(6, 3), NoiseKey(1), cond)
    loss = objective.loss(Net(zero), batch, Net(zero))
    (call,) = teacher.calls
    assert call[0].shape == (12, 3)
    assert torch.equal(call[0][:6], call[0][6:]) and torch.equal(call[1][:6], call[1][6:])
    assert call[2].tolist() == [*cond.tolist(), *[-2.0] * 6]
    expected = 3 * (-2.0 + w * (cond + 2.0)).square()
    torch.testing.assert_close(loss.per_sample, expected, rtol=1e-3, atol=1e-3)


def test_the_weight_sees_both_times_and_multiplies_the_metric():
    seen = []

    def weight(t: Tensor, s: Tensor, path) -> Tensor:
        seen.append((t, s, path))
        return 7 * t

    batch = Batch(torch.randn(32, 3), NoiseKey(2))
    for make in (ConsistencyTraining, lambda **k: ConsistencyDistillation(Net(), **k)):
        weighted = make(weight=weight, discretization=8).loss(Net(), batch, Net())
        plain = make(weight=losses.uniform, discretization=8).loss(Net(), batch, Net())
        t, s, path = seen[-1]
        assert path == Linear() and torch.allclose(t - s, torch.full_like(t, 1 / 8))
        torch.testing.assert_close(weighted.per_sample, (7 * t).float() * plain.per_sample)


def test_only_the_student_learns():
    student, target, teacher = Net(), Net(), Net().train()
    distillation = ConsistencyDistillation(teacher)
    assert not teacher.training and not teacher.gain.requires_grad
    batch = Batch(torch.randn(8, 3), NoiseKey(1))
    for objective in (ConsistencyTraining(), distillation):
        student.gain.grad = None
        objective.loss(student, batch, target).mean.backward()
        assert student.gain.grad.abs() > 0
        assert target.gain.grad is None and teacher.gain.grad is None


def test_logarithmic_times_stay_finite_down_to_t_min():
    p = Parameterization(VarianceExploding())
    for n, sampler in ((1, None), (18, None), (18, LogNormal())):
        settings = {"discretization": n, "grid": KarrasGrid(), "times": sampler}
        for objective in (
            ConsistencyTraining(p, **settings),
            ConsistencyDistillation(Net(), p, **settings),
        ):
            student, target = Net(), Net()
            loss = objective.loss(student, Batch(torch.randn(200, 2), NoiseKey(n)), target)
            loss.mean.backward()
            assert torch.isfinite(loss.per_sample).all() and torch.isfinite(student.gain.grad)
            assert target.calls[0][1].min().item() == pytest.approx(250 * math.log(0.002))
            for net in (student, target):
                assert torch.isfinite(net.calls[0][0]).all()


def test_condition_dropout_replaces_its_share_of_rows():
    objective = FlowMatching(condition_dropout=0.2, null_condition=10)
    cond = torch.randint(10, (5000,))
    net = Net(zero)
    objective.loss(net, Batch(torch.zeros(5000, 2), NoiseKey(3), cond))
    dropped = net.calls[0][2] == 10
    assert torch.equal(net.calls[0][2][~dropped], cond[~dropped])
    assert abs(dropped.double().mean() - 0.2) < 6 * math.sqrt(0.2 * 0.8 / 5000)
    # it has nothing to do with the times
    t = net.calls[0][1].double()
    assert abs(t[dropped].mean() - t[~dropped].mean()) < 6 * t.std() * math.sqrt(
        1 / 1000 + 1 / 4000
    )


def test_an_output_of_another_shape_is_refused():
    batch, bad = Batch(torch.randn(8, 3), NoiseKey(1)), Net(lambda x, t, cond: x[:, :1])
    with pytest.raises(ValueError, match="net must return"):
        FlowMatching().loss(bad, batch)
    with pytest.raises(ValueError, match="net must return"):
        ConsistencyTraining().loss(bad, batch, Net())
    with pytest.raises(ValueError, match="target"):
        ConsistencyTraining().loss(Net(), batch, bad)
    with pytest.raises(ValueError, match="teacher must return"):
        ConsistencyDistillation(bad).loss(Net(), batch, Net())


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="cm"):
        FlowMatching(Parameterization(VarianceExploding()))
    with pytest.raises(ValueError, match="null_condition"):
        FlowMatching(condition_dropout=0.1)
    with pytest.raises(ValueError, match="condition_dropout"):
        FlowMatching(condition_dropout=1.0, null_condition=0)
    with pytest.raises(ValueError, match="discretization"):
        ConsistencyTraining(discretization=0)
    with pytest.raises(ValueError, match="null_condition"):
        ConsistencyDistillation(Net(), guidance=2.0)
    with pytest.raises(TypeError, match="teacher"):
        ConsistencyDistillation(lambda x, t, cond: x)


def test_a_velocity_error_is_a_denoiser_error_over_t_squared():
    """Seed eq. 1 and 2: the same network, once told as v = (x - f) / t and once as f."""
    batch = Batch(torch.randn(64, 3), NoiseKey(7))

    def denoiser(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return (0.3 * x).sin() + t[:, None]

    def velocity(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return (x - denoiser(x, t, cond)) / t[:, None]

    as_v = FlowMatching(Parameterization(Linear(), "v")).loss(Net(velocity), batch)
    as_x0 = FlowMatching(Parameterization(Linear(), "x0"), weight=losses.inverse_square)
    found = as_x0.loss(Net(denoiser), batch)
    torch.testing.assert_close(as_v.per_sample, found.per_sample, rtol=1e-3, atol=1e-4)
    plain = FlowMatching(Parameterization(Linear(), "x0")).loss(Net(denoiser), batch)
    assert not torch.allclose(as_v.per_sample, plain.per_sample, rtol=0.1)
