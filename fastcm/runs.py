"""What run directories of ``fastcm train`` are about: their data, and the labels to sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcm import recipes
from fastcm.checkpoint import RUN_STATE, load_newest
from fastcm.data import Dataset, as_source
from fastcm.description import differences
from fastcm.sampler import Sampler


def datasets(run: Path) -> tuple[Dataset, Dataset]:
    """Training and held-out data of a run.

    Raises:
        FileNotFoundError, ValueError: no run of ``fastcm train``, or its data has changed since.
    """
    train_data, held_out = recipes.of_run(run).datasets()
    source = as_source(train_data, seed=0, device="cpu")
    found, _ = load_newest(run, only=set(), requires=RUN_STATE)
    changed = differences(found.state["config"]["data"], source.describe())
    if changed:
        raise ValueError(f"the data of {run} is not what it was trained on: {'; '.join(changed)}")
    return train_data, held_out


def labels(sampler: Sampler, n: int, label: int | None = None) -> Tensor | None:
    """The labels of n samples, int64 ``[n]``: all in turn, or one; None without conditioning.

    Raises:
        ValueError: a label that the network does not know.
    """
    description: Any = getattr(sampler.net, "description", {})
    classes = description.get("num_classes")
    if classes is None:
        if label is not None:
            raise ValueError("--label needs a run that was trained with --conditional")
        return None
    if label is not None and not 0 <= label < classes:
        raise ValueError(f"--label must be in [0, {classes}), got {label}")
    return torch.arange(n) % classes if label is None else torch.full((n,), label)
