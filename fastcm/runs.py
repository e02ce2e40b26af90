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


def labels(sampler: Sampler, n: int, label: int | None = None, *, first: int = 0) -> Tensor | None:
    """Labels of samples first .. first + n - 1, int64 ``[n]``; None if the network has no classes.

    Args:
        sampler: whose network's description says how many classes there are.
        n: how many.
        label: of all; default i % classes for sample i.
        first: index of the first.

    Raises:
        ValueError: a label without classes, or out of their range.
    """
    description: Any = getattr(sampler.net, "description", {})
    classes = description.get("num_classes")
    if classes is None:
        if label is not None:
            raise ValueError("--label needs a run that was trained with --conditional")
        return None
    if label is not None and not 0 <= label < classes:
        raise ValueError(f"--label must be in [0, {classes}), got {label}")
    return torch.arange(first, first + n) % classes if label is None else torch.full((n,), label)
