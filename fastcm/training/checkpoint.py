"""What of a training goes into a checkpoint, and how it comes back."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcm.runs import checkpoint, frozen
from fastcm.runs.checkpoint import NULL, CheckpointError
from fastcm.runs.description import differences
from fastcm.training.optimizer_state import check_optimizer
from fastcm.training.processes import Processes
from fastcm.training.sharded_state import wanted
from fastcm.training.state import State


def contents(
    state: State, config: Mapping[str, Any], metadata: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What a checkpoint holds: live tensors by group and name, and the JSON state.

    Args:
        state: of the training.
        config: what must agree for a run to be resumed.
        metadata: what a sampler must know of the network.
    """
    optimizer, rest = checkpoint.flatten_optimizer(state.optimizer.state_dict())
    # averages are saved by the names of the network, below
    optimizer = {name: t for name, t in optimizer.items() if ".ema_" not in name}
    rest["param_groups"] = [
        {**group, "lr": lr} for group, lr in zip(rest["param_groups"], state.base_lr)
    ]
    data, position = state.data.contents()
    described = dict(metadata)
    null = {NULL: tensors} if (tensors := described.pop(NULL)) else {}
    groups = {
        **state.weights(),
        "optimizer": optimizer,
        "random": _random(state.device),
        "counters": {"counts": state.update.counts},
        **data,
        **null,
    }
    described |= {
        **position,
        "config": config,
        "compiled": state.gradients.compiled,
        "optimizer": rest,
        "num_averages": len(state.update.averages),
    }
    return groups, described


def _random(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore(state: State, run: Path, config: Mapping[str, Any], processes: Processes) -> None:
    """Put a training where the run's newest intact checkpoint is; see `Trainer.load`."""
    weights = state.weights()
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    found, damaged = checkpoint.load_newest(
        run,
        requires=checkpoint.RUN_STATE,
        select=wanted(weights, parameters),
        everywhere=processes.exchange,
    )
    for error in damaged:
        warnings.warn(f"{error}; falling back to {found.path}", stacklevel=3)
    frozen.check_resumes(run, found.state.get("config"), config)
    changed = differences(found.state.get("config"), json.loads(json.dumps(config)))
    if changed:
        raise ValueError(f"{run} was trained under another configuration: " + "; ".join(changed))
    groups, name = found.groups, found.path.name
    groups.pop(NULL, None)  # the configuration has agreed about it
    fixed = {
        **weights,
        "counters": {"counts": state.update.counts},
    }
    _check_names(name, groups, {*fixed, "optimizer", "random", *state.data.groups})
    for group, tensors in fixed.items():
        checkpoint.check_tensors(f"{name}/{group}", groups[group], tensors)
    if not isinstance(found.state["compiled"], bool | None):
        raise CheckpointError(f"{name}: compiled is {found.state['compiled']!r:.100}")
    random = _random(state.device)
    # the states of a GPU are of no use without one, and lack where there was none
    checkpoint.check_tensors(
        f"{name}/random",
        {k: v for k, v in groups["random"].items() if k in random or k != "cuda"},
        {k: v for k, v in random.items() if k in groups["random"] or k == "cpu"},
    )
    position = state.data.read(found)
    saved = check_optimizer(name, state.optimizer, groups["optimizer"], found.state["optimizer"])
    try:
        state.optimizer.load_state_dict(saved)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{found.path}: optimizer state does not fit: {error}") from error
    checkpoint.load_weights(state.net, groups["model"])
    for i in range(len(state.update.averages)):
        state.update.load_weights(i, groups[f"average_{i}"])
    state.update.counts.copy_(groups["counters"]["counts"])
    torch.set_rng_state(groups["random"]["cpu"])
    if state.device.type == "cuda" and "cuda" in groups["random"]:
        torch.cuda.set_rng_state(groups["random"]["cuda"], state.device)
    if state.gradients.compiled is None:  # what "auto" chose: the same numbers after a resume
        state.gradients.compiled = found.state["compiled"]
    state.step = found.state["step"]
    state.data.resume(position, state.step)
    state.key.step.fill_(state.step)  # in place: a captured step reads it


def _check_names(name: str, found: Mapping[str, object], wanted: set[str]) -> None:
    wrong = [f"{group} is missing" for group in sorted(wanted - found.keys())]
    wrong += [f"{group} is unexpected" for group in sorted(found.keys() - wanted)]
    if wrong:
        raise CheckpointError(f"{name} does not fit: {', '.join(wrong)}")
