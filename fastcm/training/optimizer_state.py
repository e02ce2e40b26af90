"""Whether the saved state of an optimizer is one that this optimizer could have."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastcm.runs import checkpoint
from fastcm.runs.checkpoint import CheckpointError


def check_optimizer(
    name: str, optimizer: Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> dict[str, Any]:
    """The state to load, after every tensor's name, shape and dtype was compared.

    What is wanted is the state that the optimizer has. One of torch, which has none before its
    first step, shows it in a step of tiny parameters. Of any other without a state only the
    numbers of its parameters are known.

    Args:
        name: of the checkpoint, for messages.
        optimizer: that is to load.
        tensors, rest: what `flatten_optimizer` made of the saved state.

    Raises:
        CheckpointError: it does not fit.
    """
    where = f"{name}/optimizer"
    try:
        saved = checkpoint.unflatten_optimizer(tensors, rest)
        groups = [(dict(group), list(group["params"])) for group in saved["param_groups"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where} is not the state of an optimizer: {error!r}") from error
    live = optimizer.state_dict()
    numbers = [group["params"] for group in live["param_groups"]]
    if [params for _, params in groups] != numbers:
        raise CheckpointError(f"{where} does not fit: its parameters are grouped otherwise")
    for (theirs, _), ours in zip(groups, live["param_groups"]):
        if unexpected := sorted(theirs.keys() - ours.keys()):
            raise CheckpointError(f"{where} does not fit: option {unexpected[0]} is unexpected")
    known = {number for params in numbers for number in params}
    if unknown := sorted(saved["state"].keys() - known):
        raise CheckpointError(f"{where} does not fit: there is no parameter {unknown[0]}")
    wanted = _wanted(optimizer, live)
    if wanted is not None:
        # a parameter that never had a gradient has no state
        present = {k: v for k, v in wanted.items() if int(k.split(".")[0]) in saved["state"]}
        checkpoint.check_tensors(where, tensors, present)
    return saved


def _wanted(optimizer: Optimizer, live: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Meta tensors like those of the state; None if nobody knows."""
    if live["state"]:
        entries, _ = checkpoint.flatten_optimizer(live)
        return {name: _meta(tensor) for name, tensor in entries.items() if ".ema_" not in name}
    if not type(optimizer).__module__.startswith("torch.optim."):
        return None
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tiny = [_tiny(p) for p in parameters]
    # deepcopy takes what memo holds: the parameters are never copied
    memo: dict[int, object] = {id(p): t for p, t in zip(parameters, tiny)}
    twin = copy.deepcopy(optimizer, memo)
    for parameter in tiny:
        parameter.grad = torch.zeros_like(parameter)
    twin.step()
    found: dict[str, Tensor] = {}
    for number, (parameter, small) in enumerate(zip(parameters, tiny)):
        for name, value in twin.state[small].items():
            if isinstance(value, Tensor):
                shape = _grown(value.shape, small.shape, parameter.shape)
                found[f"{number}.{name}"] = torch.empty(shape, dtype=value.dtype, device="meta")
    return found


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _tiny(parameter: Tensor) -> torch.nn.Parameter:
    """A parameter of the same rank whose every size names its dimension."""
    shape = [2 + i for i in range(parameter.ndim)]
    return torch.nn.Parameter(torch.zeros(shape, dtype=parameter.dtype, device=parameter.device))


def _grown(state: torch.Size, small: torch.Size, large: torch.Size) -> list[int]:
    """The shape of a state, from the one it has for a tiny parameter."""
    if len(state) != len(small):
        return list(state)
    return [big if s == tiny else s for s, tiny, big in zip(state, small, large)]
