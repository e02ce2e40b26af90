"""What is no network, optimizer or function of the right kind is refused by name, at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastcm
from fastcm import ConsistencyTraining, Dataset, FlowMatching, Parameterization, Trainer
from fastcm.networks import MLP

DATA = torch.randn(16, 2)


def train(objective: Any = None, optimizer: Any = None, **options: Any) -> Trainer:
    net = options.pop("net", None) or MLP((2,), width=8, depth=1)
    return Trainer(
        net,
        objective or FlowMatching(),
        optimizer,
        data=DATA,
        **{"batch_size": 8, "progress": False, **options},
    )


def distilled(**options: Any) -> Any:
    return fastcm.ConsistencyDistillation(MLP((2,), width=8, depth=1), **options)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "path": (lambda: Parameterization("linear"), r"path must be an object .* got 'linear'"),
    "sampler": (lambda: fastcm.Sampler(MLP((2,)), "linear", steps=1), "path must be a"),
    "metric": (lambda: train(ConsistencyTraining(metric="l2")), "metric must be a function"),
    "weight": (lambda: train(FlowMatching(weight="snr")), r"weight must be .* got 'snr'"),
    "times": (lambda: train(FlowMatching(times="uniform")), r"times must be .* got 'uniform'"),
    "discretization": (
        lambda: ConsistencyTraining(discretization=0.5),
        r"discretization must be an int .* got 0\.5",
    ),
    "grid": (lambda: train(ConsistencyTraining(grid="karras")), "grid must be an object such as"),
    "sampler's grid": (
        lambda: fastcm.Sampler(MLP((2,)), fastcm.Linear(), steps=1, grid="karras"),
        r"grid must be an object .* got 'karras'",
    ),
    "target": (lambda: train(ConsistencyTraining(target_average=0.9)), "target_average must be"),
    "average": (lambda: train(averages=(0.999,)), r"averages must be .* got \(0\.999,\)"),
    "averages": (lambda: train(averages=fastcm.EMA(0.9)), "averages must be a sequence such as"),
    "objective": (lambda: train(FlowMatching), "objective must be an object such as"),
    "batch": (lambda: train(batch_size=8.0), r"batch_size must be an int, got 8\.0"),
    "steps": (lambda: train().fit(2.5), r"steps must be an int, got 2\.5"),
    "guidance": (
        lambda: distilled(guidance="2", null_condition=0.0),
        "guidance must be a number or a range",
    ),
    "skip": (lambda: distilled(skip=2.5), r"skip must be an int, got 2\.5"),
    "class": (lambda: train(None, fastcm.AdamW), "optimizer must be a torch.optim.Optimizer"),
    "rate": (lambda: train(None, 1e-3), r"optimizer must be .* got 0\.001"),
    "schedule": (lambda: train(lr_schedule=1e-3), "lr_schedule must be a function .* got float"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_names_and_classes_are_refused_where_objects_are_wanted(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(TypeError, match=message):
        call()


def test_a_range_of_guidance_is_of_two() -> None:
    for value in ((1.0,), (3.0, 2.0), (1.0, 2.0, 3.0)):
        with pytest.raises(ValueError, match="guidance must be a range"):
            distilled(guidance=value, null_condition=0.0)


def test_a_network_in_float64_is_refused_where_it_would_fail_at_its_first_layer() -> None:
    net = MLP((2,), width=8, depth=1).double()
    with pytest.raises(ValueError, match=r"net is in float64, .* give net.float\(\)"):
        fastcm.Sampler(net, fastcm.Linear(), steps=1)
    with pytest.raises(ValueError, match=r"teacher is in float64, .* give teacher.float\(\)"):
        train(fastcm.ConsistencyDistillation(net))


def test_a_scheduler_of_torch_is_no_schedule() -> None:
    net = MLP((2,), width=8, depth=1)
    optimizer = torch.optim.AdamW(net.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(TypeError, match=r"lr_schedule must be .* got StepLR"):
        train(None, optimizer, net=net, lr_schedule=scheduler)


def test_an_optimizer_of_another_network_is_refused_and_of_a_part_is_told() -> None:
    net, other = (MLP((2,), width=8, depth=1) for _ in range(2))
    with pytest.raises(ValueError, match="holds no parameter of net"):
        train(None, torch.optim.AdamW(other.parameters()), net=net)
    first = next(net.parameters())
    with pytest.warns(UserWarning, match="leaves .* of the .* parameters of net"):
        train(None, torch.optim.AdamW([first]), net=net)
    for p in net.parameters():
        p.requires_grad_(p is first)
    train(None, torch.optim.AdamW([first]), net=net)


def test_float_pixels_are_told() -> None:
    with pytest.warns(UserWarning, match=r"x is in 0\.\..*uint8"):
        Dataset(torch.rand(8, 3) * 255 + 0.5)
