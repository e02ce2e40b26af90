"""Which files a folder of ``fastcm sample`` or ``fastcm pairs`` holds, by their names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fastcm.runs.files import read_state

SETTINGS = "samples.json"
"""In a folder that ``fastcm sample`` or ``fastcm pairs`` fills: what its samples are."""

PAIRS = "pairs"
"""The format of shards of ``fastcm pairs``, by the indices that they hold."""

_NAME = re.compile(r"(\d+)(?:\.png|-(\d+)\.npz)")


def indices_of(name: str) -> range | None:
    """The indices of the samples in a file of such a folder, by its name; None for other files."""
    match = _NAME.fullmatch(name)
    return match and range(int(match[1]), int(match[2] or match[1]) + 1)


@dataclass(frozen=True)
class PairFiles:
    """Shards of pairs: their seed, the shape of a sample, and the files by their indices."""

    seed: int
    shape: tuple[int, ...]
    files: tuple[tuple[range, Path], ...]


def pair_files(folder: Path) -> PairFiles:
    """The shards of ``fastcm pairs``, in the order of their indices, without a gap.

    Raises:
        FileNotFoundError: there is no such folder, or no shard in it.
        ValueError: it holds something else, or a shard is missing.
    """
    settings = read_state(folder / SETTINGS)
    if settings.get("format") != PAIRS:
        raise ValueError(
            f"{folder} holds samples without their noise: make pairs with `fastcm pairs`"
        )
    if not isinstance(settings.get("seed"), int) or not isinstance(settings.get("shape"), list):
        raise ValueError(f"{folder / SETTINGS} does not say the seed and shape of its pairs")
    end: int | None = None
    files: list[tuple[range, Path]] = []
    found = ((indices_of(file.name), file) for file in folder.glob("*.npz"))
    shards = [(held.start, held.stop, file) for held, file in found if held is not None]
    for first, stop, file in sorted(shards):
        if end is not None and first > end:
            raise ValueError(
                f"{folder} has no shard of the pairs {end}..{first - 1}: the same `fastcm pairs` "
                "again makes what is missing"
            )
        if end is not None and first < end:
            raise ValueError(f"{file} holds pairs below {end} that another shard holds, too")
        end = stop
        files.append((range(first, stop), file))
    if not files:
        raise FileNotFoundError(f"no shard of pairs in {folder}")
    return PairFiles(settings["seed"], tuple(settings["shape"]), tuple(files))
