"""Defects that implementations of this family were found to have, each refused by a test.

What lies in a wing's own tests is named in `HELD`.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastcm import (
    EMA,
    Batch,
    ConsistencyDistillation,
    ConsistencyFlowMatching,
    ConsistencyTraining,
    ContinuousConsistency,
    Dataset,
    DelayedEMA,
    EasyConsistency,
    FlowMatching,
    HalfLifeEMA,
    MeanFlow,
    NoiseKey,
    PairDistillation,
    Parameterization,
    PowerEMA,
    Shortcut,
    Stepwise,
    Trainer,
    VarianceExploding,
    WarmupEMA,
    losses,
    paths,
)
from fastcm.cli import tables
from fastcm.networks import MLP
from fastcm.schedules import CMCurriculum, ICTCurriculum

ROOT = Path(__file__).parent
HELD = {
    "an option is accepted and never reaches the computation": (
        "cli/test_options.py",
        "test_every_option_changes_the_computation_or_is_refused",
    ),
    "shared dropout restores the generator of the CPU alone": (
        "training/test_step.py",
        "test_student_and_target_masks_are_equal_under_objectives_that_share_weights",
    ),
    "a setting of a method is ignored for a constant in its code": (
        "objectives/test_fields.py",
        "test_every_field_of_a_method_changes_its_loss",
    ),
    "a step waits for the device": ("test_gpu.py", "test_a_step_never_waits_for_the_device"),
    "a sharded average gathers every parameter": (
        "optim/test_optim_sharded.py",
        "an_update_of_shards_is_local",
    ),
    "noise is drawn on the last step of a sampler and multiplied by 0": (
        "sampling/test_sampling.py",
        "test_no_noise_is_drawn_after_the_last_evaluation",
    ),
    "an average reads its counter back": (
        "maths/test_ema.py",
        "test_decays_run_on_a_device_without_reading_the_step_back",
    ),
}


@pytest.mark.parametrize("defect", HELD)
def test_the_test_of_a_defect_is_where_it_is_said_to_be(defect: str) -> None:
    file, name = HELD[defect]
    assert f"def {name}(" in (ROOT / file).read_text()


def small(**more: Any) -> MLP:
    torch.manual_seed(0)
    net = MLP(**{"shape": (3,), "width": 16, "depth": 1, **more})
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.2)
    return net


TRIG, VE = Parameterization(paths.TrigFlow()), Parameterization(VarianceExploding())


# A step waits for the device: .item(), .cpu(), a branch on a tensor.


class Unread(TorchDispatchMode):
    """Where a tensor's value cannot be asked for."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function)
        if any(part in name for part in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal.")):
            raise AssertionError(f"{name} waits for the device")
        return function(*args, **(kwargs or {}))


def methods() -> dict[str, Any]:
    return {
        "flow": FlowMatching(),
        "stepwise": Stepwise(10),
        "ct": ConsistencyTraining(discretization=CMCurriculum(100)),
        "ict": ConsistencyTraining.improved(100),
        "ect": EasyConsistency(),
        "sct": ContinuousConsistency(weight=losses.uniform),
        "shortcut": Shortcut(),
        "meanflow": MeanFlow(),
        "cfm": ConsistencyFlowMatching(),
        "cd": ConsistencyDistillation(small()),
        "heun": ConsistencyDistillation(small(), solver="heun"),
        "scd": ContinuousConsistency(Parameterization(), small(), weight=losses.uniform),
        "pairs": PairDistillation(),
    }


@pytest.mark.parametrize("method", methods())
def test_no_step_reads_a_number_back_from_the_device(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole steps: rows, noise, networks, clip, optimizer and every kind of average."""
    # the range of times is checked on a CPU alone
    monkeypatch.setattr(paths.Path, "at", lambda self, t: self._at(t.double()))
    x = torch.randn(40, 2, 3) if method == "pairs" else torch.randn(40, 3)
    averages = (EMA(0.9, warmup=True), PowerEMA(), WarmupEMA(), DelayedEMA(HalfLifeEMA(99, 12), 3))
    t = Trainer(
        small(two_times=method in tables.TWO_TIMES),
        methods()[method],
        data=Dataset(x, paired=method == "pairs"),
        batch_size=12,
        averages=averages,
        compile=False,
        progress=False,
    ).fit(2)
    with Unread():
        for _ in range(5):  # across an epoch
            loss = t.train_step()
    assert loss.isfinite() and t.update.counts.tolist() == [7, 0, 0]


@pytest.mark.parametrize("method", methods())
def test_no_loss_reads_a_number_back_from_the_device(method: str) -> None:
    """On the meta device there is none to be read, by any way around the dispatcher either."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones((), device="meta"))

        def forward(self, x: Tensor, t: Tensor, cond: Any = None, s: Any = None) -> Tensor:
            return self.gain * x * t[:, None].to(x.dtype)

    objective, net = methods()[method], Plain()
    if getattr(objective, "teacher", None) is not None:
        objective = dataclasses.replace(objective, teacher=Plain())
    x0, z = torch.empty(2, 12, 3, device="meta")
    key = NoiseKey.wrap(torch.empty_like(NoiseKey(0).tensor, device="meta"))
    batch = Batch(x0, key, z=z if method == "pairs" else None)
    loss = objective.loss(net, batch, None if objective.target_average is None else Plain())
    loss.mean.backward()
    assert net.gain.grad is not None and net.gain.grad.is_meta


# The preconditioning lacks a root or sigma_data; N(k) is counted on one process; Huber per element.


def test_c_in_has_its_root_and_c_out_its_sigma_data() -> None:
    """At t = sigma_data = 1/2 and at t = 3/2, worked out: 1 / sqrt(t^2 + 1/4), and t - 0.002."""
    t = torch.tensor([0.5, 1.5], dtype=torch.float64)
    skip, out, _, _ = VE.coefficients(t)
    c_in = VE.c_in(t)
    assert c_in is not None
    assert c_in.tolist() == pytest.approx([1.41421356237, 0.63245553203], rel=1e-10)
    assert out.tolist() == pytest.approx([0.249 * 1.41421356237, 0.749 * 0.63245553203], rel=1e-10)
    assert skip.tolist() == pytest.approx([0.25 / 0.498004, 0.25 / 2.494004], rel=1e-10)


@pytest.mark.parametrize("method", ["ct", "ict", "ect", "stepwise", "cd", "pairs"])
def test_every_network_receives_c_in_times_x(method: str) -> None:
    """Data of standard deviation sigma_data: each input has unit variance, at any time."""
    seen: list[tuple[Tensor, Tensor]] = []

    def net(x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        seen.append((x, t))
        return torch.zeros_like(x)

    teacher = small()
    teacher.forward = net  # type: ignore[method-assign]
    objective = {**methods(), "cd": ConsistencyDistillation(teacher, VE)}[method]
    objective = dataclasses.replace(objective, parameterization=VE)
    x0, z = 0.5 * torch.randn(4000, 3), torch.randn(4000, 3)
    batch = Batch(x0, NoiseKey(3, 25), z=z if method == "pairs" else None)
    objective.loss(net, batch, net)
    assert len(seen) == {"cd": 3, "pairs": 1}.get(method, 2)
    for x, t in seen:
        if method == "pairs":  # from noise alone
            x = x / x.std()
        for part in x[t.argsort()].chunk(4):
            assert part.square().mean().item() == pytest.approx(1.0, abs=0.12)


def test_n_is_a_function_of_the_step_and_of_nothing_before() -> None:
    """Whatever a process was asked before, and on the device: every rank has the same grid."""
    for curriculum in (CMCurriculum(100, 2, 20), ICTCurriculum(100, 2, 16)):
        steps = torch.randperm(100)
        found = torch.stack([curriculum.points(k) for k in steps])
        assert torch.equal(found, curriculum.points(torch.arange(100))[steps])
        assert len(found.unique()) > 3
        objective, times = ConsistencyTraining(discretization=curriculum), []
        for k in (90, 0, 90):
            seen: list[Tensor] = []

            def net(x: Tensor, t: Tensor, cond: Any = None, seen: list[Tensor] = seen) -> Tensor:
                seen.append(t)
                return x

            objective.loss(net, Batch(torch.zeros(500, 1), NoiseKey(0, k)), net)
            times.append(len(seen[-1].unique()))
        assert times == [int(curriculum.points(torch.tensor(k))) - 1 for k in (90, 0, 90)]


@pytest.mark.parametrize(
    "metric", [m for n, m in tables.METRICS.items() if "element" not in n], ids=str
)
def test_a_metric_reduces_the_whole_sample(metric: Any) -> None:
    """Of one residual of 3 and one of 4: per element Huber would give 7 less twice c, not 5 - c."""
    r = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    expected = {"SquaredL2": 25.0, "L2": 5.0, "L1": 7.0}.get(type(metric).__name__)
    if expected is None:
        c = 0.00054 * math.sqrt(2)
        expected = math.sqrt(25 + c * c) - c
    assert metric(r, 0 * r).item() == pytest.approx(expected, rel=1e-14)
    shaped = r.reshape(1, 1, 2, 1)
    assert torch.equal(metric(shaped, 0 * shaped), metric(r, 0 * r))


# Activations in float64; times in bfloat16.


@pytest.mark.parametrize("method", methods())
def test_networks_receive_bf16_x_and_float32_t_and_losses_are_float32(method: str) -> None:
    """c_noise in bfloat16 would merge neighbouring times; float64 is for one number a sample."""
    seen: list[tuple[Tensor, Tensor, Tensor | None]] = []

    class Plain(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Any = None, s: Any = None) -> Tensor:
            seen.append((x, t, s))
            return x * t[:, None].to(x.dtype)

    objective, net = methods()[method], Plain()
    if getattr(objective, "teacher", None) is not None:
        objective = dataclasses.replace(objective, teacher=Plain())
    x0, z = torch.randn(2, 16, 3)
    z_of_pair = z if method == "pairs" else None
    for p in (None, TRIG, VE):
        if p is not None and method in (*tables.TWO_TIMES, "cfm", "flow", "sct", "scd"):
            continue
        if p is not None:
            objective = dataclasses.replace(objective, parameterization=p, **_teachers(objective))
        batch = Batch(x0, NoiseKey(1), input_dtype=torch.bfloat16, z=z_of_pair)
        loss = objective.loss(net, batch, net)
        assert loss.per_sample.dtype == loss.mean.dtype == torch.float32
    assert {(x.dtype, t.dtype) for x, t, _ in seen} == {(torch.bfloat16, torch.float32)}
    assert all(s is None or s.dtype == torch.float32 for _, _, s in seen)


def _teachers(objective: Any) -> dict[str, Any]:
    """A teacher is on the path of its student."""
    return {"teacher_parameterization": None} if hasattr(objective, "teacher") else {}
