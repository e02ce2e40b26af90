"""Data sets larger than memory: folders of shards, of which a few are in memory at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fastcm.data.datasets import Dataset
from fastcm.data.drawing import Keys
from fastcm.data.latents import ENCODED, LOG_VARIANCE, NULL, latents_of, sampled
from fastcm.data.pair_files import SETTINGS, pair_files
from fastcm.data.shard_files import SUFFIXES, Field, Shard, open_shard
from fastcm.networks.conditions import nested
from fastcm.rng import NoiseKey
from fastcm.runs.files import read_state

INDEX = "shards.json"
"""In a folder of `write_shards`, once it is complete: how many rows each of its files has."""

FORMAT = "fastcm shards 1"


@dataclass(frozen=True, eq=False)
class Shards:
    """A data set in files, see `shards`; `split`, `without_labels` and `to_memory` make others.

    Args:
        files: in their order.
        rows: of each file.
        fields: what a row holds, by name.
        names: of the sample and of the conditions.
        window: how many shards are shuffled together; twice as many are in memory.
        threads: that read.
        size, channels: of images in archives.
        noise: of pairs, the seed of their noise and the index of the first pair of each file.
        classes: how many, where it is known already.
        latents: what made them of images, where it is known; see `fastcm.data.latents`.
        variance: name of the log-variance of which each draw of a latent is made, if any.
        null: file of what stands for no condition, if there is one.
    """

    files: tuple[Path, ...]
    rows: tuple[int, ...]
    fields: dict[str, Field]
    names: tuple[str, ...]
    window: int = 4
    threads: int = 4
    size: int | None = None
    channels: int | None = None
    noise: tuple[int, tuple[int, ...]] | None = None
    classes: int | None = None
    latents: dict[str, Any] | None = None
    variance: str | None = None
    null: Path | None = None

    def __len__(self) -> int:
        return sum(self.rows)

    @property
    def paired(self) -> bool:
        """Whether every sample comes with its noise, as in `fastcm.data.Dataset`."""
        return self.noise is not None

    @property
    def read_names(self) -> tuple[str, ...]:
        """The arrays that are read of each shard."""
        return self.names if self.variance is None else (*self.names, self.variance)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.fields[self.names[0]].shape

    @property
    def null_condition(self) -> Any:
        """What stands for no condition, in the containers of the condition; None if unknown."""
        if self.null is None:
            return None
        held = safetensors.torch.load_file(self.null, device="cpu")
        found = nested({name: held[name] for name in self.names[1:]})
        return next(iter(found.values())) if len(self.names) == 2 else found

    @property
    def labels(self) -> str | None:
        """The name of the labels; None where the condition is something else, or there is none."""
        if len(self.names) != 2:
            return None
        field = self.fields[self.names[1]]
        whole = not field.dtype.is_floating_point and field.dtype != torch.bool
        return self.names[1] if whole and field.shape == () else None

    @property
    def num_classes(self) -> int | None:
        """The largest label + 1: reads the labels of all shards, and checks them."""
        if self.labels is None or self.classes is not None:
            return self.classes
        low, high = 0, -1
        for i in range(len(self.files)):
            held = self.read(i, [self.labels])[self.labels]
            low, high = min(low, int(held.min())), max(high, int(held.max()))
        if low < 0:
            raise ValueError(f"labels must be >= 0, got {low}")
        return high + 1

    def without_labels(self) -> Shards:
        """The same samples, without any condition."""
        return replace(self, names=self.names[:1], classes=None)

    def split(self, fraction: float = 0.2) -> tuple[Shards, Shards]:
        """(train, held out): whole shards, of which the last ones are held out.

        Raises:
            ValueError: fraction is not in (0, 1) or there are fewer than two shards.
        """
        if not 0 < fraction < 1 or len(self.files) < 2:
            raise ValueError(
                f"split needs 0 < fraction < 1 and two shards, got {fraction} and {len(self.files)}"
            )
        held = min(max(round(len(self.files) * fraction), 1), len(self.files) - 1)
        same = replace(self, classes=self.num_classes)  # as of both parts
        return same._part(slice(None, -held)), same._part(slice(-held, None))

    def _part(self, part: slice) -> Shards:
        noise = self.noise and (self.noise[0], self.noise[1][part])
        return replace(self, files=self.files[part], rows=self.rows[part], noise=noise)

    def to_memory(self, at_most: int | None = None) -> Dataset:
        """The first rows as a `Dataset`, of which the condition has to be labels."""
        if len(self.names) > 1 and self.labels is None:
            raise ValueError(f"only labels go into a Dataset, got {', '.join(self.names[1:])}")
        if self.noise is not None:
            raise ValueError("pairs are read into memory by fastcm.data.pairs")
        xs: list[Tensor] = []
        labels: list[Tensor] = []
        missing = len(self) if at_most is None else min(at_most, len(self))
        for i in range(len(self.files)):
            if missing > 0:
                held = self.read(i, self.read_names, range(min(missing, self.rows[i])))
                x = held[self.names[0]]
                if self.variance is not None:
                    first = sum(self.rows[:i])
                    x = sampled(x, held[self.variance], NoiseKey(0), first_sample=first)
                xs.append(x)
                labels += [held[name] for name in self.names[1:]]
                missing -= len(xs[-1])
        return Dataset(torch.cat(xs), torch.cat(labels) if labels else None, self.num_classes)

    def opened(self, i: int) -> Shard:
        """A shard, of which is known that it holds what all do."""
        shard = open_shard(self.files[i], size=self.size, channels=self.channels)
        return check_alike(shard, self.files[i], self.fields, self.files[0], self.rows[i])

    def read(
        self, i: int, names: Sequence[str], rows: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Arrays of one shard, all rows or some in ascending order."""
        index = torch.arange(self.rows[i]) if rows is None else torch.tensor(list(rows))
        out = {name: empty(len(index), self.fields[name]) for name in names}
        lines = torch.arange(len(index)).numpy()
        shard = self.opened(i)
        shard.read(index.numpy(), {name: (as_bytes(x), lines) for name, x in out.items()})
        return out


def empty(count: int, field: Field) -> Tensor:
    """Room for rows in host memory."""
    return torch.empty(count, *field.shape, dtype=field.dtype, device="cpu")


def as_bytes(x: Tensor) -> object:
    """The memory of a tensor as a numpy matrix, a line for each row."""
    return x.view(len(x), -1).view(torch.uint8).numpy()


def shards(
    path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    keys: Keys | None = None,
    window: int = 4,
    threads: int = 4,
    size: int | None = None,
    channels: int | None = None,
) -> Shards:
    """A data set in .npz, .safetensors or .tar files, for ``Trainer(data=...)``.

    Every shard holds an array ``x``, uint8 or floating samples ``[n, ...]``, and beside it what
    they are conditioned on: ``labels`` or others of n rows. An archive holds what
    `fastcm.data.tar_files` says. The headers of all files are read here, unless the folder has the
    index of `write_shards`.

    The order is a function of (seed, epoch): the shards are shuffled, and the rows of each `window`
    consecutive ones together. All shards in one window give the permutation of `DeviceData`.

    Args:
        path: a folder, or the files. A folder of ``fastcm pairs`` gives pairs; of one of
            ``fastcm encode`` that holds moments each draw of a latent is another.
        keys: name of the sample, or names of sample and conditions; several conditions make a dict.
            Default x and all others.
        window: shards that are shuffled together. Two windows are in memory, of several processes
            the rows that each needs.
        threads: that read shards ahead.
        size, channels: of the images in archives, see `image_folder`; channels 3 unless given.

    Raises:
        FileNotFoundError: no such folder or file, or no shard in it.
        ValueError: a shard is missing, damaged, or holds something else than the first; or an
            argument is out of range.
    """
    if window < 1 or threads < 1:
        raise ValueError(f"window and threads must be >= 1, got {window} and {threads}")
    opening = partial(open_shard, size=size, channels=channels)
    noise: tuple[int, tuple[int, ...]] | None = None
    latents: dict[str, Any] | None = None
    expected: list[int] = []
    if isinstance(path, str | os.PathLike):
        folder = Path(path)
        if not folder.is_dir():
            raise FileNotFoundError(f"no such folder of shards: {folder}")
        if (folder / SETTINGS).exists():
            pairs = pair_files(folder)
            files = [file for _, file in pairs.files]
            expected = [len(held) for held, _ in pairs.files]
            noise = pairs.seed, tuple(held.start for held, _ in pairs.files)
        elif (folder / ENCODED).exists() and not (folder / INDEX).exists():
            raise ValueError(
                f"{folder} lacks latents: the same `fastcm encode` again makes what is missing"
            )
        elif (folder / INDEX).exists():
            latents = latents_of(folder)
            known = indexed(folder)
            files, expected = [folder / name for name in known], list(known.values())
        else:
            files = _numbered(folder)
    else:
        files = [Path(file) for file in path]
        wrong = [str(file) for file in files if file.suffix not in SUFFIXES]
        if wrong or not files:
            raise ValueError(
                f"shards end in {', '.join(SUFFIXES)}, got {', '.join(wrong) or 'none'}"
            )
    first = opening(files[0])
    rows = expected
    if not rows:
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(opening, files))
        rows = [check_alike(*each, first.fields, files[0]).rows for each in zip(found, files)]
    empties = [str(file) for file, count in zip(files, rows) if count < 1]
    if empties:
        raise ValueError(f"empty data: no rows in {', '.join(empties[:5])}")
    if sum(rows) >= 2**32:
        raise ValueError(f"at most 2**32 - 1 rows can be shuffled, got {sum(rows)}")
    variance = LOG_VARIANCE if latents is not None and LOG_VARIANCE in first.fields else None
    names = tuple(name for name in _names(first, files[0], keys) if name != variance)
    null = files[0].with_name(NULL) if latents is not None else None
    return Shards(
        tuple(files), tuple(rows), dict(first.fields), names, window, threads, size, channels,
        noise, latents=latents, variance=variance, null=null if null and null.is_file() else None,
    )  # fmt: skip


def check_alike(
    shard: Shard, file: Path, fields: Mapping[str, Field], first: Path, rows: int | None = None
) -> Shard:
    """Raise ValueError unless a shard holds what the first one does, and so many rows."""
    if shard.fields != fields:
        theirs, ours = (
            ", ".join(f"{name} {field}" for name, field in sorted(held.items()))
            for held in (shard.fields, fields)
        )
        raise ValueError(f"{file} holds {theirs}, and {first} {ours}: all shards must be alike")
    if rows not in (None, shard.rows):
        raise ValueError(f"{file} holds {shard.rows} rows, {rows} were expected")
    return shard


def _names(shard: Shard, file: Path, keys: Keys | None) -> tuple[str, ...]:
    there = list(shard.fields)
    if keys is None:
        sample = "x" if "x" in there or len(there) != 1 else there[0]
        names = (sample, *(name for name in there if name != sample))
    else:
        names = (keys,) if isinstance(keys, str) else tuple(keys)
    missing = [repr(name) for name in names if name not in there]
    if missing or not names:
        raise ValueError(
            f"{file} has no {', '.join(missing) or 'key'}: there are "
            f"{', '.join(map(repr, there))}, and keys= says which are sample and conditions"
        )
    field = shard.fields[names[0]]
    if not field.shape or not (field.dtype == torch.uint8 or field.dtype.is_floating_point):
        raise ValueError(f"samples must be uint8 or floating [n, ...], {file} holds {field}")
    return names


def holds_shards(folder: Path) -> bool:
    """Whether there are shards in a folder."""
    return bool(_files(folder))


def _files(folder: Path) -> list[Path]:
    """Hidden ones are being written, or were when their writer was interrupted."""
    files = folder.iterdir()
    return [file for file in files if file.suffix in SUFFIXES and file.name[0] != "."]


def indexed(folder: Path) -> dict[str, int]:
    """The rows of every file that the index of a folder names."""
    index = read_state(folder / INDEX)
    rows = index.get("rows")
    if index.get("format") != FORMAT or not isinstance(rows, dict) or not rows:
        raise ValueError(f"{folder / INDEX} is not the index of a folder of shards")
    for name, count in rows.items():
        if Path(name).name != name or type(count) is not int or count < 1:
            raise ValueError(f"{folder / INDEX} names {name!r} with {count!r} rows, which is none")
    missing = [name for name in rows if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing[:5])}, which {INDEX} names")
    return rows


def _numbered(folder: Path) -> list[Path]:
    """The shards of a folder by their numbers, of which none may be missing."""
    found = _files(folder)
    kinds = sorted({file.suffix for file in found})
    if not found:
        raise FileNotFoundError(f"no shard in {folder}: none of its files ends in {SUFFIXES}")
    if len(kinds) > 1:
        raise ValueError(f"{folder} holds shards of several kinds: {', '.join(kinds)}")
    parts = {file: re.split(r"(\d+)", file.stem) for file in found}
    found.sort(key=lambda file: [int(p) if p.isdigit() else p for p in parts[file]])
    alike = {(*p[:-2], p[-1]) for p in parts.values() if len(p) > 2}
    if len(alike) == 1 and all(len(p) > 2 for p in parts.values()):
        numbers = [int(parts[file][-2]) for file in found]
        missing = sorted({*range(numbers[0], numbers[-1])} - {*numbers})
        if missing:
            raise FileNotFoundError(
                f"{folder} has no shard of the numbers {missing[:5]}, between {found[0].name} and "
                f"{found[-1].name}: give the list of its files if these are all"
            )
    return found
