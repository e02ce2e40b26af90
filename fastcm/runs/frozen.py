"""Parameters that a run does not train, and may leave out of its checkpoints.

Whoever reads such a run brings a network that has them, a pretrained one with its LoRA layers, say;
a fingerprint tells whether they are those of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcm.runs.checkpoint import Checkpoint, check_tensors
from fastcm.runs.weights import digest, frozen_of, load_weights, weights_of


@dataclass(frozen=True)
class LeftOut:
    """The parameters that the checkpoints of a training lack.

    Args:
        names: of them.
        fingerprint: of names and values; None where there are none.
    """

    names: frozenset[str] = frozenset()
    fingerprint: str | None = None

    @classmethod
    def of(cls, net: nn.Module) -> LeftOut:
        """Those of a network that require no gradient."""
        frozen = frozen_of(net)
        return cls(frozenset(frozen), _fingerprint(frozen) if frozen else None)


def _fingerprint(frozen: Mapping[str, Tensor]) -> str:
    """In float32: an average of a network in bfloat16 has the same numbers."""
    return digest(frozen, torch.float32)


def _recorded(config: object) -> object:
    return config.get("frozen") if isinstance(config, dict) else None


def check_resumes(run: Path, theirs: object, ours: Mapping[str, Any]) -> None:
    """Raise ValueError if two configurations of a training leave out different things."""
    old, new = _recorded(theirs), ours["frozen"]
    if old is None and new is not None:
        raise ValueError(f"{run} holds its frozen parameters: resume it with save_frozen=True")
    if new is None and old is not None:
        raise ValueError(
            f"{run} leaves out its frozen parameters: resume it with save_frozen=False, and a "
            "network that has the same ones frozen"
        )
    _check_base(run, old, new)


def check_whole(found: Checkpoint) -> None:
    """Raise ValueError if a checkpoint alone does not make a network."""
    if _recorded(found.state.get("config")) is not None:
        raise ValueError(
            f"{_run(found)} leaves out its frozen parameters: give net=, a network that has them"
        )


def fill(net: nn.Module, found: Checkpoint, group: str) -> None:
    """Load weights of a checkpoint into a network, which has those that it leaves out.

    Args:
        net: of the run's architecture.
        found: with the group.
        group: "model" or "average_0", ...

    Raises:
        CheckpointError: the checkpoint is of another network.
        ValueError: it leaves out parameters, and the network's are others.
    """
    weights, live = found.groups[group], weights_of(net)
    fingerprint, rest = _recorded(found.state.get("config")), {}
    if fingerprint is not None:
        rest = {name: live.pop(name) for name in live.keys() - weights.keys()}
    check_tensors(found.path.name, weights, live)
    if fingerprint is not None:
        _check_base(_run(found), fingerprint, _fingerprint(rest))
    load_weights(net, weights)


def _run(found: Checkpoint) -> Path:
    return found.path.parent.parent


def _check_base(run: Path, wanted: object, found: object) -> None:
    if wanted != found:
        raise ValueError(
            f"the frozen parameters are not those of {run}, which leaves them out of its "
            "checkpoints: give a network with the weights that the run began with"
        )
