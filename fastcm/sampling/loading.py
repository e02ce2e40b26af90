"""The network of a run, whole or in the shards of several processes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastcm import networks
from fastcm.runs import frozen
from fastcm.runs.checkpoint import RUN_STATE, Checkpoint, load_newest
from fastcm.sharding import spread
from fastcm.sharding.materialise import materialise_from

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def network_of_run(
    directory: str | Path,
    *,
    ema: int,
    net: nn.Module | None,
    device: torch.device | str,
    mesh: DeviceMesh | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a run's last good checkpoint, and the checkpoint's state.

    Args:
        directory, ema, net: see `fastcm.Sampler.from_run`.
        device: of the shards.
        mesh: of the processes that share the network, or None.

    Raises:
        FileNotFoundError, ValueError: no run there; no net where it is needed, or another's.
    """
    group = "model" if ema == -1 else f"average_{ema}"
    only = {group} if mesh is None else set()
    found, damaged = load_newest(Path(directory), only=only, requires=RUN_STATE)
    for error in damaged:
        warnings.warn(f"{error}; falling back to {found.path}", stacklevel=3)
    state = found.state
    if not -1 <= ema < state["num_averages"]:
        raise ValueError(f"ema must be in [-1, {state['num_averages']}) for {directory}, got {ema}")
    if mesh is not None:
        return _shards(found, group, net, torch.device(device), mesh), state
    if net is None:
        frozen.check_whole(found)
        net = networks.build(_described(found, directory))
    frozen.fill(net, found, group)
    return net, state


def _shards(
    found: Checkpoint, group: str, net: nn.Module | None, device: torch.device, mesh: DeviceMesh
) -> nn.Module:
    frozen.check_whole(found)
    if net is None:
        with torch.device("meta"):
            net = networks.build(_described(found, found.path.parents[1]))
    spread(net.requires_grad_(False), mesh, trained=False)
    materialise_from(net, found.path, group, device=device)
    return net


def _described(found: Checkpoint, directory: str | Path) -> dict[str, Any]:
    described: dict[str, Any] | None = found.state["network"]
    if described is None:
        raise ValueError(
            f"{directory} does not describe its network: give from_run(..., net=...) one "
            "of the same architecture"
        )
    return described
