"""Objectives with a derivative along the trajectory: sCM and MeanFlow, and learned weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_objectives import GAUSSIAN, Net, drawn
from test_velocities import TwoTimes, exact_mean_velocity
from torch import Tensor, nn

import fastcm
from fastcm import (
    ConsistencyDistillation,
    ConsistencyTraining,
    ContinuousConsistency,
    FlowMatching,
    MeanFlow,
    losses,
    networks,
)
from fastcm.losses import AdaptiveL2, Learned, SquaredL2
from fastcm.networks import GaussianConsistency, GaussianMixture, LogVariance
from fastcm.objectives import Batch
from fastcm.objectives.consistency_training import pair_loss
from fastcm.parameterization import Parameterization
from fastcm.paths import Linear, TrigFlow
from fastcm.rng import NoiseKey

TRIG = Parameterization(TrigFlow())


def gaussian(count: int, seed: int = 5) -> Batch:
    return Batch(GAUSSIAN * torch.randn(count, 2), NoiseKey(seed))


def velocity_errors(objective: MeanFlow, batch: Batch) -> Tensor:
    """v - E[v | x_t] of each row."""
    x0, z, _ = drawn(batch)
    t, _ = objective.draw(batch)
    x = (1 - t)[:, None] * x0 + t[:, None] * z
    return z - x0 - exact_mean_velocity(x, t, t).double()


def test_mean_flow_has_its_share_of_instant_rows() -> None:
    t, s = MeanFlow(instant=0.25).draw(Batch(torch.zeros(4000, 1), NoiseKey(3)))
    instant = torch.arange(4000) % 4 < 1
    assert torch.equal(t[instant], s[instant]) and (t[~instant] > s[~instant]).all()
    assert s.min() > 0 and t.max() < 1


def test_improved_mean_flow_at_the_exact_network_leaves_the_variance_of_the_velocity() -> None:
    """There V = u + (t - s) du/dt is the mean velocity E[v | x_t] at t itself."""
    objective = MeanFlow(predicted_tangent=True, instant=0.5, metric=SquaredL2())
    batch = gaussian(64)
    loss = objective.loss(TwoTimes(), batch)
    want = velocity_errors(objective, batch).square().sum(1)
    torch.testing.assert_close(loss.per_sample.double(), want, rtol=2e-3, atol=1e-4)


def test_mean_flow_at_the_exact_network_has_the_residual_of_its_identity() -> None:
    """The rest is the velocity's error e, less (t - s) times the change of u along e."""
    objective = MeanFlow(instant=0.5, metric=SquaredL2())
    batch = gaussian(64)
    loss = objective.loss(TwoTimes(), batch)
    t, s = objective.draw(batch)
    slope = exact_mean_velocity(torch.ones(64, 1), t, s).double()  # u is linear in x
    want = (velocity_errors(objective, batch) * (1 - (t - s)[:, None] * slope)).square().sum(1)
    torch.testing.assert_close(loss.per_sample.double(), want, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("predicted", [False, True])
def test_the_gradient_of_mean_flow_points_to_the_exact_network(predicted: bool) -> None:
    """At the exact network it is 0 but for sampling, whose error is measured beside it."""
    objective = MeanFlow(predicted_tangent=predicted, instant=0.25, metric=SquaredL2())

    def slope(gain: float) -> tuple[float, float]:
        net, found = TwoTimes(), []
        net.gain.data.fill_(gain)
        for seed in range(64):
            net.gain.grad = None
            objective.loss(net, gaussian(1000, seed)).backward()
            found.append(net.gain.grad.clone())
        slopes = torch.stack(found).double()
        return slopes.mean().item(), slopes.std().item() / len(slopes) ** 0.5

    (low, low_error), (exact, error), (high, high_error) = map(slope, (0.9, 1.0, 1.1))
    assert low < -6 * low_error and high > 6 * high_error
    assert abs(exact) < 6 * error < 0.5 * high


def test_instant_rows_of_mean_flow_are_flow_matching() -> None:
    batch = gaussian(32)
    objective = MeanFlow(instant=0.75, metric=SquaredL2())
    t, _ = objective.draw(batch)
    flow = FlowMatching(times=lambda u, low, high: t)
    instant = torch.arange(32) % 4 < 3
    torch.testing.assert_close(
        objective.loss(TwoTimes(), batch).per_sample[instant],
        flow.loss(TwoTimes(), batch).per_sample[instant],
    )


def test_mean_flow_tends_to_flow_matching_as_the_step_shrinks() -> None:
    errors, x0 = [], GAUSSIAN * torch.randn(4096, 2)
    for h in (0.016, 0.008):

        class Near(MeanFlow):
            def draw(self, batch: Batch, h: float = h) -> tuple[Tensor, Tensor]:
                t, _ = super().draw(batch)
                return t, (t - h).clamp_min(0.0)

        batch = Batch(x0, NoiseKey(5))
        near = Near(instant=0.0, metric=SquaredL2()).loss(TwoTimes(), batch)
        t, _ = MeanFlow(instant=0.0).draw(batch)
        flow = FlowMatching(times=lambda u, low, high, t=t: t).loss(TwoTimes(), batch)
        difference = (near.per_sample - flow.per_sample)[t > 0.25]
        errors.append(difference.abs().mean().item())
    assert abs(math.log2(errors[0] / errors[1]) - 1) < 0.2


def test_micro_batches_of_mean_flow_have_the_rows_of_the_whole() -> None:
    objective = MeanFlow(metric=SquaredL2())
    batch = gaussian(16)
    whole = objective.loss(TwoTimes(), batch).per_sample
    half = Batch(batch.x0[8:], NoiseKey(5, 0, 8))
    torch.testing.assert_close(objective.loss(TwoTimes(), half).per_sample, whole[8:])
    with pytest.raises(ValueError, match="multiple of 4 rows, got 6"):
        objective.loss(TwoTimes(), gaussian(6))


def test_guidance_of_mean_flow_is_in_its_target() -> None:
    """With a network of known conditional and unconditional velocities and no steps."""

    class Labelled(TwoTimes):
        def forward(
            self, x: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None
        ) -> Tensor:
            assert cond is not None
            return self.gain * (x + cond[:, None])

    objective = MeanFlow(
        instant=0.75, guidance=2.0, mixing=0.5, null_condition=9, metric=SquaredL2()
    )
    batch = Batch(torch.randn(8, 2), NoiseKey(1), torch.arange(8))
    x0, z, _ = drawn(batch)
    t, _ = objective.draw(batch)
    x = (1 - t)[:, None] * x0 + t[:, None] * z
    conditional, null = x + batch.cond[:, None], x + 9
    v = 2.0 * (z - x0) + 0.5 * conditional - 1.5 * null
    want = (conditional - v).square().sum(1)
    instant = torch.arange(8) % 4 < 3
    found = objective.loss(Labelled(), batch).per_sample.double()
    torch.testing.assert_close(found[instant], want[instant], rtol=1e-5, atol=1e-5)


def test_adaptive_l2_is_the_papers_weight_of_the_sum_of_squares() -> None:
    """Not of its square: the weight is 1 / (S + c)^p with S the sum over the sample."""
    r = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    S = r.detach().square().sum((1, 2))
    for p, c in ((1.0, 0.01), (0.75, 1e-3)):
        metric = AdaptiveL2(p, c)
        torch.testing.assert_close(metric.value(r).detach(), S / (S + c) ** p)
        (gradient,) = torch.autograd.grad(metric.value(r).sum(), r)
        want = 2 * r.detach() / ((S + c) ** p)[:, None, None]
        torch.testing.assert_close(gradient, want)
        torch.testing.assert_close(metric.gradient(r.detach()), want)


def consistency(p: Parameterization = TRIG) -> GaussianConsistency:
    return GaussianConsistency(torch.zeros(2), GAUSSIAN, p)


class Exact(Net):
    """F of the exact consistency function, in float64."""

    def __init__(self, p: Parameterization = TRIG) -> None:
        super().__init__(consistency(p))


@pytest.mark.parametrize("path", [TrigFlow(), Linear()])
@pytest.mark.parametrize("normalization", ["norm", "rms", "clip"])
def test_distillation_in_continuous_time_vanishes_at_the_exact_network(
    normalization: Any, path: Any
) -> None:
    p = Parameterization(path)
    teacher = GaussianMixture(torch.zeros(1, 2), GAUSSIAN, None, p)
    objective = ContinuousConsistency(
        p, teacher, normalization=normalization, warmup=0, weight=losses.uniform
    )
    x0 = GAUSSIAN * torch.randn(64, 2, dtype=torch.float64)
    batch = Batch(x0, NoiseKey(2), input_dtype=torch.float64)
    assert objective.loss(Exact(p), batch).mean < 1e-6
    moved = Exact(p)
    moved.gain.data.fill_(0.8)
    assert objective.loss(moved, batch).mean > 1e-4


def test_its_gradient_points_to_the_exact_network() -> None:
    teacher = GaussianMixture(torch.zeros(1, 2), GAUSSIAN, None, TRIG)
    for chosen in (None, teacher):
        objective = ContinuousConsistency(teacher=chosen, warmup=0, weight=losses.uniform)
        for gain in (0.8, 1.2):
            net = Exact()
            net.gain.data.fill_(gain)
            objective.loss(net, gaussian(20_000)).backward()
            assert float(net.gain.grad) * (gain - 1.0) > 0


def spy(seen: list[tuple[Tensor, Tensor]]) -> Any:
    """A metric that keeps what it is asked to compare."""

    def metric(f: Tensor, target: Tensor) -> Tensor:
        seen.append((f.detach(), target.detach()))
        return (f - target).square().sum(1)

    return metric


def tangent_of(step: int, **options: Any) -> tuple[Tensor, Tensor]:
    """(g, t) of a smooth network, where it is not normalised: g / (|g| + c) c is g for large c."""
    seen: list[tuple[Tensor, Tensor]] = []
    weak = 1e8
    net = Net(lambda x, t, cond: torch.sin(x + t[:, None]))
    x0 = GAUSSIAN * torch.linspace(-2, 2, 512, dtype=torch.float64).reshape(256, 2)
    batch = Batch(x0, NoiseKey(2, step), z=x0.flip(0), input_dtype=torch.float64)
    objective = ContinuousConsistency(c=weak, weight=losses.uniform, metric=spy(seen), **options)
    objective.loss(net, batch)
    t = torch.autograd.forward_ad.unpack_dual(net.calls[0][1]).primal.double()
    return weak * (seen[0][1] - seen[0][0]), t


class Pairs:
    """Consistency training at given times."""

    parameterization, weight = TRIG, staticmethod(losses.uniform)

    def __init__(self, t: Tensor, s: Tensor, metric: Any) -> None:
        self.times, self.metric = (t, s), metric

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.times


def test_consistency_training_tends_to_it_as_the_step_shrinks() -> None:
    """The gradient of a squared CT step over dt is that of sCT without its normalisation."""
    g, t = tangent_of(0, warmup=0, prior="one")
    x0 = GAUSSIAN * torch.linspace(-2, 2, 512, dtype=torch.float64).reshape(256, 2)
    batch = Batch(x0, NoiseKey(2), z=x0.flip(0), input_dtype=torch.float64)
    net = Net(lambda x, t, cond: torch.sin(x + t[:, None]))
    errors = []
    for dt in (4e-3, 2e-3):
        seen: list[tuple[Tensor, Tensor]] = []
        s, inside = (t - dt).clamp_min(0.0), t > dt
        pair_loss(Pairs(t, s, spy(seen)), net, batch, net)
        ((f_t, f_s),) = seen
        # d f / d F = -sigma_data sin t; both gradients are twice this
        found = -0.5 * t.sin()[:, None] * (f_t - f_s) / dt
        errors.append((found + g)[inside].norm().item())
    assert errors[0] < 0.02 * g.norm() and abs(math.log2(errors[0] / errors[1]) - 1) < 0.15


def test_the_derivative_of_the_network_warms_up_linearly() -> None:
    at = {step: tangent_of(step, warmup=100)[0] for step in (0, 50, 100, 1000)}
    options = {"warmup": 0}
    torch.testing.assert_close(at[100], tangent_of(100, **options)[0])
    torch.testing.assert_close(at[1000], tangent_of(1000, **options)[0])
    # of one noise the times differ between steps, so the mean of the ends is taken at one step
    none, whole = tangent_of(50, warmup=10**12)[0], tangent_of(50, **options)[0]
    torch.testing.assert_close(at[50], 0.5 * (none + whole), rtol=1e-4, atol=1e-6)
    assert (whole - none).abs().max() > 0.1


def test_a_learned_log_variance_is_that_of_the_error() -> None:
    """The minimum of exp(-u) E + u is at u = ln E, on the fused way and on the general one."""
    for metric in (SquaredL2(), lambda f, target: (f - target).square().sum(1)):
        net = Net(lambda x, t, cond: torch.zeros_like(x))
        net.log_variance = LogVariance()
        objective = FlowMatching(weight=Learned(), metric=metric)
        batch = Batch(torch.randn(4096, 3), NoiseKey(1))
        plain = FlowMatching(weight=losses.uniform, metric=metric).loss(net, batch).per_sample / 3
        torch.testing.assert_close(
            objective.loss(net, batch).per_sample, plain, rtol=1e-4, atol=1e-6
        )
        optimizer = torch.optim.Adam(net.log_variance.parameters(), 0.05)
        for _ in range(150):
            optimizer.zero_grad()
            objective.loss(net, batch).backward()
            optimizer.step()
        x0, z, _ = drawn(batch)
        error = (z - x0).square().mean()
        angles = torch.linspace(0.3, 1.2, 5)
        assert (net.log_variance(angles) - error.log()).abs().max() < 0.15


def test_a_learned_weight_scales_the_gradient_of_the_network() -> None:
    net = Net()
    net.log_variance = LogVariance()
    net.log_variance.fc.bias.data.fill_(math.log(2.0))
    batch = Batch(torch.randn(8, 3), NoiseKey(1))
    gradients = []
    for weight in (losses.uniform, Learned()):
        net.zero_grad()
        FlowMatching(weight=weight).loss(net, batch).backward()
        gradients.append(net.gain.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0] / (2.0 * 3))


@pytest.mark.parametrize(
    "objective",
    [
        FlowMatching(weight=Learned()),
        ConsistencyTraining(weight=Learned()),
        ConsistencyDistillation(networks.MLP((3,), 16, 1), weight=Learned()),
        ContinuousConsistency(),
    ],
)
def test_a_learned_weight_without_a_log_variance_is_refused(objective: Any) -> None:
    net = networks.MLP((3,), width=16, depth=1)
    with pytest.raises(ValueError, match="log_variance=True"):
        fastcm.Trainer(net, objective, data=torch.randn(8, 3), batch_size=4)
    with pytest.raises(ValueError, match="log_variance=True"):
        objective.loss(net, Batch(torch.randn(8, 3), NoiseKey(0)))


def test_time_in_bfloat16_is_warned_of_by_the_name_of_the_layer() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time_embedding = nn.Linear(1, 3).bfloat16()
            self.log_variance = LogVariance()

        def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            return x + self.time_embedding(t[:, None].bfloat16()).float()

    with pytest.warns(UserWarning, match=r"time_embedding computes with time in torch\.bfloat16"):
        fastcm.Trainer(Half(), ContinuousConsistency(), data=torch.randn(8, 3), batch_size=4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeanFlow(instant=0.123), "fraction a / b"),
        (lambda: MeanFlow(instant=1.0), "fraction a / b"),
        (lambda: MeanFlow(guidance=2.0), "null_condition"),
        (lambda: MeanFlow(mixing=1.0), "mixing"),
        (lambda: MeanFlow(TRIG), "'v' on Linear"),
        (lambda: ContinuousConsistency(normalization="rows"), "normalization must be one of"),
        (lambda: ContinuousConsistency(prior="two"), "prior must be one of"),
        (lambda: ContinuousConsistency(c=0.0), "c must be > 0"),
        (lambda: ContinuousConsistency(warmup=-1), "warmup must be >= 0"),
        (lambda: ContinuousConsistency(guidance=2.0, null_condition=1), "needs a teacher"),
        (lambda: ContinuousConsistency(Parameterization(Linear(), "x0")), "prediction 'v'"),
        (lambda: AdaptiveL2(c=0.0), "c > 0"),
    ],
)
def test_bad_options_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_two_time_objective_needs_a_network_of_two_times() -> None:
    with pytest.raises(ValueError, match="two_times=True"):
        fastcm.Trainer(networks.MLP((3,), 16, 1), MeanFlow(), data=torch.randn(8, 3), batch_size=4)


@pytest.mark.parametrize(
    "objective",
    [
        MeanFlow(),
        MeanFlow(predicted_tangent=True),
        ContinuousConsistency(),
        ContinuousConsistency(Parameterization(Linear())),
        ContinuousConsistency(teacher=networks.MLP((3,), 16, 1)),
    ],
)
def test_the_loss_is_one_graph(objective: Any) -> None:
    net = networks.MLP((3,), 16, 1, two_times=True, log_variance=True)

    def loss(x0: Tensor, key: Tensor) -> Tensor:
        mean: Tensor = objective.loss(net, Batch(x0, NoiseKey.wrap(key))).mean
        return mean

    torch._dynamo.reset()
    arguments = torch.randn(8, 3), NoiseKey(1).tensor
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), loss(*arguments), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("instant", [0.75, 0.5, 0.25, 0.0])
def test_compiled_mean_flow_takes_a_network_that_views_its_times(instant: float) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, *, s: Tensor) -> Tensor:
            return self.scale * (x + t[:, None, None] * x.flip(1) - s[:, None, None] ** 2)

    net, objective = Views(), MeanFlow(instant=instant)

    def loss(x0: Tensor, key: Tensor) -> Tensor:
        mean: Tensor = objective.loss(net, Batch(x0, NoiseKey.wrap(key))).mean
        return mean

    torch._dynamo.reset()
    arguments = torch.randn(8, 3, 2), NoiseKey(1).tensor
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), loss(*arguments), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", [MeanFlow(), ContinuousConsistency(warmup=3)])
def test_a_compiled_run_is_the_eager_one_and_resumes_bit_for_bit(
    objective: Any, tmp_path: Any
) -> None:
    def trainer(compile: bool, directory: Any = None) -> fastcm.Trainer:
        torch.manual_seed(0)
        net = networks.MLP((3,), width=16, depth=1, two_times=True, log_variance=True)
        return fastcm.Trainer(
            net,
            objective,
            data=torch.linspace(-1, 1, 96).reshape(32, 3),
            batch_size=8,
            compile=compile,
            directory=directory,
            progress=False,
            log=lambda line: None,
        )

    eager, compiled = trainer(False), trainer(True)
    for step in range(4):
        a, b = float(eager.train_step()), float(compiled.train_step())
        assert abs(a - b) < 1e-3 * abs(a) + 1e-5, step
    trainer(False, tmp_path).fit(2)
    resumed = trainer(False, tmp_path).load().fit(2)
    for mine, theirs in zip(resumed.net.parameters(), eager.net.parameters(), strict=True):
        assert torch.equal(mine, theirs)
