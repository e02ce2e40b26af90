"""Averages of any width after the training, from snapshots of power-function averages.

Keep one or two `PowerEMA` in a run and more than the newest checkpoint (``keep=``). A profile of
another width, ending at any step in between, is then the least-squares combination of the stored
ones.

Source: Karras et al. 2023, "Analyzing and improving the training dynamics of diffusion models"
(EDM2), section 3.2 and algorithm 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastcm.ema import PowerEMA
from fastcm.runs import checkpoint
from fastcm.runs.checkpoint import CheckpointError

Profile = tuple[float, PowerEMA]
"""An average after so many updates."""


def _inner(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """Inner products of profiles (end, gamma): EDM2, eq. 124."""
    (t_a, gamma_a), (t_b, gamma_b) = a, b
    exponent = torch.where(t_a < t_b, gamma_b, -gamma_a)
    ratio = (t_a / t_b) ** exponent
    scale = (gamma_a + gamma_b + 1) * torch.maximum(t_a, t_b)
    return (gamma_a + 1) * (gamma_b + 1) * ratio / scale


def weights(stored: Sequence[Profile], wanted: Profile) -> Tensor:
    """Weights of the stored averages whose sum is closest to the wanted profile; they add to 1.

    Args:
        stored: (updates, average) of each snapshot; no two alike.
        wanted: (updates, average), 0 < updates <= the latest of the stored.

    Returns:
        float64 ``[len(stored)]``.

    Raises:
        ValueError: nothing stored, snapshots that repeat, or updates out of range.
    """
    if not stored:
        raise ValueError("no snapshot of a PowerEMA to reconstruct from")
    if len(set(stored)) < len(stored):
        raise ValueError(f"snapshots repeat: {stored}")
    latest = max(updates for updates, _ in stored)
    if not 0 < wanted[0] <= latest or any(updates <= 0 for updates, _ in stored):
        raise ValueError(
            f"updates must be in (0, {latest}], where the snapshots end, got {wanted[0]}"
        )
    ends = torch.tensor([updates for updates, _ in stored], dtype=torch.float64)
    gammas = torch.tensor([average.gamma for _, average in stored], dtype=torch.float64)
    end = torch.tensor([wanted[0]], dtype=torch.float64)
    gamma = torch.tensor([wanted[1].gamma], dtype=torch.float64)
    gram = _inner((ends[:, None], gammas[:, None]), (ends, gammas))
    # close snapshots make nearly equal rows: least squares, not an inverse
    found = torch.linalg.lstsq(gram, _inner((ends, gammas), (end, gamma)), driver="gelsd")
    # a weight that never changed is its own average
    solution: Tensor = found.solution / found.solution.sum()
    return solution


def combine(snapshots: Iterable[Mapping[str, Tensor]], factors: Tensor) -> dict[str, Tensor]:
    """The weighted sum of state dicts; integer entries are those of the last one.

    Args:
        snapshots: as many as `factors`; read one at a time.
        factors: ``[n]``, see `weights`.

    Returns:
        Tensors of the dtype of the snapshots, summed in float64.
    """
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for snapshot, factor in zip(snapshots, factors.tolist(), strict=True):
        for name, value in snapshot.items():
            dtypes[name] = value.dtype
            if not value.is_floating_point():
                total[name] = value
            elif name in total:
                total[name].add_(value.double(), alpha=factor)
            else:
                total[name] = factor * value.double()
    return {name: value.to(dtypes[name]) for name, value in total.items()}


def from_run(
    directory: str | Path, average: PowerEMA, *, step: int | None = None
) -> dict[str, Tensor]:
    """The weights of a run under an average that it did not keep.

    Args:
        directory: of a run with a `PowerEMA` among its averages and several checkpoints.
        average: the wanted one.
        step: where its profile ends; default at the newest checkpoint.

    Returns:
        A state dict for the network of the run; without the frozen parameters, if it leaves out
        these.

    Raises:
        FileNotFoundError, CheckpointError: no checkpoint, or none that is intact.
        ValueError: no `PowerEMA` was kept, or `step` is beyond the newest checkpoint.
    """
    stored: list[Profile] = []
    places: list[tuple[Path, str]] = []
    paths = checkpoint.list_checkpoints(Path(directory))
    if not paths:
        raise FileNotFoundError(f"no checkpoint in {directory}: is it the directory of a run?")
    for path in reversed(paths):
        try:
            state = checkpoint.load(path, only=set(), requires=("config",)).state
        except CheckpointError:
            continue
        for i, kept in enumerate(state["config"]["averages"]):
            if kept["type"] == "PowerEMA":
                stored.append((state["step"], PowerEMA(kept["std"])))
                places.append((path, f"average_{i}"))
    if not stored:
        raise ValueError(
            f"no intact checkpoint of {directory} has a PowerEMA: train with "
            "averages=(PowerEMA(0.05), PowerEMA(0.10))"
        )
    factors = weights(stored, (stored[-1][0] if step is None else step, average))
    loaded = (checkpoint.load(path, only={group}).groups[group] for path, group in places)
    return combine(loaded, factors)
