"""One checkpoint that several processes write: each its part, the first one makes it complete."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from fastcm.runs import checkpoint, shards
from fastcm.runs.files import write_tensors
from fastcm.runs.shards import Places

T = TypeVar("T")


class Exchange(Protocol):
    """What every process says, in all of them; the error of one is raised in all."""

    def __call__(self, mine: Any = None, error: Exception | None = None) -> list[Any]: ...


def save(
    run: Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    places: Places,
    rank: int,
    exchange: Exchange,
    keep: int = 3,
    keep_every: int = 0,
) -> Path | None:
    """As `checkpoint.save`, called by all processes at once, each with what it holds.

    The checkpoint gets its name from the first process when all have written and flushed their
    files, so that it is complete or absent as any other.

    Args:
        run: a directory that all of them see.
        step, state, keep, keep_every: see `checkpoint.save`; the first process's count.
        groups: a group in `places`: this process's elements; another: whole, of the first alone.
        places: of the same groups in every process.
        rank: of this process.
        exchange: see `Exchange`.

    Returns:
        The checkpoint, in the first process.

    Raises:
        OSError: what this process had to write could not be written.
        RuntimeError: that of another, by `exchange`.
    """

    def all_of_us(work: Callable[[], T]) -> list[T]:
        try:
            mine = work()
        except Exception as error:
            exchange(error=error)
            raise
        return exchange(mine)

    with ExitStack() as stack:
        begin = checkpoint.writing(run, step)
        names = all_of_us(lambda: stack.enter_context(begin).name if rank == 0 else None)
        folder = run / checkpoint.CHECKPOINTS / str(names[0])

        def write() -> tuple[dict[str, Any], dict[str, Any]]:
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"process {rank} does not see {folder}: the directory of a sharded run must be "
                    "on a file system that all processes share"
                )
            plain = {
                f"{name}.safetensors": write_tensors(folder / f"{name}.safetensors", tensors)
                for name, tensors in groups.items()
                if name not in places and rank == 0
            }
            parts = {name: groups[name] for name in places}
            return plain, shards.write_part(folder, rank, parts, places)

        written = all_of_us(write)

        def complete() -> Path | None:
            if rank > 0:
                return None
            files = {**written[0][0], **shards.write_indices(folder, [part for _, part in written])}
            return checkpoint.commit(run, step, folder, files, state)

        path = all_of_us(complete)[0]
    if rank > 0:
        return None
    checkpoint.retire(run, step, keep, keep_every)
    return path
