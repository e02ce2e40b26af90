"""Nested states in checkpoints: what comes back, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcm.runs.checkpoint import CheckpointError
from fastcm.runs.nested import flatten, unflatten


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor | np.ndarray):
        return type(a) is type(b) and a.dtype == b.dtype and bool((a == b).all())
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_a_state_comes_back_as_it_was() -> None:
    state = {
        "epoch": 3,
        "big": 2**127,
        "share": 0.1,
        "nothing": None,
        "done": False,
        "name": "a",
        "workers": [{"generator": torch.get_rng_state()}, {}],
        "random": (3, (1, 2), None),
        "mt": np.random.RandomState(0).get_state(),
        "empty": [(), torch.zeros(0), np.zeros((2, 0), np.float32)],
    }
    plain, tensors = flatten(state, "state")
    assert same(unflatten(json.loads(json.dumps(plain)), tensors), state)


def test_tensors_are_those_of_the_time() -> None:
    x = torch.zeros(2)
    plain, tensors = flatten({"x": x}, "state")
    x += 1
    assert unflatten(plain, tensors)["x"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"a": [0, {"b": object()}]},
            r"state\['a'\]\[1\]\['b'\] is a builtins\.object.*numbers, s",
        ),
        ({"a": b"123"}, r"state\['a'\] is a builtins\.bytes"),
        ({"a": {1: 2}}, r"state\['a'\] has the key 1: keys must be strings"),
        ({"$tensor": "0"}, r"has the key '\$tensor'"),
        ({"a": np.array([{}], object)}, r"state\['a'\] is a numpy\.ndarray"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, r"state\['a'\] is a torch\.Tensor"),
        ({"a": "x" * 2**21}, r"state has 2097\d+ bytes of JSON, at most 1048576"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_named(state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flatten(state, "state")


def test_deep_nesting_is_refused() -> None:
    state: Any = 0
    for _ in range(40):
        state = [state]
    with pytest.raises(ValueError, match="nested more than 30 deep"):
        flatten(state, "state")


def test_a_missing_tensor_is_refused() -> None:
    with pytest.raises(CheckpointError, match="lacks its tensor '7'"):
        unflatten({"x": {"$tensor": "7"}}, {})


@pytest.mark.parametrize("described", [["0", "<f8", [9]], ["0", "|O8", [1]], ["0"], "0", 3])
def test_an_array_that_is_not_there_is_refused(described: Any) -> None:
    with pytest.raises(CheckpointError, match=r"names the array"):
        unflatten({"$array": described}, {"0": torch.zeros(8, dtype=torch.uint8)})
