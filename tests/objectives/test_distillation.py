"""Distillation: the teacher's solvers, paths and skips, and guidance as an input of the student."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_family import small, spy
from test_objectives import GAUSSIAN, Net, flow, solution
from torch import Tensor

import fastcm
from fastcm import (
    ConsistencyDistillation,
    losses,
    rng,
)
from fastcm.losses import L2, SquaredL2
from fastcm.networks import GaussianMixture
from fastcm.objectives import Batch
from fastcm.parameterization import Parameterization
from fastcm.paths import Linear, VarianceExploding, VariancePreserving
from fastcm.rng import NoiseKey
from fastcm.schedules import ICTCurriculum, LogNormal, UniformGrid, draw_interval


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


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_outside_the_interval_the_weight_is_one(solver: Any) -> None:
    """Between t = 0.3 and 0.6 the step is the guided one, elsewhere that of the condition."""
    cond = torch.rand(500)
    batch, steps = Batch(torch.randn(500, 3), NoiseKey(1), cond), []
    settings: dict[str, Any] = {"null_condition": -1.0, "solver": solver}
    for options in (
        {"guidance": 3.0, **settings},
        {"solver": solver},
        {"guidance": 3.0, "guidance_interval": (0.3, 0.6), **settings},
    ):
        seen: list[Tensor] = []
        objective = ConsistencyDistillation(
            Net(lambda x, t, cond: cond[:, None] * (1 + x)), metric=spy(seen), **options
        )
        zero = Net(lambda x, t, cond: torch.zeros_like(x))
        objective.loss(zero, batch, zero)
        steps.append(seen[0])
    guided, plain, both = steps
    t = objective._drawn(batch).t.t[:, None]
    inside = (t >= 0.3) & (t <= 0.6)
    assert 100 < inside.sum() < 200 and (guided - plain).abs().max() > 0.01
    torch.testing.assert_close(both, guided.where(inside, plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("guidance", [4.0, (2.0, 6.0)])
def test_rescaled_guidance_is_that_of_diffusers(solver: Any, guidance: Any) -> None:
    """As its pipelines' rescale_noise_cfg, one teacher that has it within against another."""
    share, cond = 0.7, torch.rand(50)
    batch = Batch(torch.randn(50, 3, 4, 4), NoiseKey(1), cond)

    def velocity(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return cond.reshape(-1, 1, 1, 1) * (1 + x) + x.square()

    def rescaled(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        c, w = cond[:, 0], cond[:, 1].reshape(-1, 1, 1, 1)
        text, free = velocity(x, t, c), velocity(x, t, torch.full_like(c, -1.0))
        guided = free + w * (text - free)
        deviations = [f.std(dim=[1, 2, 3], keepdim=True) for f in (text, guided)]
        return share * guided * (deviations[0] / deviations[1]) + (1 - share) * guided

    targets = []
    for options in (
        {"null_condition": -1.0, "guidance_rescale": share},
        {"embedded_guidance": True},
        {"null_condition": -1.0},
    ):
        seen: list[Tensor] = []
        objective = ConsistencyDistillation(
            Net(rescaled if "embedded_guidance" in options else velocity),
            guidance=guidance, solver=solver, metric=spy(seen), **options,
        )  # fmt: skip
        zero = Net(lambda x, t, cond: torch.zeros_like(x))
        objective.loss(zero, batch, zero)
        targets.append(seen[0])
    torch.testing.assert_close(targets[0], targets[1], rtol=1e-4, atol=1e-4)
    assert (targets[0] - targets[2]).abs().max() > 0.01


def test_a_drawn_weight_reaches_the_student_but_for_the_interval() -> None:
    objective = ConsistencyDistillation(
        Net(lambda x, t, cond: cond[:, None].expand_as(x)),
        guidance=(2.0, 6.0),
        guidance_interval=(0.0, 0.0),
        null_condition=-1.0,
    )
    student = Net(lambda x, t, cond: torch.zeros_like(x))
    objective.loss(student, Batch(torch.randn(50, 3), NoiseKey(1), torch.rand(50)), student)
    w = student.calls[0][2][:, 1]
    assert w.min() >= 2.0 and w.std() > 0.5


@pytest.mark.parametrize("guidance", [3.0, (2.0, 6.0)])
def test_a_teacher_that_embeds_the_weight_is_told_it_and_asked_once(guidance: Any) -> None:
    def velocity(x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return (cond["guidance"] * cond["prompt"])[:, None].expand_as(x)

    objective = ConsistencyDistillation(
        Net(velocity), guidance=guidance, embedded_guidance=True, metric=SquaredL2(),
        weight=lambda t, s, path: 1 / (t - s) ** 2,
    )  # fmt: skip
    student = Net(lambda x, t, cond: torch.zeros_like(x))
    cond = {"prompt": torch.rand(500)}
    loss = objective.loss(student, Batch(torch.randn(500, 3), NoiseKey(1), cond), student)
    assert len(objective.teacher.calls) == 1 and len(objective.teacher.calls[0][0]) == 500
    w = student.calls[0][2]["guidance"]
    assert torch.equal(w, objective.teacher.calls[0][2]["guidance"])
    assert (w == 3.0).all() if guidance == 3.0 else w.std() > 0.5
    expected = 3 * (w * cond["prompt"]).square()
    torch.testing.assert_close(loss.per_sample, expected, rtol=2e-3, atol=2e-3)
    assert cond.keys() == {"prompt"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"embedded_guidance": True}, "embedded_guidance needs guidance"),
        ({"guidance_interval": (0.1, 0.2)}, "guidance_interval needs guidance"),
        ({"guidance_rescale": 0.7}, "guidance_rescale needs guidance"),
        (
            {"guidance": 2.0, "null_condition": 0, "guidance_rescale": 1.5},
            r"guidance_rescale must be in \[0, 1\], got 1\.5",
        ),
        (
            {"guidance": 2.0, "embedded_guidance": True, "guidance_rescale": 0.7},
            "guidance_rescale needs the conditional output",
        ),
        ({"guidance": 2.0, "embedded_guidance": True, "null_condition": 0}, "leave one out"),
        ({"guidance": 2.0}, "guidance needs null_condition"),
        (
            {"guidance": 2.0, "null_condition": 0, "guidance_interval": (0.5, 0.2)},
            r"guidance_interval must be a range \(low, high\)",
        ),
    ],
)
def test_guidance_that_does_not_fit_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ConsistencyDistillation(Net(), **options)


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
