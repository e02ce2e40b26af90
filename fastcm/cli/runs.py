"""Directories of runs: opened for training, and read for their recipe, data and labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from fastcm import hub
from fastcm.cli.recipes import IN_MEMORY, Recipe
from fastcm.data import Dataset, Shards, as_source
from fastcm.data.datasets import as_condition, condition_of, read_arrays
from fastcm.data.encoded import encoded_prompts
from fastcm.networks.conditions import named, nested, rows_of
from fastcm.runs import checkpoint
from fastcm.runs.checkpoint import RUN_STATE, load_newest
from fastcm.runs.description import differences
from fastcm.runs.lock import RunLock
from fastcm.sampling import Sampler, append_weight
from fastcm.sampling.loops import Method

RUN_FILE = "run.json"


def open_run(directory: Path, settings: Mapping[str, Any], *, resume: bool) -> bool:
    """Prepare a run directory; returns whether there is a checkpoint to resume from.

    Raises:
        FileExistsError: the directory holds a run and `resume` is False.
        BlockingIOError: another process trains in it.
        ValueError: it holds a run of other settings.
    """
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file, not a directory for a run")
    data = json.dumps(settings, indent=1).encode()
    if not holds_run(directory):
        with RunLock(directory):
            if not holds_run(directory):  # nobody was faster
                checkpoint.replace_file(directory / RUN_FILE, data)
                return False
    if not resume:
        raise FileExistsError(
            f"{directory} holds a run already: continue it with --resume, or choose another --out"
        )
    if (directory / RUN_FILE).exists():  # if not, none is made: nobody has checked these settings
        old, settings = read_run(directory), json.loads(data)
        changed = [
            f"--{name.replace('_', '-')}: {old.get(name)!r} -> {settings.get(name)!r}"
            for name in sorted({*old, *settings})
            if old.get(name) != settings.get(name)
        ]
        if changed:
            raise ValueError(f"{directory} is a run of other settings: " + "; ".join(changed))
    return bool(checkpoint.list_checkpoints(directory))


def holds_run(directory: Path) -> bool:
    """Whether a directory has the settings or a checkpoint of a run."""
    return (directory / RUN_FILE).exists() or bool(checkpoint.list_checkpoints(directory))


def read_run(directory: Path) -> dict[str, Any]:
    """The settings of a run.

    Raises:
        FileNotFoundError, ValueError: there are none, or they cannot be read.
    """
    path = directory / RUN_FILE
    if not path.exists():
        raise FileNotFoundError(f"{directory} is not a run directory: it has no {RUN_FILE}")
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings")
    return settings


def sampling_method(directory: Path) -> Method:
    """How samples are drawn from a run unless the user says otherwise.

    Raises:
        FileNotFoundError, CheckpointError: see `fastcm.sampling.Sampler.from_run`.
    """
    state = load_newest(directory, only=set(), requires=RUN_STATE)[0].state
    return hub.sampling_method(state["config"]["objective"]["type"])


def shift_of(directory: Path) -> float | None:
    """The shift of the times that a run of ``fastcm train`` was given; None for none."""
    if not (directory / RUN_FILE).is_file():
        return None
    shift = read_run(directory).get("shift")
    return None if shift is None else float(shift)


def of_run(directory: Path) -> Recipe:
    """The recipe that a run directory was made with.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is not one of this version.
    """
    settings = read_run(directory)
    try:
        return Recipe(**{**settings, "ema": tuple(settings["ema"])})
    except (KeyError, TypeError) as error:
        path = directory / RUN_FILE
        raise ValueError(f"{path} does not hold the settings of a run: {error}") from error


def datasets(run: Path) -> tuple[Dataset, Dataset]:
    """Training and held-out data of a run; of shards the first rows.

    Raises:
        FileNotFoundError, ValueError: no run of ``fastcm train``, or its data has changed since.
    """
    train_data, held_out = of_run(run).datasets()
    source = as_source(train_data, seed=0, device="cpu")
    found, _ = load_newest(run, only=set(), requires=RUN_STATE)
    changed = differences(found.state["config"]["data"], source.describe())
    if changed:
        raise ValueError(f"the data of {run} is not what it was trained on: {'; '.join(changed)}")
    if isinstance(train_data, Shards):
        train_data = train_data.to_memory(IN_MEMORY)
    return train_data, held_out


def condition(
    sampler: Sampler, labels: Any, guidance: float | list[float] | None, n: int
) -> dict[str, Any]:
    """The arguments cond and guidance of a sampler, for n labels and a weight, or one per time.

    A network that takes the weight as an input has it in its condition, 1 unless given; it takes
    one number.
    """
    if not getattr(sampler.net, "description", {}).get("guided"):
        return {"cond": labels, "guidance": guidance}
    assert not isinstance(guidance, list)
    return {"cond": append_weight(labels, 1.0 if guidance is None else guidance, n)}


def read_condition(file: Path) -> Any:
    """The condition in a file of arrays: the only one, or a dict of several by their names.

    Also of all prompts in a folder of ``fastcm encode``.

    Raises:
        FileNotFoundError, ValueError: no such file, or it cannot be read or is of another kind.
    """
    if file.is_dir():
        cond: Any = encoded_prompts(file)
    elif file.suffix == ".safetensors":
        try:
            held = safetensors.torch.load_file(file, device="cpu")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is not a readable .safetensors file: {error}") from error
        cond = nested(held) if len(held) != 1 else next(iter(held.values()))
    elif file.suffix in (".npy", ".npz"):
        cond = condition_of(read_arrays(file))
    else:
        raise ValueError(f"--cond must be a .npy, .npz or .safetensors file, got {file}")
    lengths = {name: len(x) if x.dim() else 0 for name, x in named(cond)}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"{file} must hold as many rows of each array, got {lengths}")
    return as_condition(cond)


def labels(
    sampler: Sampler, n: int, label: int | None = None, *, first: int = 0, cond: Any = None
) -> Any:
    """The condition of samples first .. first + n - 1; None if the network has no classes.

    Args:
        sampler: whose network's description says how many classes there are.
        n: how many.
        label: of all; default i % classes for sample i.
        first: index of the first.
        cond: rows that samples have in turn, instead of labels.

    Returns:
        int64 ``[n]``, or n rows of `cond`.

    Raises:
        ValueError: a label without classes, or out of their range; label and cond.
    """
    if cond is not None:
        if label is not None:
            raise ValueError("--label has no meaning beside --cond, which holds the labels")
        return rows_of(cond, torch.arange(first, first + n) % len(named(cond)[0][1]))
    description: Any = getattr(sampler.net, "description", {})
    classes = description.get("num_classes")
    if classes is None:
        if label is not None:
            raise ValueError("--label needs a run that was trained with --conditional")
        return None
    if label is not None and not 0 <= label < classes:
        raise ValueError(f"--label must be in [0, {classes}), got {label}")
    return torch.arange(first, first + n) % classes if label is None else torch.full((n,), label)
