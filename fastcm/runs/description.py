"""JSON descriptions of configurations, for run.json, for resuming and for rebuilding."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastcm import paths
from fastcm.parameterization import Parameterization
from fastcm.runs.checkpoint import digest, plain, weights_of

PATHS = (paths.Linear, paths.VarianceExploding, paths.TrigFlow, paths.VariancePreserving)


def describe(value: object) -> Any:
    """A JSON-able description of a configuration value: equal values, equal descriptions.

    Frozen dataclasses become their fields, modules and tensors a fingerprint of their contents,
    functions their qualified name.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, nn.Module):
        return {"type": type(plain(value)).__name__, "weights": digest(weights_of(value))}
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "values": digest({"": value})}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    name = getattr(value, "__qualname__", None) or type(value).__qualname__
    return f"{getattr(value, '__module__', '')}.{name}"


def differences(old: object, new: object, name: str = "") -> list[str]:
    """Where two descriptions differ: "name: old -> new" each."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [
            line
            for k in keys
            for line in differences(old.get(k), new.get(k), f"{name}.{k}" if name else str(k))
        ]
    return [] if old == new else [f"{name}: {old!r} -> {new!r}"]


def parameterization_from(description: Mapping[str, Any]) -> Parameterization:
    """The inverse of `describe` for a parameterization.

    Raises:
        ValueError: a path of no known name.
    """
    fields = dict(description["path"])
    name = fields.pop("type")
    known = {path.__name__: path for path in PATHS}
    if name not in known:
        raise ValueError(f"unknown path {name!r}, known are {sorted(known)}")
    return Parameterization(known[name](**fields), description["prediction"])
