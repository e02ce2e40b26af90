"""Every field of every method reaches its loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from fastcm import (
    Batch,
    ConsistencyDistillation,
    ConsistencyFlowMatching,
    ConsistencyTraining,
    ContinuousConsistency,
    EasyConsistency,
    FlowMatching,
    MeanFlow,
    NoiseKey,
    PairDistillation,
    Parameterization,
    Shortcut,
    Stepwise,
    losses,
    paths,
)
from fastcm.networks import MLP
from fastcm.schedules import KarrasGrid, LogitNormal, LogNormal, UniformTime


def small(**more: Any) -> MLP:
    torch.manual_seed(0)
    net = MLP(**{"shape": (3,), "width": 16, "depth": 1, **more})
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.2)
    return net


PAIR: dict[str, Any] = {
    "parameterization": Parameterization(paths.TrigFlow()),
    "metric": losses.L2(),
}
GRIDDED: dict[str, Any] = {
    **PAIR,
    "discretization": 7,
    "grid": KarrasGrid(),
    "times": LogNormal(),
    "weight": losses.uniform,
}
FIELDS: list[tuple[Any, dict[str, Any]]] = [
    (
        FlowMatching(condition_dropout=0.2, null_condition=4),
        {
            **PAIR,
            "times": UniformTime(),
            "weight": losses.inverse_square,
            "condition_dropout": 0.6,
            "null_condition": 3,
        },
    ),
    (ConsistencyTraining(), GRIDDED),
    (
        ConsistencyDistillation(small(num_classes=4), guidance=2.0, null_condition=4),
        {
            **GRIDDED,
            "teacher": small(num_classes=4, depth=2),
            "teacher_parameterization": Parameterization(paths.Linear(), "x0"),
            "guidance": 5.0,
            "null_condition": 3,
            "solver": "heun",
            "skip": 3,
            "guidance_interval": (0.3, 0.6),
            "guidance_rescale": 0.7,
        },
    ),
    (
        EasyConsistency(double_every=10),
        {
            **PAIR,
            "metric": losses.L1(),
            "q": 3.0,
            "double_every": 5,
            "stages": 1,
            "k": 4.0,
            "b": 2.0,
            "levels": LogNormal(0.0, 1.0),
            "weight": losses.uniform,
        },
    ),
    (
        Stepwise(10),
        {
            **PAIR,
            "steps_per_phase": 5,
            "phases": 20,
            "grid": KarrasGrid(),
            "weight": losses.uniform,
        },
    ),
    (
        Shortcut(clip=1.0),
        {
            "steps": 2,
            "every": 3,
            "clip": 0.1,
            "times": LogitNormal(),
            "metric": losses.L2(),
        },
    ),
    (
        ConsistencyFlowMatching(),
        {
            "segments": 4,
            "delta": 0.2,
            "velocity_weight": 0.3,
            "times": LogitNormal(),
            "metric": losses.L2(),
        },
    ),
    (PairDistillation(), PAIR),
    (
        MeanFlow(guidance=2.0, null_condition=4, mixing=0.1, condition_dropout=0.2),
        {
            "instant": 0.5,
            "times": UniformTime(),
            "metric": losses.L2(),
            "guidance": 3.0,
            "mixing": 0.4,
            "null_condition": 3,
            "condition_dropout": 0.6,
            "predicted_tangent": True,
        },
    ),
    (
        ContinuousConsistency(
            Parameterization(), small(num_classes=4), guidance=2.0, null_condition=4, warmup=50
        ),
        {
            **PAIR,
            "teacher": small(num_classes=4, depth=2),
            "teacher_parameterization": Parameterization(paths.Linear(), "x0"),
            "sigma_data": 0.7,
            "mean": -0.5,
            "std": 1.0,
            "warmup": 100,
            "normalization": "rms",
            "c": 0.3,
            "prior": "one",
            "weight": losses.inverse_square,
            "guidance": 5.0,
            "null_condition": 3,
        },
    ),
]
"""Every method, and for each of its fields another value; `target_average` is in the trainer.

`embedded_guidance` wants other networks: tests/objectives/test_distillation.py.
"""
ONE_PATH = {"Shortcut", "ConsistencyFlowMatching", "MeanFlow"}


@pytest.mark.parametrize(("objective", "fields"), FIELDS, ids=lambda o: type(o).__name__)
def test_every_field_of_a_method_changes_its_loss(objective: Any, fields: dict[str, Any]) -> None:
    name = type(objective).__name__
    mine = {f.name for f in dataclasses.fields(objective) if f.init}
    missing = mine - fields.keys() - {"target_average", "embedded_guidance"}
    assert missing == ({"parameterization"} if name in ONE_PATH else set())
    x0, cond = torch.randn(32, 3), torch.randint(4, (32,))
    two_times = getattr(objective, "two_times", False)
    net, target = (
        small(num_classes=4, two_times=two_times, log_variance=True, width=width)
        for width in (16, 24)
    )
    batch = Batch(x0, NoiseKey(0, 25), cond, z=torch.randn(32, 3) if "Pair" in name else None)

    def loss(objective: Any) -> float:
        value: float = objective.loss(net, batch, target).mean.item()
        return value

    expected = loss(objective)
    same = [
        k for k, v in fields.items() if loss(dataclasses.replace(objective, **{k: v})) == expected
    ]
    assert not same
