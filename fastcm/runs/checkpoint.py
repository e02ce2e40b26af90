"""Checkpoints: directories of safetensors files and one state.json, complete or absent.

A checkpoint is written under a temporary name, flushed to the disk and renamed, so that whatever
interrupts the writing leaves the earlier ones intact. state.json names every file with its size
and SHA-256; a checkpoint that does not agree with it counts as damaged. Nothing is unpickled.

    RUN/run.json                       the configuration
    RUN/checkpoints/step_000000250/    state.json, model.safetensors, optimizer.safetensors, ...
                                       of a sharded run model.index.json and its files, see `shards`
    RUN/latest                         name of the newest checkpoint; moves last
    RUN/.lock                          held by the process that trains

Order is that of the step numbers in the names: no clock is asked.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastcm.runs import shards
from fastcm.runs.files import (
    WRITING,
    clear,
    discard,
    read_state,
    sync_directory,
    write,
    write_tensors,
)
from fastcm.runs.files import CheckpointError as CheckpointError
from fastcm.runs.files import replace_file as replace_file
from fastcm.runs.weights import digest as digest
from fastcm.runs.weights import load_weights as load_weights
from fastcm.runs.weights import plain as plain
from fastcm.runs.weights import weights_of as weights_of

FORMAT = 2
SHARDED = 3
"""Of a checkpoint with groups that several processes wrote, which older versions cannot read."""
RUN_STATE = (
    "config", "compiled", "optimizer", "num_averages",
    "network", "parameterization", "null_condition", "shape",
)  # fmt: skip
"""What `Trainer` adds to the state of its checkpoints."""
CHECKPOINTS = "checkpoints"
LATEST = "latest"
STATE = "state.json"
_NAME = re.compile(r"step_(\d+)(\.old)?")
_MAX_STEP = 2**63


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read: its JSON state and its tensors by group and name."""

    path: Path
    state: dict[str, Any]
    groups: dict[str, dict[str, Tensor]]


def save(
    run: Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int = 3,
    keep_every: int = 0,
) -> Path:
    """Write checkpoint `step` of a run, atomically, and drop all but the newest `keep`.

    At most one process may save into a run at a time, see `fastcm.runs.lock`.

    Args:
        run: the run directory; created if absent.
        step: the step counter.
        groups: named groups of tensors; one safetensors file each.
        state: JSON-able; stored beside them.
        keep: >= 1.
        keep_every: those of every so many steps are kept for ever; 0: none.

    Raises:
        OSError: the disk is full or not writable; the run's earlier checkpoints are untouched.
    """
    with writing(run, step) as temporary:
        files = {}
        for name, tensors in groups.items():
            files[f"{name}.safetensors"] = write_tensors(temporary / f"{name}.safetensors", tensors)
        final = commit(run, step, temporary, files, state)
    retire(run, step, keep, keep_every)
    return final


@contextmanager
def writing(run: Path, step: int) -> Iterator[Path]:
    """A directory to write a checkpoint's files to, until `commit`; gone if that fails.

    Raises:
        OSError: what was written inside, or this, failed; earlier checkpoints are untouched.
    """
    parent = run / CHECKPOINTS
    final = parent / f"step_{step:09d}"
    temporary = parent / f"{WRITING}{final.name}-{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        clear(parent)
        temporary.mkdir()
        yield temporary
    except OSError as error:
        _withdraw(parent)
        kept = list_checkpoints(run)
        raise OSError(
            error.errno,
            f"could not write checkpoint {final}: {error.strerror or error}; "
            + (f"the last good one is {kept[0]}" if kept else "the run has no checkpoint yet"),
        ) from error
    except BaseException:
        _withdraw(parent)
        raise


def commit(
    run: Path, step: int, temporary: Path, files: Mapping[str, Any], state: Mapping[str, Any]
) -> Path:
    """Give the files in a directory of `writing` their state.json and their name."""
    final = run / CHECKPOINTS / f"step_{step:09d}"
    old = final.with_name(f"{final.name}.old")
    sharded = any(name.endswith(shards.INDEX) for name in files)
    body = {"format": SHARDED if sharded else FORMAT, "step": step, "files": files, **state}
    write(temporary / STATE, json.dumps(body, indent=1).encode())
    sync_directory(temporary)
    if final.exists() or final.is_symlink():  # aside, not gone: one is there at any instant
        discard(old)
        final.rename(old)
    temporary.rename(final)
    sync_directory(final.parent)
    replace_file(run / LATEST, f"{final.name}\n".encode())
    return final


def _withdraw(parent: Path) -> None:
    try:
        clear(parent)
    except OSError:  # the error that led here is the one to report
        return


def retire(run: Path, step: int, keep: int, keep_every: int) -> None:
    """Drop what is neither among the newest `keep` nor of a step to keep for ever."""
    for old in (run / CHECKPOINTS).glob("step_*.old"):
        if old.with_suffix("").exists():
            discard(old)
    complete = list_checkpoints(run)
    for path in [p for p in complete if step_of(p) <= step][keep:]:
        if not keep_every or step_of(path) % keep_every:
            discard(path)
    # a later one was passed over as damaged when the run was resumed; an intact one is not lost
    for path in [p for p in complete if step_of(p) > step]:
        if not is_intact(path):
            discard(path)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint directory."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not the name of a checkpoint")
    return int(match[1])


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoint directories of a run, newest first."""
    found: dict[int, Path] = {}
    # "step_5" comes before "step_5.old", which stands in while step 5 is saved anew
    for path in sorted((run / CHECKPOINTS).glob("step_*")):
        if _NAME.fullmatch(path.name) and path.is_dir():
            found.setdefault(step_of(path), path)
    return [found[step] for step in sorted(found, reverse=True)]


def is_intact(path: Path) -> bool:
    """Whether `load` would read a checkpoint."""
    try:
        load(path)
    except CheckpointError:
        return False
    return True


def load(
    path: Path,
    only: set[str] | None = None,
    requires: Sequence[str] = (),
    select: shards.Select = shards.whole,
) -> Checkpoint:
    """Read one checkpoint, or some of its groups, and verify what is read.

    Args:
        path: its directory.
        only: the groups to read; None reads all.
        requires: entries that its state must have.
        select: the part of each tensor that is wanted; files with nothing of it are not read.

    Raises:
        CheckpointError: a file is missing, truncated, altered or not what it claims to be.
    """
    try:
        if path.is_symlink():
            raise CheckpointError(f"{path} is a symbolic link: a checkpoint is a directory")
        state = read_state(path / STATE)
        if not isinstance(state.get("files"), dict):
            raise CheckpointError(f"{path / STATE} is not a checkpoint's state")
        lacking = [name for name in ("step", *requires) if name not in state]
        if lacking:
            raise CheckpointError(f"{path / STATE} lacks {', '.join(lacking)}")
        if state.get("format") not in (FORMAT, SHARDED):
            raise CheckpointError(
                f"{path} is of format {state.get('format')!r}, this version reads {FORMAT} and "
                f"{SHARDED}"
            )
        step = state["step"]
        if type(step) is not int or not 0 <= step < _MAX_STEP:
            raise CheckpointError(f"{path / STATE} names step {step!r:.100}, which is none")
        groups = {}
        for name, entry in state["files"].items():
            group = name.removesuffix(shards.INDEX).removesuffix(".safetensors")
            if group == name or Path(name).name != name or "\\" in name:
                raise CheckpointError(f"{path / STATE} names {name!r}, which is no file of its own")
            if only is not None and group not in only:
                continue
            if name.endswith(shards.INDEX):
                groups[group] = shards.read(path, group, entry, select)
            else:
                groups[group] = shards.read_one(path / name, group, entry, select)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, MemoryError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
    return Checkpoint(path, state, groups)


def load_newest(
    run: Path,
    only: set[str] | None = None,
    requires: Sequence[str] = (),
    select: shards.Select = shards.whole,
    everywhere: Callable[[Any], list[Any]] = lambda mine: [mine],
) -> tuple[Checkpoint, list[CheckpointError]]:
    """The newest checkpoint of a run that is intact, and why newer ones were passed over.

    Args:
        run: its directory.
        only, requires, select: see `load`.
        everywhere: what all processes say that read at once: what one of them finds damaged, all
            pass over.

    Raises:
        FileNotFoundError: the directory has no checkpoint.
        CheckpointError: it has some, and all are damaged.
    """
    paths = list_checkpoints(run)
    if not paths:
        raise FileNotFoundError(f"no checkpoint in {run}: is it the directory of a run?")
    errors: list[CheckpointError] = []
    for path in paths:
        found: Checkpoint | CheckpointError
        try:
            found = load(path, only, requires, select)
        except CheckpointError as error:
            found = error
        damage = str(found) if isinstance(found, CheckpointError) else None
        said = everywhere((path.name, damage))
        if any(name != path.name for name, _ in said):
            names = sorted({name for name, _ in said})
            raise CheckpointError(f"the processes see different checkpoints of {run}: {names}")
        elsewhere = [text for _, text in said if text is not None]
        if isinstance(found, Checkpoint) and not elsewhere:
            return found, errors
        errors.append(CheckpointError(damage or elsewhere[0]))
    raise CheckpointError(
        f"every checkpoint of {run} is damaged: " + "; ".join(str(e) for e in errors)
    )


def flatten_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state_dict as named tensors and a JSON-able rest."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{index}.{name}"] = value
    groups = [
        {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items()}
        for group in state["param_groups"]
    ]
    return tensors, {"scalars": scalars, "param_groups": groups}


def unflatten_optimizer(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten_optimizer`."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in (*tensors.items(), *rest["scalars"].items()):
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    groups = [  # JSON made lists of the tuples, such as betas
        {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in group.items()}
        for group in rest["param_groups"]
    ]
    return {"state": state, "param_groups": groups}


def check_tensors(what: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless names, shapes and dtypes agree."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is unexpected" for name in found if name not in wanted]
    problems += [
        f"{name} is {found[name].dtype} {list(found[name].shape)} instead of "
        f"{tensor.dtype} {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found
        and (found[name].shape != tensor.shape or found[name].dtype != tensor.dtype)
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{what} does not fit: " + ", ".join(problems[:5]) + more)
