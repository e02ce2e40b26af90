"""Dicts and tuples as conditions: the same numbers as one tensor that holds them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorded_graphs import RecordedGraph
from structured import (
    DATA,
    FEATURES,
    NULL,
    Features,
    Structured,
    StructuredWeighted,
    Weighted,
    network,
    structured,
    teacher,
)
from torch import Tensor
from torch.utils.data import DataLoader

import fastcm
from fastcm.networks.conditions import each, rows_of

OBJECTIVES: dict[str, Callable[[type[Features], Any], Any]] = {
    "flow": lambda kind, null: fastcm.FlowMatching(condition_dropout=0.4, null_condition=null),
    "ct": lambda kind, null: fastcm.ConsistencyTraining(),
    "cd": lambda kind, null: fastcm.ConsistencyDistillation(
        teacher(kind), guidance=2.0, null_condition=null
    ),
    "heun": lambda kind, null: fastcm.ConsistencyDistillation(
        teacher(kind), guidance=2.0, null_condition=null, solver="heun"
    ),
    "lcm": lambda kind, null: fastcm.ConsistencyDistillation(
        teacher(kind), guidance=(1.0, 3.0), null_condition=null
    ),
    "scd": lambda kind, null: fastcm.ContinuousConsistency(
        teacher=teacher(kind), guidance=2.0, null_condition=null, weight=fastcm.losses.uniform
    ),
    "cfm": lambda kind, null: fastcm.ConsistencyFlowMatching(),
    "shortcut": lambda kind, null: fastcm.Shortcut(),
    "meanflow": lambda kind, null: fastcm.MeanFlow(
        guidance=2.0, mixing=0.5, null_condition=null, condition_dropout=0.3
    ),
}


def trained(name: str, as_dict: bool, data: Callable[[Any], Any], **options: Any) -> list[Tensor]:
    kind = Structured if as_dict else Features
    null = NULL if as_dict else torch.zeros(5)
    net = network(kind)
    if name == "lcm":
        net = network(StructuredWeighted if as_dict else Weighted)
    objective = OBJECTIVES[name](kind, null)
    cond = structured(FEATURES) if as_dict else FEATURES
    options = {"compile": False, **options}
    fastcm.Trainer(
        net, objective, data=data(cond), batch_size=8, progress=False, log=lambda line: None,
        **options,
    ).fit(4)  # fmt: skip
    return [p.detach() for p in net.parameters()]


def rows(cond: Any) -> Any:
    return DATA, cond


def dataset(cond: Any) -> Any:
    return fastcm.Dataset(DATA, cond=cond)


def loader(cond: Any) -> Any:
    items = [(x, each(lambda v: v[i], cond)) for i, x in enumerate(DATA)]  # noqa: B023
    return DataLoader(items, batch_size=8)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective(name: str) -> None:
    same = zip(trained(name, True, rows), trained(name, False, rows))
    assert all(torch.equal(a, b) for a, b in same)


@pytest.mark.parametrize("data", [dataset, loader])
def test_every_source(data: Callable[[Any], Any]) -> None:
    assert all(map(torch.equal, trained("cd", True, data), trained("cd", False, data)))


@pytest.mark.parametrize("name", ["flow", "cd"])
def test_compiled_and_in_parts(name: str) -> None:
    options = {"compile": True, "accumulate": 2}
    for a, b in zip(trained(name, True, rows, **options), trained(name, True, rows)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_captured_step(recorded_graphs: type[RecordedGraph]) -> None:
    options = {"graph": "step"}
    for data in (rows, loader):
        assert all(
            map(torch.equal, trained("cd", True, data, **options), trained("cd", True, data))
        )


def test_a_structure_that_changes_is_named(recorded_graphs: type[RecordedGraph]) -> None:
    def batches() -> Any:
        cond = rows_of(structured(FEATURES), slice(8))
        yield DATA[:8], cond
        yield DATA[:8], {**cond, "prompt": (cond["prompt"][0], torch.ones(8, 1))}

    with pytest.raises(ValueError, match=r"every batch must be as the first.*prompt'\]\[1\]"):
        trained("flow", True, lambda cond: list(batches()))
    with pytest.raises(ValueError, match=r"cond\['style'\] must have one row per sample, 8"):
        trained("flow", True, lambda cond: [(DATA[:8], cond)])
    with pytest.raises(ValueError, match="several conditions are one dict or tuple"):
        trained("flow", True, lambda cond: [(DATA[:8], FEATURES[:8], FEATURES[:8])])


def test_a_data_set_splits_with_its_condition() -> None:
    held = fastcm.Dataset(DATA, cond=structured(FEATURES))
    train, rest = held.split(0.25)
    for part in (train, rest):
        at = [int((x == DATA).all(1).nonzero()) for x in part.x]
        assert torch.equal(part.cond["prompt"][0], FEATURES[at, 2:])
    assert held.without_labels().condition is None
    assert fastcm.Dataset(DATA, torch.arange(24)).condition.tolist() == [*range(24)]
    with pytest.raises(ValueError, match="labels or cond, not both"):
        fastcm.Dataset(DATA, torch.arange(24), cond=FEATURES)
    with pytest.raises(ValueError, match=r"cond\['a'\] must have one row per sample, 24"):
        fastcm.Dataset(DATA, cond={"a": FEATURES[:3]})
