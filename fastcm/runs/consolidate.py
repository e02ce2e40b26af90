"""The plain form of a checkpoint that several processes wrote."""

from __future__ import annotations

import warnings
from pathlib import Path

from fastcm.runs import checkpoint
from fastcm.runs.files import discard, write_tensors
from fastcm.runs.lock import RunLock


def consolidate(run: str | Path) -> tuple[Path, bool]:
    """Put the newest intact checkpoint of a run into its plain form, one file for each group.

    It takes the place of the sharded one at once: whatever interrupts this, one of them is there.
    All of it has to fit into the memory of the host. Other checkpoints stay as they are.

    Args:
        run: its directory.

    Returns:
        The checkpoint, and whether it was sharded before.

    Raises:
        FileNotFoundError, CheckpointError: no checkpoint, or none that is intact.
        BlockingIOError: a process trains in the run.
        OSError: it could not be written; the sharded one is untouched.
    """
    run = Path(run)
    if not checkpoint.list_checkpoints(run):
        raise FileNotFoundError(f"no checkpoint in {run}: is it the directory of a run?")
    with RunLock(run):
        found, damaged = checkpoint.load_newest(run)
        for error in damaged:
            warnings.warn(f"{error}; taking {found.path}", stacklevel=2)
        state = dict(found.state)
        step = state.pop("step")
        if state.pop("format") != checkpoint.SHARDED:
            return found.path, False
        del state["files"]
        with checkpoint.writing(run, step) as folder:
            files = {
                f"{name}.safetensors": write_tensors(folder / f"{name}.safetensors", tensors)
                for name, tensors in found.groups.items()
            }
            path = checkpoint.commit(run, step, folder, files, state)
        discard(path.with_name(f"{path.name}.old"))
        return path, True
