"""The discrete family: targets, times and weights of each method against its paper's formulas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_objectives import Net
from torch import Tensor

import fastcm
from fastcm import (
    ConsistencyDistillation,
    ConsistencyFlowMatching,
    ConsistencyTraining,
    EasyConsistency,
    FlowMatching,
    LastPhase,
    PairDistillation,
    Shortcut,
    Stepwise,
    losses,
    ops,
    rng,
)
from fastcm.losses import L2
from fastcm.networks import MLP
from fastcm.objectives import Batch
from fastcm.parameterization import Parameterization
from fastcm.paths import Linear, TrigFlow, VarianceExploding
from fastcm.rng import NoiseKey
from fastcm.runs import checkpoint
from fastcm.schedules import ICTCurriculum, KarrasGrid, LogNormal, UniformGrid


def spy(seen: list[Tensor]) -> Any:
    def metric(f: Tensor, target: Tensor) -> Tensor:
        seen.append(target)
        return (f - target).flatten(1).square().sum(1)

    return metric


def small(**options: Any) -> MLP:
    torch.manual_seed(0)
    return MLP(shape=(3,), width=16, depth=1, **options)


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


@pytest.mark.parametrize(
    "objective",
    [
        FlowMatching(Parameterization(TrigFlow())),
        ConsistencyTraining(),
        ConsistencyTraining(Parameterization(VarianceExploding()), grid=KarrasGrid()),
        ConsistencyDistillation(Net(lambda x, t, cond: 0.3 * x)),
        ConsistencyDistillation(Net(lambda x, t, cond: 0.3 * x), solver="heun"),
        ConsistencyFlowMatching(velocity_weight=0.1),
        PairDistillation(),
        Shortcut(every=1),
    ],
    ids=lambda o: type(o).__name__,
)
def test_float64_data_stays_float64(objective: Any) -> None:
    """A change of the data below what float32 resolves is a change of every loss."""

    class TwoTimes(Net):
        def forward(self, x: Tensor, t: Tensor, cond: Any = None, s: Any = None) -> Tensor:
            assert x.dtype == torch.float64 and t.dtype == torch.float32
            return super().forward(x, t, cond)

    net, x0 = TwoTimes(lambda x, t, cond: (0.5 * x).sin()), torch.randn(32, 3).double()
    z = torch.randn(32, 3).double() if isinstance(objective, PairDistillation) else None
    found = []
    for data in (x0, x0 * (1 + 1e-11)):
        batch = Batch(data, NoiseKey(0), input_dtype=torch.float64, z=z)
        found.append(objective.loss(net, batch, net).per_sample)
    assert found[0].dtype == torch.float64
    change = (found[1] - found[0]).abs() / found[0].abs().mean()
    # at t_max a state of the linear path has nothing of the data
    assert (change > 0).double().mean() > 0.6 and change.max() < 1e-6
