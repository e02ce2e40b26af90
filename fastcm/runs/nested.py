"""A nested state as JSON and named tensors, for a checkpoint: nothing of it is pickled."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcm.runs.files import DTYPES, CheckpointError

_TENSOR, _ARRAY, _TUPLE = "$tensor", "$array", "$tuple"
_KINDS = "biuf"
_MAX_BYTES = 2**20
_MAX_DEPTH = 30


def flatten(state: Any, what: str) -> tuple[Any, dict[str, Tensor]]:
    """A state of dicts, lists, tuples, numbers, strings, tensors and arrays, in two parts.

    Args:
        state: dicts have strings as their keys.
        what: it is, for errors.

    Returns:
        What JSON can hold, and the tensors that it names.

    Raises:
        ValueError: there is something else in it, named by its place; or it is larger than a
            position should be.
    """
    tensors: dict[str, Tensor] = {}
    plain = _plain(state, what, tensors, _MAX_DEPTH)
    size = len(json.dumps(plain))
    if size > _MAX_BYTES:
        raise ValueError(
            f"{what} has {size} bytes of JSON, at most {_MAX_BYTES} are saved: have state_dict "
            "return a position, not data, or large parts of it as tensors"
        )
    return plain, tensors


def _plain(value: Any, at: str, tensors: dict[str, Tensor], depth: int) -> Any:
    if depth == 0:
        raise ValueError(f"{at:.200} is nested more than {_MAX_DEPTH} deep")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):  # a number of numpy
        return _plain(value.item(), at, tensors, depth - 1)
    name = str(len(tensors))
    if isinstance(value, Tensor) and value.dtype in DTYPES:
        tensors[name] = value.detach().cpu().clone()
        return {_TENSOR: name}
    if isinstance(value, np.ndarray) and value.dtype.kind in _KINDS:
        tensors[name] = torch.frombuffer(bytearray(value.tobytes() or b"0"), dtype=torch.uint8)
        return {_ARRAY: [name, value.dtype.str, list(value.shape)]}
    if isinstance(value, tuple | list):
        parts = [_plain(v, f"{at}[{i}]", tensors, depth - 1) for i, v in enumerate(value)]
        return {_TUPLE: parts} if isinstance(value, tuple) else parts
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str) or key.startswith("$")]
        if wrong:
            raise ValueError(f"{at} has the key {wrong[0]!r}: keys must be strings without $")
        return {k: _plain(v, f"{at}[{k!r}]", tensors, depth - 1) for k, v in value.items()}
    kind = f"{type(value).__module__}.{type(value).__name__}"
    raise ValueError(
        f"{at} is a {kind}, which a checkpoint does not hold: have state_dict return numbers, "
        "strings, tensors, and dicts and lists of these"
    )


def unflatten(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten`.

    Raises:
        CheckpointError: a tensor is missing, or is not what the state says.
    """
    if isinstance(plain, list):
        return [unflatten(value, tensors) for value in plain]
    if not isinstance(plain, dict):
        return plain
    if len(plain) == 1:
        ((key, value),) = plain.items()
        if key == _TUPLE and isinstance(value, list):
            return tuple(unflatten(part, tensors) for part in value)
        if key == _TENSOR:
            return _named(value, tensors)
        if key == _ARRAY:
            return _array(value, tensors)
    return {key: unflatten(value, tensors) for key, value in plain.items()}


def _named(name: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    if not isinstance(name, str) or name not in tensors:
        raise CheckpointError(f"the state lacks its tensor {name!r:.100}")
    return tensors[name]


def _array(described: Any, tensors: Mapping[str, Tensor]) -> Any:
    try:
        name, kind, shape = described
        dtype = np.dtype(kind)
        if dtype.kind not in _KINDS:
            raise ValueError(f"{dtype} is not a number")
        count = math.prod(shape)
        array = np.frombuffer(_named(name, tensors).numpy().tobytes(), dtype, count)
        return array.reshape(shape).copy()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the state names the array {described!r:.100}: {error}") from error
