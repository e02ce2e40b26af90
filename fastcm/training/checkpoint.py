"""What of a trainer goes into a checkpoint, and how it comes back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from fastcm import checkpoint
from fastcm.checkpoint import CheckpointError
from fastcm.description import differences

if TYPE_CHECKING:
    from fastcm.training.trainer import Trainer


def write(trainer: Trainer, run: Path) -> Path:
    """Save a trainer into a run; see `Trainer.save`."""
    optimizer, rest = checkpoint.flatten_optimizer(trainer.optimizer.state_dict())
    # averages are saved by the names of the network, below
    optimizer = {name: t for name, t in optimizer.items() if ".ema_" not in name}
    rest["param_groups"] = [
        {**group, "lr": lr} for group, lr in zip(rest["param_groups"], trainer.base_lr)
    ]
    random = {"cpu": torch.get_rng_state()}
    if trainer.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(trainer.device)
    return checkpoint.save(
        run,
        trainer.step,
        {
            "model": trainer.net.state_dict(),
            "optimizer": optimizer,
            **{f"average_{i}": n.state_dict() for i, n in enumerate(trainer.networks)},
            "random": random,
            "counters": {"counts": trainer.update.counts},
        },
        {
            "config": trainer.config(),
            "compiled": trainer.gradients.compiled,
            "optimizer": rest,
            "num_averages": len(trainer.networks),
            **trainer.metadata,
        },
        keep=trainer.keep,
    )


def read(trainer: Trainer, run: Path) -> None:
    """Put a trainer where the run's newest intact checkpoint is; see `Trainer.load`."""
    found, damaged = checkpoint.load_newest(run, requires=checkpoint.RUN_STATE)
    for error in damaged:
        warnings.warn(f"{error}; falling back to {found.path}", stacklevel=2)
    old = found.state.get("config")
    changed = differences(old, json.loads(json.dumps(trainer.config())))
    if changed:
        raise ValueError(f"{run} was trained under another configuration: " + "; ".join(changed))
    groups = found.groups
    networks = {f"average_{i}": n for i, n in enumerate(trainer.networks)}
    for name, network in {"model": trainer.net, **networks}.items():
        checkpoint.check_tensors(
            f"{found.path.name}/{name}", groups.get(name, {}), network.state_dict()
        )
    try:
        trainer.optimizer.load_state_dict(
            checkpoint.unflatten_optimizer(groups["optimizer"], found.state["optimizer"])
        )
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{found.path}: optimizer state does not fit: {error}") from error
    for name, network in {"model": trainer.net, **networks}.items():
        network.load_state_dict(groups[name])
    trainer.update.counts.copy_(groups["counters"]["counts"])
    torch.set_rng_state(groups["random"]["cpu"])
    if trainer.device.type == "cuda" and "cuda" in groups["random"]:
        torch.cuda.set_rng_state(groups["random"]["cuda"], trainer.device)
    if trainer.gradients.compiled is None:  # what "auto" chose: the same numbers after a resume
        trainer.gradients.compiled = cast("bool | None", found.state["compiled"])
    trainer.step = int(found.state["step"])
    trainer.key.step.fill_(trainer.step)  # in place: a captured step reads it
