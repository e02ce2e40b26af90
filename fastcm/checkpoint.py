"""Checkpoints: directories of safetensors files and one state.json, complete or absent.

A checkpoint is written under a temporary name, flushed to the disk and renamed, so that whatever
interrupts the writing leaves the earlier ones intact. state.json names every file with its size
and SHA-256; a checkpoint that does not agree with it counts as damaged. Nothing is unpickled.

    RUN/run.json                       the configuration
    RUN/checkpoints/step_000000250/    state.json, model.safetensors, optimizer.safetensors, ...
    RUN/latest                         name of the newest checkpoint; moves last
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

FORMAT = 2
RUN_STATE = (
    "config", "compiled", "optimizer", "num_averages",
    "network", "parameterization", "null_condition", "shape",
)  # fmt: skip
"""What `Trainer` adds to the state of its checkpoints."""
CHECKPOINTS = "checkpoints"
LATEST = "latest"
STATE = "state.json"
_TEMPORARY = ".writing-"
_MAX_STATE_BYTES = 16 * 2**20


class CheckpointError(ValueError):
    """A checkpoint, or every checkpoint of a run, cannot be read."""


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
) -> Path:
    """Write checkpoint `step` of a run, atomically, and drop all but the newest `keep`.

    Args:
        run: the run directory; created if absent.
        step: the step counter.
        groups: named groups of tensors; one safetensors file each.
        state: JSON-able; stored beside them.
        keep: >= 1.

    Raises:
        OSError: the disk is full or not writable; the run's earlier checkpoints are untouched.
    """
    parent = run / CHECKPOINTS
    final = parent / f"step_{step:09d}"
    temporary = parent / f"{_TEMPORARY}{final.name}-{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for left_over in parent.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(left_over, ignore_errors=True)
        temporary.mkdir()
        files = {}
        for name, tensors in groups.items():
            data = safetensors.torch.save(_unshared(tensors))
            _write(temporary / f"{name}.safetensors", data)
            files[f"{name}.safetensors"] = {
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        body = {"format": FORMAT, "step": step, "files": files, **state}
        _write(temporary / STATE, json.dumps(body, indent=1).encode())
        _sync_directory(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _sync_directory(parent)
        replace_file(run / LATEST, f"{final.name}\n".encode())
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = list_checkpoints(run)
        raise OSError(
            error.errno,
            f"could not write checkpoint {final}: {error.strerror or error}; "
            + (f"the last good one is {kept[0]}" if kept else "the run has no checkpoint yet"),
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    complete = list_checkpoints(run)
    # a later step than the one just saved was passed over as damaged when the run was resumed
    stale = [path for path in complete if path.name > final.name]
    for old in stale + [path for path in complete if path not in stale][keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoint directories of a run, newest first."""
    found = (run / CHECKPOINTS).glob("step_*")
    return sorted((p for p in found if p.is_dir()), key=lambda p: p.name, reverse=True)


def load(path: Path, only: set[str] | None = None, requires: Sequence[str] = ()) -> Checkpoint:
    """Read one checkpoint, or some of its groups, and verify what is read.

    Args:
        path: its directory.
        only: the groups to read; None reads all.
        requires: entries that its state must have.

    Raises:
        CheckpointError: a file is missing, truncated, altered or not what it claims to be.
    """
    try:
        size = (path / STATE).stat().st_size
        if size > _MAX_STATE_BYTES:
            raise CheckpointError(f"{path / STATE} has {size} bytes, more than a state file can")
        state = json.loads((path / STATE).read_text())
        if not isinstance(state, dict) or not isinstance(state.get("files"), dict):
            raise CheckpointError(f"{path / STATE} is not a checkpoint's state")
        lacking = [name for name in ("step", *requires) if name not in state]
        if lacking:
            raise CheckpointError(f"{path / STATE} lacks {', '.join(lacking)}")
        if state.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} is of format {state.get('format')!r}, this version reads {FORMAT}"
            )
        groups = {}
        for name, entry in state["files"].items():
            group = name.removesuffix(".safetensors")
            if group == name or Path(name).name != name:
                raise CheckpointError(f"{path / STATE} names {name!r}, which is no file of its own")
            if only is None or group in only:
                groups[group] = _read_group(path / name, entry)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
    return Checkpoint(path, state, groups)


def load_newest(
    run: Path, only: set[str] | None = None, requires: Sequence[str] = ()
) -> tuple[Checkpoint, list[CheckpointError]]:
    """The newest checkpoint of a run that is intact, and why newer ones were passed over.

    Raises:
        FileNotFoundError: the directory has no checkpoint.
        CheckpointError: it has some, and all are damaged.
    """
    paths = list_checkpoints(run)
    if not paths:
        raise FileNotFoundError(f"no checkpoint in {run}: is it the directory of a run?")
    errors: list[CheckpointError] = []
    for path in paths:
        try:
            return load(path, only, requires), errors
        except CheckpointError as error:
            errors.append(error)
    raise CheckpointError(
        f"every checkpoint of {run} is damaged: " + "; ".join(str(e) for e in errors)
    )


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that it holds either the old bytes or all the new ones."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{os.getpid()}")
    try:
        _write(temporary, data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, each with memory of its own: the format takes no tied weights."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        address = own.untyped_storage().data_ptr()
        found[name] = own.clone() if address in seen else own
        seen.add(address)
    return found


def _read_group(path: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    data = path.read_bytes()
    if len(data) != entry["bytes"]:
        raise CheckpointError(f"{path} has {len(data)} bytes instead of {entry['bytes']}")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise CheckpointError(f"{path} was altered: its SHA-256 differs from {STATE}")
    return safetensors.torch.load(data)


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    if os.name != "posix":  # a directory cannot be opened elsewhere
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A short fingerprint of named tensors."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]
