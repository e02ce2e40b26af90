"""The discrete family: targets, times and weights of each method against its paper's formulas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_objectives import GAUSSIAN, Net, flow, solution
from torch import Tensor

import fastcm
from fastcm import (
    ConsistencyDistillation,
    ConsistencyFlowMatching,
    ConsistencyTraining,
    EasyConsistency,
    LastPhase,
    Shortcut,
    Stepwise,
    losses,
    ops,
    rng,
)
from fastcm.losses import L2, SquaredL2
from fastcm.networks import MLP, GaussianMixture
from fastcm.objectives import Batch
from fastcm.parameterization import Parameterization
from fastcm.paths import Linear, TrigFlow, VarianceExploding, VariancePreserving
from fastcm.rng import NoiseKey
from fastcm.runs import checkpoint
from fastcm.schedules import ICTCurriculum, KarrasGrid, LogNormal, UniformGrid, draw_interval


def spy(seen: list[Tensor]) -> Any:
    def metric(f: Tensor, target: Tensor) -> Tensor:
        seen.append(target)
        return (f - target).flatten(1).square().sum(1)

    return metric


def small(**options: Any) -> MLP:
    torch.manual_seed(0)
    return MLP(shape=(3,), width=16, depth=1, **options)


# --- stepwise


def test_a_phase_has_one_time_and_the_first_ones_target_is_the_data() -> None:
    for step, k in ((0, 1), (9, 1), (10, 2), (39, 4), (1000, 4)):
        net, seen = Net(), []
        objective = Stepwise(steps_per_phase=10, phases=4, metric=spy(seen))
        batch = Batch(torch.randn(6, 3), NoiseKey(0, step))
        loss = objective.loss(net, batch, Net(lambda x, t, cond: 2.0 * x))
        assert net.calls[0][1].tolist() == [k / 4] * 6
        if k == 1:
            assert torch.equal(seen[0], batch.x0)
        else:
            s = (k - 1) / 4
            z = ops.noise((6, 3), batch.key, stream=rng.NOISE)
            x_s = (1 - s) * batch.x0 + s * z
            torch.testing.assert_close(seen[0], x_s - s * 2.0 * x_s)
        assert loss.mean.isfinite()


def test_the_target_is_the_network_at_the_end_of_the_last_phase(tmp_path: Path) -> None:
    t = fastcm.Trainer(
        small(),
        Stepwise(steps_per_phase=3, phases=2),
        data=torch.randn(32, 3),
        batch_size=8,
        compile=False,
        progress=False,
        directory=tmp_path,
        keep=1,
        keep_every=3,
        averages=(),
    )
    frozen = {k: v.clone() for k, v in t.net.state_dict().items()}
    for step in range(1, 8):
        t.fit(1)
        if step % 3 == 0:
            frozen = {k: v.clone() for k, v in t.net.state_dict().items()}
        for name, value in t.ema_network(0).state_dict().items():
            torch.testing.assert_close(value, frozen[name], rtol=1e-6, atol=1e-7)
    kept = [path.name for path in checkpoint.list_checkpoints(tmp_path)]
    assert {"step_000000003", "step_000000006"} <= set(kept)  # every theta_k


def test_phases_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="phases must be >= 1, got 0"):
        Stepwise(10, phases=0)
    with pytest.raises(ValueError, match="steps_per_phase must be >= 1, got 0"):
        Stepwise(0)
    with pytest.raises(ValueError, match="LastPhase steps must be >= 1"):
        LastPhase(0)


# --- iCT


def test_improved_training_has_the_settings_of_its_paper() -> None:
    objective = ConsistencyTraining.improved(8000)
    assert objective.target_average is None and objective.shares_weights
    assert objective.discretization == ICTCurriculum(8000, 10, 1280)
    assert objective.times == LogNormal(-1.1, 2.0) and objective.grid == KarrasGrid()
    assert objective.weight is losses.inverse_gap
    assert objective.metric == losses.PseudoHuber()
    # N(k) of eq. 10 doubles every K / (log2(1280 / 10) + 1) = 1,000 steps
    points = [objective.discretization.points(torch.tensor(k)).item() for k in (0, 999, 1000, 7999)]
    assert points == [11, 11, 21, 1281]
    linear = ConsistencyTraining.improved(8, path=Linear(), metric=L2())
    assert linear.grid == UniformGrid() and linear.metric == L2()


# --- ECT


def test_the_second_time_of_ect_is_that_of_its_paper() -> None:
    """r = t (1 - (1 + 8 sigmoid(-t)) / q^(stage + 1)), at least 0, worked out by hand."""
    objective = EasyConsistency(double_every=10)
    level = torch.tensor([1.0, 10.0], dtype=torch.float64)
    # sigmoid(-1) = 0.2689414, sigmoid(-10) = 4.539787e-5
    for step, expected in ((0, [0.0, 4.9981841]), (20, [0.6060586, 8.7495460])):
        found = objective.second_level(level, torch.tensor(step))
        torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-6, atol=1e-9)
    fast = EasyConsistency(q=256.0, stages=1)  # the one-hour recipe
    for step in (0, 10**6):
        found = fast.second_level(level, torch.tensor(step))[0].item()
        assert found == pytest.approx(1 - 3.1515314 / 256, rel=1e-7)


@pytest.mark.parametrize("path", [Linear(), TrigFlow(), VarianceExploding()], ids=str)
def test_ect_draws_lognormal_levels_and_begins_at_the_data(path: Any) -> None:
    seen: list[Tensor] = []
    objective = EasyConsistency(Parameterization(path), metric=spy(seen))
    net, batch = Net(), Batch(torch.randn(20_000, 2), NoiseKey(0))
    loss = objective.loss(net, batch)
    t = path.time_of(net.calls[-1][1].double())
    at = path.at(t.clamp(path.t_min, path.t_max))
    level = (at.sigma / at.alpha).log()
    assert abs(level.median().item() + 1.1) < 0.06
    assert abs(level.quantile(0.8413).item() - 0.9) < 0.12  # one standard deviation, 2, above
    low = level < math.log(0.5)  # there r = 0 in the first stage
    torch.testing.assert_close(seen[0][low], batch.x0[low], rtol=0, atol=0.02)
    assert loss.per_sample.isfinite().all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"q": 1.0}, "q must be > 1, got 1.0"),
        ({"stages": 0}, "stages must be >= 1"),
        ({"k": -1.0}, "k >= 0"),
    ],
)
def test_settings_of_ect_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EasyConsistency(**options)


# --- distillation


@pytest.mark.parametrize(("solver", "order"), [("euler", 2), ("ddim", 2), ("heun", 3)])
def test_the_error_of_a_teachers_step_has_the_order_of_its_solver(solver: Any, order: int) -> None:
    x0, error = GAUSSIAN * torch.randn(4000, 2), []
    for n in (10, 20):
        objective = ConsistencyDistillation(
            Net(flow), discretization=n, metric=L2(), weight=losses.uniform, solver=solver
        )
        batch = Batch(x0, NoiseKey(8))
        error.append(objective.loss(Net(solution), batch, Net(solution)).mean.item())
    assert 0.85 * 2**order < error[0] / error[1] < 1.2 * 2**order


def test_ddim_is_exact_for_a_teacher_whose_denoiser_does_not_move() -> None:
    """On VariancePreserving Euler in t is off, which LCM's teachers would pay with 1 % of loss."""
    p = Parameterization(VariancePreserving(), "eps")
    point = GaussianMixture(torch.full((1, 2), 0.7), 1e-3, parameterization=p)
    batch, found = Batch(torch.full((500, 2), 0.7), NoiseKey(1)), {}
    for solver in ("ddim", "euler"):
        seen: list[Tensor] = []
        objective = ConsistencyDistillation(
            point, p, discretization=50, metric=spy(seen), solver=solver
        )
        objective.loss(point, batch, point)
        found[solver] = (seen[0] - 0.7).abs().max().item()
    assert found["ddim"] < 0.02
    seen = []
    skipped = ConsistencyDistillation(
        point, p, discretization=50, metric=spy(seen), solver="ddim", skip=20
    )
    skipped.loss(point, batch, point)
    assert (seen[0] - 0.7).abs().max() < 0.02


def test_guided_heun_takes_the_weight_in_both_evaluations() -> None:
    """A velocity of cond everywhere: every solver makes the same step, w times as long."""
    cond, steps = torch.randn(6), []
    batch = Batch(torch.randn(6, 3), NoiseKey(1), cond)
    for solver in ("euler", "heun"):
        seen: list[Tensor] = []
        objective = ConsistencyDistillation(
            Net(lambda x, t, cond: cond[:, None].expand_as(x)),
            guidance=3.0,
            null_condition=-2.0,
            metric=spy(seen),
            solver=solver,
        )
        zero = Net(lambda x, t, cond: torch.zeros_like(x))
        objective.loss(zero, batch, zero)
        assert len(objective.teacher.calls) == (2 if solver == "heun" else 1)
        steps.append(seen[0])
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-5, atol=1e-5)
    state = batch.states(Parameterization(), torch.tensor([0.5]).double().expand(6))[0]
    assert not torch.allclose(steps[0], state)


def test_a_teacher_of_another_path_serves_the_students() -> None:
    means = torch.tensor([[0.6, -0.2]])
    ve = Parameterization(VarianceExploding(), "edm")
    teachers = (
        GaussianMixture(means, 0.3),
        GaussianMixture(means, 0.3, parameterization=ve),
    )
    batch, values = Batch(means + 0.3 * torch.randn(64, 2), NoiseKey(2)), []
    for teacher, theirs in zip(teachers, (None, ve)):
        objective = ConsistencyDistillation(teacher, teacher_parameterization=theirs)
        student = Net(lambda x, t, cond: x.sin())
        values.append(objective.loss(student, batch, student).per_sample)
    inner = values[0].isfinite()
    torch.testing.assert_close(values[1][inner], values[0][inner], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("n", [1, 7, 40])
@pytest.mark.parametrize("sampler", [None, LogNormal()])
def test_skipping_walks_so_many_intervals_and_never_past_the_data(n: int, sampler: Any) -> None:
    u = rng.uniform(4096, NoiseKey(0), stream=rng.TIME)
    skip = min(n, 5)
    t, s = draw_interval(u, n, UniformGrid(), Linear(), sampler, skip)
    torch.testing.assert_close((t - s) * n, torch.full_like(t, skip))
    assert s.min() >= 0 and t.max() <= 1
    if sampler is None:
        assert len((t * n).round().unique()) == n - skip + 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"skip": 0}, "skip must be in 1..40"),
        ({"skip": 41}, "skip must be in 1..40"),
        ({"skip": 11, "discretization": ICTCurriculum(10)}, "skip must be in 1..10"),
        ({"solver": "rk4"}, "solver must be euler, heun or ddim, got 'rk4'"),
        (
            {"solver": "heun", "parameterization": Parameterization(VariancePreserving())},
            "'heun' needs the velocity at t_min",
        ),
    ],
)
def test_a_teachers_step_that_cannot_be_taken_is_refused(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        ConsistencyDistillation(Net(), **options)


# --- shortcut and consistency flow matching


def exact_mean_velocity(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Of Gaussian data: the trajectory through (x, t) scales as the standard deviation."""
    t, s = t.double()[:, None], s.double()[:, None]

    def std(t: Tensor) -> Tensor:
        return (((1 - t) * GAUSSIAN) ** 2 + t**2).sqrt()

    here = (t - (1 - t) * GAUSSIAN**2) / std(t) ** 2 * x
    gap = torch.where(t > s, t - s, 1.0)
    return torch.where(t > s, x * (1 - std(s) / std(t)) / gap, here).float()


class TwoTimes(Net):
    def __init__(self, function: Any = exact_mean_velocity) -> None:
        super().__init__()
        self.of = function
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None
    ) -> Tensor:
        s = t if s is None else s
        self.seen.append((x, t, s))
        return self.gain * self.of(x, t, s)


def test_times_of_shortcut_rows_are_dyadic() -> None:
    objective = Shortcut(steps=8, every=4)
    t, d = objective.draw(Batch(torch.zeros(40_000, 1), NoiseKey(3)))
    bootstrap = torch.arange(40_000) % 4 == 0
    assert (d[~bootstrap] == 0).all() and len(t[~bootstrap].unique()) > 20_000
    t, d = t[bootstrap], d[bootstrap]
    assert sorted(d.unique().tolist()) == [1 / 8, 1 / 4, 1 / 2, 1]
    assert torch.equal((t / d).round() * d, t) and (t >= d).all() and (t <= 1).all()
    for size in (1 / 8, 1 / 4, 1 / 2, 1):
        assert abs((d == size).double().mean().item() - 0.25) < 0.02


def test_a_large_shortcut_is_the_mean_of_two_halves() -> None:
    """The exact map of Gaussian data is consistent with itself: only the smallest steps err."""
    objective = Shortcut(steps=64, every=2)
    batch = Batch(GAUSSIAN * torch.randn(4000, 2), NoiseKey(4))
    net, target = TwoTimes(), TwoTimes()
    loss = objective.loss(net, batch, target)
    _, d = objective.draw(batch)
    rows = slice(None, None, 2)
    assert len(net.seen) == 1 and len(target.seen) == 2  # one call of everything
    assert len(target.seen[0][0]) == 2000
    large = d[rows] > 1 / 64
    assert loss.per_sample[rows][large].max() < 1e-6
    assert loss.per_sample[rows][~large].max() < 5e-3
    told = target.seen[0][1] - target.seen[0][2]
    torch.testing.assert_close(told[large].double(), 0.5 * d[rows][large], rtol=1e-4, atol=1e-7)
    assert (told[~large] == 0).all()
    assert loss.per_sample[1::2].mean() > 0.1  # flow matching has its variance


def test_micro_batches_of_shortcut_are_those_of_the_whole_batch() -> None:
    objective, x0 = Shortcut(steps=16), torch.randn(32, 3)
    whole = objective.loss(TwoTimes(), Batch(x0, NoiseKey(1)), TwoTimes()).per_sample
    parts = [
        objective.loss(TwoTimes(), Batch(x0[i : i + 16], NoiseKey(1, 0, i)), TwoTimes()).per_sample
        for i in (0, 16)
    ]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_clipping_bounds_the_target() -> None:
    def huge(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return torch.full_like(x, 100.0)

    batch = Batch(torch.randn(8, 2), NoiseKey(1))
    loss = Shortcut(clip=4.0).loss(TwoTimes(huge), batch, TwoTimes(huge))
    assert loss.per_sample[0].item() == pytest.approx(2 * (100.0 - 4.0) ** 2)


def test_the_flow_map_of_a_gaussian_is_exact_in_any_number_of_steps() -> None:
    z = torch.randn(500, 2)
    for times in ([1.0], [1.0, 0.5], [1.0, 0.9, 0.3, 0.1]):
        x = fastcm.sampling.flow_map(TwoTimes(), Linear(), z, times=times)
        torch.testing.assert_close(x, GAUSSIAN * z, rtol=1e-4, atol=1e-5)
    sampler = fastcm.Sampler(TwoTimes(), Linear(), steps=2, method="flow-map", shape=(2,))
    assert sampler(1000, seed=1).std().item() == pytest.approx(GAUSSIAN, rel=0.05)
    with pytest.raises(ValueError, match="must predict 'v' on Linear"):
        fastcm.Sampler(TwoTimes(), VarianceExploding(), method="flow-map")


def test_straight_velocities_have_no_loss_and_the_end_of_a_segment_is_given() -> None:
    """One data point c: v = (x - c) / t is straight, so both parts vanish where t > delta."""
    straight = Net(lambda x, t, cond: (x - 0.7) / t[:, None].clamp_min(1e-6))
    objective = ConsistencyFlowMatching(segments=2, delta=0.01, velocity_weight=1e-2)
    batch = Batch(torch.full((2000, 2), 0.7), NoiseKey(5))
    loss = objective.loss(straight, batch, straight)
    t, s = straight.calls[-1][1], straight.calls[0][1]
    away = s > 0
    assert loss.per_sample[away].max() < 1e-6
    inside = ((t > 0.01) & (t < 0.5)) | (t > 0.51)
    torch.testing.assert_close((t - s)[inside], torch.full_like(t[inside], 0.01), rtol=0, atol=1e-5)
    near = (t > 0.5) & (t < 0.51)
    assert near.any() and (s[near] == 0.5).all()


def test_both_parts_of_consistency_flow_matching_reach_the_gradient() -> None:
    batch = Batch(torch.randn(64, 2), NoiseKey(6))
    found = {}
    for weight in (0.0, 0.5):
        net, target = Net(), Net(lambda x, t, cond: torch.zeros_like(x))
        objective = ConsistencyFlowMatching(velocity_weight=weight)
        loss = objective.loss(net, batch, target)
        loss.backward()
        F = net.calls[0]
        found[weight] = net.gain.grad.item()
    v = 0.5 * F[0] + F[1][:, None]
    expected = 0.5 * (2 * v.square()).sum().item() / 64  # d (|g v|^2) / dg at g = 1
    assert found[0.5] - found[0.0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Shortcut(steps=6), "power of 2, got 6"),
        (lambda: Shortcut(Parameterization(TrigFlow())), "must predict 'v' on Linear"),
        (lambda: Shortcut(clip=0.0), "clip must be > 0"),
        (lambda: ConsistencyFlowMatching(segments=0), "segments must be >= 1"),
        (lambda: ConsistencyFlowMatching(delta=0.6), r"delta must be in \(0, 0.5\]"),
        (lambda: ConsistencyFlowMatching(Parameterization(Linear(), "x0")), "must predict 'v'"),
    ],
)
def test_settings_of_the_flow_methods_out_of_range_are_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_an_objective_of_two_times_needs_a_network_of_two_times() -> None:
    settings: dict[str, Any] = {"data": torch.randn(8, 3), "batch_size": 8}
    with pytest.raises(ValueError, match="Shortcut needs a network of two times"):
        fastcm.Trainer(small(), Shortcut(), **settings)
    with pytest.raises(ValueError, match="s was given to a network of one time"):
        small()(torch.zeros(2, 3), torch.ones(2), s=torch.zeros(2))
    fastcm.Trainer(small(two_times=True), Shortcut(), **settings, progress=False).fit(2)


def test_the_second_time_changes_nothing_at_the_start_and_something_later() -> None:
    one, two = small(), small(two_times=True)
    two.load_state_dict(one.state_dict(), strict=False)
    for net in (one, two):
        torch.nn.init.ones_(net.output.weight)
    x, t = torch.randn(4, 3), torch.rand(4)
    assert torch.equal(one(x, t), two(x, t, s=0 * t))
    torch.nn.init.normal_(two.conditioning.gap.weight)
    assert not torch.equal(two(x, t, s=0 * t), two(x, t, s=0.5 * t))
    assert torch.equal(two(x, t), two(x, t, s=t))
    assert SquaredL2()(two(x, t), two(x, t)).sum() == 0


# --- compiled


@pytest.mark.parametrize(
    ("objective", "two_times"),
    [
        (Stepwise(10, phases=4), False),
        (ConsistencyTraining.improved(100), False),
        (EasyConsistency(double_every=10), False),
        (EasyConsistency(Parameterization(VarianceExploding()), double_every=10), False),
        (Shortcut(), True),
        (ConsistencyFlowMatching(), False),
    ],
    ids=lambda o: type(o).__name__,
)
def test_a_compiled_loss_is_one_graph_and_follows_the_step(objective: Any, two_times: bool) -> None:
    """The phase, the stage and the curriculum are read on the device: no recompilation."""
    net, target = small(two_times=two_times), small(two_times=two_times)
    for network in (net, target):
        torch.nn.init.normal_(network.output.weight, std=0.1)
    x0 = torch.randn(16, 3)
    target_net = None if objective.target_average is None else target

    def loss(x0: Tensor, key: Tensor) -> Tensor:
        return objective.loss(net, Batch(x0, NoiseKey.wrap(key)), target_net).per_sample

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for step in (0, 25, 60):
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            found = compiled(x0, NoiseKey(0, step).tensor)
        expected = loss(x0, NoiseKey(0, step).tensor)  # small gaps t - s magnify rounding
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# --- guidance as an input


def test_a_drawn_weight_reaches_the_teachers_step_and_the_student() -> None:
    """Velocity cond everywhere and outputs 0: the residual is (t - s) (v_u + w (v_c - v_u))."""
    objective = ConsistencyDistillation(
        Net(lambda x, t, cond: cond[:, None].expand_as(x)),
        guidance=(2.0, 6.0),
        null_condition=-1.0,
        metric=SquaredL2(),
        weight=lambda t, s, path: 1 / (t - s) ** 2,
    )
    student = Net(lambda x, t, cond: torch.zeros_like(x))
    target = Net(lambda x, t, cond: torch.zeros_like(x))
    cond = torch.rand(5000)
    batch = Batch(torch.randn(5000, 3), NoiseKey(1), cond)
    loss = objective.loss(student, batch, target)
    for net in (student, target):
        told = net.calls[0][2]
        assert told.shape == (5000, 2)
        assert torch.equal(told[:, 0], cond)
    w = student.calls[0][2][:, 1]
    assert torch.equal(w, target.calls[0][2][:, 1])
    assert w.min() >= 2.0 and w.max() <= 6.0
    assert abs(w.mean() - 4.0) < 0.1 and abs(w.std() - 4.0 / 12**0.5) < 0.05
    expected = 3 * (-1.0 + w * (cond + 1.0)).square()
    torch.testing.assert_close(loss.per_sample, expected, rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match=r"must be a range \(low, high\), got \(6.0, 2.0\)"):
        ConsistencyDistillation(Net(), guidance=(6.0, 2.0), null_condition=0)


def test_a_guided_network_starts_as_the_unguided_one_and_reads_the_weight() -> None:
    one, two = small(num_classes=4), small(num_classes=4, guided=True)
    two.load_state_dict(one.state_dict(), strict=False)
    for net in (one, two):
        torch.nn.init.ones_(net.output.weight)
    x, t, labels = torch.randn(4, 3), torch.rand(4), torch.arange(4)
    packed = fastcm.sampling.append_weight(labels, 3.0)
    torch.testing.assert_close(two(x, t, packed), one(x, t, labels))
    torch.nn.init.normal_(two.conditioning.weight.weight)
    other = fastcm.sampling.append_weight(labels, 5.0)
    assert not torch.allclose(two(x, t, packed), two(x, t, other))
    for cond, said in ((labels, "torch.int64"), (None, "None"), (packed[:, :1], "float32")):
        with pytest.raises(ValueError, match=f"append_weight.*got.*{said}"):
            two(x, t, cond)
    alone = small(guided=True)
    alone(x, t, fastcm.sampling.append_weight(None, 2.0, 4))
