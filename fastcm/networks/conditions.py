"""What a network is conditioned on: a tensor, or dicts and tuples of tensors, of a row per sample.

The containers are those of `torch.utils._pytree`: dicts, tuples, lists and named tuples, nested.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Union

import torch
from torch import Tensor
from torch.utils import _pytree

Condition = Union[Tensor, dict[str, Any], tuple[Any, ...], list[Any]]
"""A tensor ``[B, ...]``, or such tensors in containers."""

Null = Union[Tensor, float, dict[str, Any], tuple[Any, ...], list[Any], None]
"""What stands for "no condition": a number or a tensor that broadcasts to the condition.

For containers, the same ones; there None leaves a tensor as it is under the condition.
"""

WEIGHT = "guidance"
"""Where a dict holds the guidance weight of a network that takes it as an input."""


def each(function: Callable[..., Any], cond: Any, *others: Any) -> Any:
    """The function of every tensor, and of what stands in its place in `others`."""
    if isinstance(cond, Tensor):
        return function(cond, *others)
    return _pytree.tree_map(function, cond, *others)


def named(cond: Any, name: str = "cond") -> list[tuple[str, Any]]:
    """What the containers hold, each by its name, such as ``cond['prompt']``."""
    if isinstance(cond, Tensor):
        return [(name, cond)]
    held, _ = _pytree.tree_flatten_with_path(cond)
    return [(name + _pytree.keystr(path), value) for path, value in held]


def flattened(cond: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """What nested dicts hold, by keys that are joined by dots; `nested` is the inverse."""
    found: dict[str, Any] = {}
    for key, value in cond.items():
        inside = isinstance(value, Mapping)
        found |= flattened(value, f"{at}{key}.") if inside else {f"{at}{key}": value}
    return found


def nested(cond: Mapping[str, Any]) -> dict[str, Any]:
    """Dicts out of keys that are joined by dots, as arrays in files are named."""
    found: dict[str, Any] = {}
    for name, value in cond.items():
        *parents, key = name.split(".")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = value
    return found


def layout(cond: Any, name: str = "cond") -> dict[str, str]:
    """Dtype and shape of the rows of each tensor: what batches of one source have in common."""
    held = [] if cond is None else named(cond, name)
    return {at: f"{str(x.dtype).removeprefix('torch.')} {list(x.shape[1:])}" for at, x in held}


def rows_of(cond: Any, index: slice | Tensor) -> Any:
    """Some of the rows; None of None."""
    return None if cond is None else each(lambda x: x[index], cond)


def joined(*conds: Any) -> Any:
    """The rows of one after those of another."""
    return each(lambda *parts: torch.cat(parts), *conds)


def check_rows(cond: Any, n: int, name: str = "cond") -> None:
    """Raise TypeError or ValueError unless `cond` is None or tensors of n rows."""
    if cond is None or (isinstance(cond, Tensor) and cond.shape[:1] == (n,)):
        return
    held = named(cond, name)
    if not held:
        raise ValueError(f"{name} holds no tensor: give None for no condition")
    for at, x in held:
        if not isinstance(x, Tensor):
            raise TypeError(f"{at} must be a tensor of one row per sample, got {type(x).__name__}")
        if x.shape[:1] != (n,):
            raise ValueError(f"{at} must have one row per sample, {n}, got shape {list(x.shape)}")


def unconditional(cond: Any, null: Null) -> Any:
    """The null condition for every row.

    Raises:
        ValueError: null is None, or of other containers than cond.
    """
    return _by_null(lambda x, v: _like(x, v), cond, null)


def replaced(cond: Any, null: Null, rows: Tensor) -> Any:
    """The null condition in some rows, given as bool ``[B]``; see `unconditional`."""

    def one(x: Tensor, v: Any) -> Tensor:
        if v is None:
            return x
        mask = rows.reshape(-1, *[1] * (x.dim() - 1))
        return torch.where(mask, v.to(x), x) if isinstance(v, Tensor) else x.masked_fill(mask, v)

    return _by_null(one, cond, null)


def _like(x: Tensor, v: Any) -> Tensor:
    if v is None:
        return x
    return v.to(x).expand_as(x) if isinstance(v, Tensor) else torch.full_like(x, v)


def _by_null(function: Callable[..., Any], cond: Any, null: Null) -> Any:
    if null is None:
        raise ValueError("guidance needs null_condition, got None")
    if isinstance(cond, Tensor) and not isinstance(null, (Tensor, int, float)):
        raise ValueError(
            f"cond is a tensor, and null_condition a {type(null).__name__}: it must be a number "
            "or a tensor"
        )
    try:
        return _paired(function, cond, null)
    except LookupError:
        raise ValueError(
            "null_condition must consist of the same containers as cond, None where a tensor "
            f"stays: cond holds {[name for name, _ in named(cond)]}, null_condition "
            f"{[name for name, _ in named(null, 'null')]}"
        ) from None


def _paired(function: Callable[..., Any], cond: Any, null: Any) -> Any:
    """The function of every tensor and its null; lists and tuples are alike, as in a DataLoader."""
    if isinstance(cond, dict):
        if not isinstance(null, dict) or null.keys() != cond.keys():
            raise LookupError
        return {name: _paired(function, x, null[name]) for name, x in cond.items()}
    if isinstance(cond, (tuple, list)):
        if not isinstance(null, (tuple, list)) or len(null) != len(cond):
            raise LookupError
        parts = [_paired(function, x, v) for x, v in zip(cond, null, strict=True)]
        return type(cond)(*parts) if hasattr(cond, "_fields") else type(cond)(parts)
    if isinstance(null, (dict, tuple, list)):
        raise LookupError
    return function(cond, null)


def append_weight(cond: Any, weight: float | Tensor, n: int | None = None) -> Any:
    """Conditioning for a network that takes the guidance weight as an input.

    Args:
        cond: ``[B]`` labels (below 2**24, exact in float32), ``[B, C]`` features, a dict, or None.
        weight: one number, or ``[B]``.
        n: B, where `cond` is None.

    Returns:
        float32 ``[B, C + 1]`` (C = 1 for labels, 0 for None), the weight in the last column; a dict
        with the weight, float32 ``[B]``, as "guidance".

    Raises:
        ValueError: neither cond nor n is given; a cond of another rank or kind.
    """
    if isinstance(cond, dict):
        first = next(iter(_pytree.tree_leaves(cond)))
        w = torch.as_tensor(weight, dtype=torch.float32, device=first.device)
        return {**cond, WEIGHT: w.expand(len(first))}
    if cond is None and n is None:
        raise ValueError("append_weight needs cond or n, got neither")
    if cond is not None and not (isinstance(cond, Tensor) and cond.dim() in (1, 2)):
        shown = f"shape {list(cond.shape)}" if isinstance(cond, Tensor) else type(cond).__name__
        raise ValueError(
            f"cond must be [B], [B, C] or a dict to be joined by a weight of guidance, got {shown}"
        )
    if cond is None:
        columns = torch.empty(n or 0, 0, dtype=torch.float32)
    else:
        columns = cond.reshape(len(cond), -1).float()
    w = torch.as_tensor(weight, dtype=torch.float32, device=columns.device)
    return torch.cat([columns, w.expand(len(columns))[:, None]], dim=1)


def split_weight(cond: Any) -> tuple[Any, Tensor]:
    """The inverse of `append_weight`, for use inside the network.

    Returns:
        (features ``[B, C]``, weight ``[B]``), float32; labels are ``features[:, 0].long()``. Of a
        dict what else it holds, and the weight.
    """
    if isinstance(cond, dict):
        return {name: x for name, x in cond.items() if name != WEIGHT}, cond[WEIGHT]
    return cond[:, :-1], cond[:, -1]
