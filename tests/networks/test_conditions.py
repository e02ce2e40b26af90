"""Conditions of several tensors: what is done to their rows, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastcm.networks.conditions import (
    append_weight,
    check_rows,
    each,
    joined,
    layout,
    named,
    replaced,
    rows_of,
    split_weight,
    unconditional,
)


def condition(n: int = 4) -> dict[str, Any]:
    return {
        "prompt": torch.randn(n, 3, 2),
        "size": (torch.arange(n), torch.ones(n, 5, dtype=torch.bool)),
    }


NULL = {"size": [7, None], "prompt": torch.zeros(3, 2)}  # of another order; a list for a tuple


def equal(a: Any, b: Any) -> bool:
    pairs = zip(named(a), named(b), strict=True)
    return all(n == m and x.dtype == y.dtype and torch.equal(x, y) for (n, x), (m, y) in pairs)


def test_tensors_have_names() -> None:
    assert [name for name, _ in named(condition())] == [
        "cond['prompt']", "cond['size'][0]", "cond['size'][1]",
    ]  # fmt: skip
    assert layout(condition()) == {
        "cond['prompt']": "float32 [3, 2]",
        "cond['size'][0]": "int64 []",
        "cond['size'][1]": "bool [5]",
    }
    assert [name for name, _ in named(torch.ones(2))] == ["cond"] and layout(None) == {}


def test_rows_are_taken_and_joined() -> None:
    cond = condition()
    halves = rows_of(cond, slice(0, 1)), rows_of(cond, torch.tensor([1, 2, 3]))
    assert equal(joined(*halves), cond) and rows_of(None, slice(1)) is None
    assert equal(each(lambda x, y: x, cond, cond), cond)


def test_no_condition_is_of_the_dtype_and_shape_of_the_condition() -> None:
    cond = condition()
    null = unconditional(cond, NULL)
    assert layout(null) == layout(cond)
    assert not null["prompt"].any() and null["size"][0].tolist() == [7] * 4
    assert null["size"][1] is cond["size"][1]
    assert unconditional(torch.arange(3), 9).tolist() == [9, 9, 9]
    assert unconditional(torch.ones(2, 2), torch.tensor([1, 2])).tolist() == [[1, 2], [1, 2]]


def test_some_rows_are_without_condition() -> None:
    cond, drop = condition(), torch.tensor([True, False, False, True])
    some = replaced(cond, NULL, drop)
    assert equal(rows_of(some, drop), rows_of(unconditional(cond, NULL), drop))
    assert equal(rows_of(some, ~drop), rows_of(cond, ~drop))


@pytest.mark.parametrize(
    "null", [{"prompt": 0}, {"prompt": 0, "size": 1}, {"prompt": 0, "size": (1, 2, 3)}, 0, [0, 1]]
)
def test_no_condition_of_other_containers_is_named(null: Any) -> None:
    with pytest.raises(ValueError, match=r"same containers as cond.*cond\['prompt'\].*"):
        unconditional(condition(), null)
    with pytest.raises(ValueError, match="null_condition a dict"):
        unconditional(torch.ones(2), NULL)
    with pytest.raises(ValueError, match="needs null_condition, got None"):
        unconditional(condition(), None)


def test_what_has_not_one_row_per_sample_is_named() -> None:
    check_rows(condition(), 4)
    check_rows(None, 4)
    with pytest.raises(ValueError, match=r"cond\['prompt'\] must have one row per sample, 5"):
        check_rows(condition(), 5)
    with pytest.raises(TypeError, match=r"cond\[1\] must be a tensor .* got str"):
        check_rows((torch.ones(4), "a prompt"), 4)
    with pytest.raises(ValueError, match="holds no tensor"):
        check_rows({}, 4)


@pytest.mark.parametrize("weight", [2.5, torch.tensor([1.0, 2.0, 3.0, 4.0])])
def test_a_weight_goes_with_a_dict(weight: float | Tensor) -> None:
    cond = condition()
    rest, w = split_weight(append_weight(cond, weight))
    assert equal(rest, cond) and w.dtype == torch.float32
    torch.testing.assert_close(w, torch.as_tensor(weight).expand(4))
    with pytest.raises(ValueError, match=r"or a dict .* got tuple"):
        append_weight((torch.ones(2),), 1.0)
