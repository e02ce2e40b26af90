"""What of a trainer goes into a checkpoint, and how it comes back."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastcm.runs import checkpoint
from fastcm.runs.checkpoint import CheckpointError
from fastcm.runs.description import differences
from fastcm.training.optimizer_state import check_optimizer

if TYPE_CHECKING:
    from fastcm.training.trainer import Trainer


def contents(trainer: Trainer) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What a checkpoint of a trainer holds: live tensors by group and name, and the JSON state."""
    optimizer, rest = checkpoint.flatten_optimizer(trainer.optimizer.state_dict())
    # averages are saved by the names of the network, below
    optimizer = {name: t for name, t in optimizer.items() if ".ema_" not in name}
    rest["param_groups"] = [
        {**group, "lr": lr} for group, lr in zip(rest["param_groups"], trainer.base_lr)
    ]
    groups = {
        "model": trainer.net.state_dict(),
        "optimizer": optimizer,
        **{f"average_{i}": n.state_dict() for i, n in enumerate(trainer.networks)},
        "random": _random(trainer.device),
        "counters": {"counts": trainer.update.counts},
    }
    state = {
        "config": trainer.config(),
        "compiled": trainer.gradients.compiled,
        "optimizer": rest,
        "num_averages": len(trainer.networks),
        **trainer.metadata,
    }
    return groups, state


def _random(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def read(trainer: Trainer, run: Path) -> None:
    """Put a trainer where the run's newest intact checkpoint is; see `Trainer.load`."""
    found, damaged = checkpoint.load_newest(run, requires=checkpoint.RUN_STATE)
    for error in damaged:
        warnings.warn(f"{error}; falling back to {found.path}", stacklevel=2)
    old = found.state.get("config")
    changed = differences(old, json.loads(json.dumps(trainer.config())))
    if changed:
        raise ValueError(f"{run} was trained under another configuration: " + "; ".join(changed))
    groups, name = found.groups, found.path.name
    networks = {"model": trainer.net, **{f"average_{i}": n for i, n in enumerate(trainer.networks)}}
    fixed = {
        **{group: network.state_dict() for group, network in networks.items()},
        "counters": {"counts": trainer.update.counts},
    }
    _check_names(name, groups, {*fixed, "optimizer", "random"})
    for group, wanted in fixed.items():
        checkpoint.check_tensors(f"{name}/{group}", groups[group], wanted)
    if not isinstance(found.state["compiled"], bool | None):
        raise CheckpointError(f"{name}: compiled is {found.state['compiled']!r:.100}")
    random = _random(trainer.device)
    # the states of a GPU are of no use without one, and lack where there was none
    checkpoint.check_tensors(
        f"{name}/random",
        {k: v for k, v in groups["random"].items() if k in random or k != "cuda"},
        {k: v for k, v in random.items() if k in groups["random"] or k == "cpu"},
    )
    saved = check_optimizer(name, trainer.optimizer, groups["optimizer"], found.state["optimizer"])
    try:
        trainer.optimizer.load_state_dict(saved)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{found.path}: optimizer state does not fit: {error}") from error
    for group, network in networks.items():
        network.load_state_dict(groups[group])
    trainer.update.counts.copy_(groups["counters"]["counts"])
    torch.set_rng_state(groups["random"]["cpu"])
    if trainer.device.type == "cuda" and "cuda" in groups["random"]:
        torch.cuda.set_rng_state(groups["random"]["cuda"], trainer.device)
    if trainer.gradients.compiled is None:  # what "auto" chose: the same numbers after a resume
        trainer.gradients.compiled = found.state["compiled"]
    trainer.step = found.state["step"]
    trainer.key.step.fill_(trainer.step)  # in place: a captured step reads it


def _check_names(name: str, found: Mapping[str, object], wanted: set[str]) -> None:
    wrong = [f"{group} is missing" for group in sorted(wanted - found.keys())]
    wrong += [f"{group} is unexpected" for group in sorted(found.keys() - wanted)]
    if wrong:
        raise CheckpointError(f"{name} does not fit: {', '.join(wrong)}")
