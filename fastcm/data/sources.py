"""The sources of batches that training draws from.

A `Source` answers ``draw(step, batch_size)``: `DeviceData` by a permutation that is a pure
function of (seed, epoch), so that a resumed, re-batched or distributed run sees the same rows, as
do `RowData` (`fastcm.data.rows`) and `ShardData` (`fastcm.data.shard_data`) without all of them
in memory; `IterableData` by reading a loader in its own order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastcm import rng
from fastcm.data.batches import Batches
from fastcm.data.datasets import Dataset as Dataset
from fastcm.data.datasets import array_file as array_file
from fastcm.data.datasets import as_condition, as_samples, as_tensor
from fastcm.data.datasets import to_unit as to_unit
from fastcm.data.drawing import Upload, permutation, picked
from fastcm.data.images import digits as digits
from fastcm.data.images import image_folder as image_folder
from fastcm.data.loading import load as load
from fastcm.data.rows import RowData, Rows, has_rows, rows_of_loader
from fastcm.data.shard_data import ShardData
from fastcm.data.shards import Shards
from fastcm.networks.conditions import check_rows, each, layout, named, rows_of
from fastcm.runs.checkpoint import digest

Batch = tuple[Tensor, Any]


@runtime_checkable
class Source(Protocol):
    """Where a training step gets its batch from."""

    def draw(self, step: int, batch_size: int) -> Batch:
        """The batch ``(x, cond)`` of a step; x is uint8 or float32 ``[batch_size, ...]``."""
        ...

    def describe(self) -> dict[str, object]:
        """JSON-able: what must agree for a run to be resumed."""
        ...


@runtime_checkable
class RowSource(Source, Protocol):
    """A source of which a process can have its own rows, without the others being read."""

    def draw_rows(self, step: int, batch_size: int, rows: range) -> Batch:
        """Those rows of the batch of a step."""
        ...


def draw_rows(source: Source, step: int, batch_size: int, rows: range) -> Batch:
    """Some rows of a step's batch, from any source."""
    if isinstance(source, RowSource):
        return source.draw_rows(step, batch_size, rows)
    x, cond = source.draw(step, batch_size)
    if len(rows) == batch_size:
        return x, cond
    mine = slice(rows.start, rows.stop)
    return x[mine], rows_of(cond, mine)


class DeviceData:
    """A data set resident on a device, each epoch a fresh permutation of all its rows.

    The stream of rows is a pure function of the seed: position p holds row
    ``permutation(p // N)[p % N]``, at any batch size and on any device.

    Args:
        dataset: the data; moved to `device`.
        seed: of the permutations.
        device: where the data lives and the batches are gathered.
    """

    def __init__(self, dataset: Dataset, seed: int, device: torch.device | str) -> None:
        self.dataset = dataset.to(device)
        self._key = rng.NoiseKey(seed, device=device)
        self._epochs: list[int | None] = []
        self._order = torch.empty(0, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def paired(self) -> bool:
        return self.dataset.paired

    def permutation(self, epoch: int) -> Tensor:
        """The order of the rows in an epoch: int64 ``[N]``."""
        return permutation(len(self), self._key, epoch)

    def prepare(self, position: int, count: int) -> None:
        """Have the permutations at hand that `gather` needs at this position; on the device."""
        if position < 0 or count < 1:
            raise ValueError(f"batch needs position >= 0 and count >= 1, got {position}, {count}")
        n = len(self)
        rows = max(2, -(-count // n) + 1)  # so many epochs a batch can touch
        if rows > len(self._epochs):
            self._epochs = [None] * rows
            self._order = torch.empty(rows * n, dtype=torch.int64, device=self._order.device)
        for epoch in range(position // n, (position + count - 1) // n + 1):
            row = epoch % len(self._epochs)
            if self._epochs[row] != epoch:
                self._order[row * n : (row + 1) * n] = self.permutation(epoch)
                self._epochs[row] = epoch

    def gather(self, position: Tensor, count: int) -> Batch:
        """The rows from `position` on, an int64 device tensor; `prepare` comes first.

        Nothing but device operations of fixed shape, so a CUDA graph can hold it.
        """
        ahead = torch.arange(count, device=position.device)
        index = self._order[(position + ahead) % len(self._order)]
        cond = self.dataset.condition
        cond = None if cond is None else each(lambda x: x.index_select(0, index), cond)
        if not self.dataset.paired:
            return self.dataset.x.index_select(0, index), cond
        # all samples, then all noise: each half of the batch is dense, and no operator copies it
        halves = self.dataset.x.flatten(0, 1).index_select(0, torch.cat([2 * index, 2 * index + 1]))
        return halves.view(2, count, *halves.shape[1:]).transpose(0, 1), cond

    def batch(self, position: int, count: int) -> Batch:
        """The rows at positions ``position .. position + count - 1``, across epochs."""
        self.prepare(position, count)
        return self.gather(torch.full((), position, device=self._order.device), count)

    def draw(self, step: int, batch_size: int) -> Batch:
        return self.batch(step * batch_size, batch_size)

    def describe(self) -> dict[str, object]:
        cond = self.dataset.condition
        held = {} if cond is None else dict(named(cond, "y"))
        return {
            "samples": len(self),
            "shape": list(self.dataset.shape),
            "dtype": str(self.dataset.x.dtype).removeprefix("torch."),
            "num_classes": self.dataset.num_classes,
            "contents": digest({"x": self.dataset.x, **held}),
        }


_ARRAYS = (Tensor, np.ndarray)
_END = object()


class IterableData:
    """Batches read from an iterable in its own order, from the start again whenever it ends.

    A step ahead of the last one is reached by reading on, so a resumed run sees the same batches
    if the iterable is deterministic, or has a state. The short last batch of an epoch is dropped.

    Args:
        iterable: yields x or (x, cond), tensors or arrays, cond perhaps in dicts and tuples, or
            dicts; for example a DataLoader. See `Batches` for what else can be said of it.
        device: where the batches are moved, see `Upload`.
    """

    def __init__(self, iterable: Iterable[object] | Batches, device: torch.device | str) -> None:
        self.given = iterable if isinstance(iterable, Batches) else Batches(iterable)
        self._iterator: Iterator[object] | None = None
        self._upload = Upload(device)
        self._step = 0
        self._layout: dict[str, str] | None = None

    def draw(self, step: int, batch_size: int) -> Batch:
        """The next batch, or a later one if `step` is ahead.

        Raises:
            ValueError: the step lies behind, or the iterable yields nothing, or a batch unlike
                the first or not of `batch_size`, or is an iterator that ended.
        """
        if step < self._step:
            raise ValueError(
                f"step {step} lies behind: the next one of this iterable is {self._step}"
            )
        while True:
            x, cond = self._next(batch_size)
            self._step += 1
            if self._step > step:
                break
        return self._upload(x), None if cond is None else each(self._upload, cond)

    def draw_rows(self, step: int, batch_size: int, rows: range) -> Batch:
        """The next batch of this process; see `Batches`."""
        return self.draw(step, len(rows))

    def describe(self) -> dict[str, object]:
        return {"iterable": self.given.name}

    @property
    def stateful(self) -> bool:
        """Whether its position is saved with a checkpoint."""
        return self.given.stateful

    def state_dict(self) -> dict[str, Any]:
        """Where the iterable stands, after the batch that was drawn last."""
        return self.given.state_dict()

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Go on where another one stood, with the batch of a step."""
        self.given.load_state_dict(state)
        self._iterator, self._step = None, step

    def _next(self, batch_size: int) -> Batch:
        for _ in range(2):
            if self._iterator is None:
                self._iterator = self.given.begin()
            item = next(self._iterator, _END)
            if item is not _END:
                x, cond = self._unpacked(item)
                if len(x) == batch_size:
                    return x, cond
                if len(x) > batch_size or next(self._iterator, _END) is not _END:
                    raise ValueError(f"batches must have {batch_size} samples, got {len(x)}")
            if self.given.ends:
                raise ValueError(
                    f"the iterator ended after {self._step} batches and cannot start again: "
                    f"pass an iterable such as a list or a DataLoader"
                )
            self._iterator = None
        raise ValueError(f"the iterable yields no batch of {batch_size} samples")

    def _unpacked(self, item: object) -> Batch:
        item = picked(item, self.given.keys)
        parts = item if isinstance(item, tuple | list) else (item,)
        try:
            tensors = [None if part is None else _tensors(part) for part in parts]
        except (TypeError, ValueError, RuntimeError):
            tensors = []
        x, cond = (*tensors, None, None)[:2]
        if not 1 <= len(tensors) <= 2 or not isinstance(x, Tensor) or x.ndim < 2:
            kinds = ", ".join(type(part).__name__ for part in parts)
            raise ValueError(
                f"a batch must be x [B, ...] or (x, cond), got {kinds}; several conditions are one "
                "dict or tuple"
            )
        x = as_samples(x)
        check_rows(cond, len(x))
        cond = None if cond is None else as_condition(cond)
        found = {**layout(x, "x"), **layout(cond)}
        self._layout = self._layout or found
        if found != self._layout:
            raise ValueError(f"every batch must be as the first, {self._layout}, got {found}")
        return x, cond


def _conditioned(x: Tensor, cond: Any) -> Dataset:
    """Integers ``[N]`` are labels, anything else is a condition."""
    held = as_condition(_tensors(cond))
    if isinstance(held, Tensor) and held.dtype == torch.int64 and held.ndim == 1:
        return Dataset(x, held)
    return Dataset(x, cond=held)


def _tensors(cond: Any) -> Any:
    """Arrays as tensors inside of their containers; a list of numbers is an array."""
    if isinstance(cond, list) and all(isinstance(v, int | float) for v in cond):
        return as_tensor(cond)
    return each(as_tensor, cond)


def as_source(data: object, *, seed: int, device: torch.device | str) -> Source:
    """The source of batches for whatever holds the data.

    Args:
        data: a `Source`, `Dataset`, tensor or array ``[N, ...]``, tuple (x, labels) or (x, cond) of
            these (see `Dataset`), name or path (see `load`), `shards`, a data set with rows (see
            `Rows`), a DataLoader, or an iterable of batches (see `Batches`).
        seed: of the permutations; an iterable has its own order.
        device: where the batches are wanted.

    Raises:
        TypeError: data is none of these.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, str | os.PathLike):
        data = load(data)
    elif isinstance(data, _ARRAYS):
        data = Dataset(as_tensor(data))
    elif isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], _ARRAYS):
        data = _conditioned(as_tensor(data[0]), data[1])
    if isinstance(data, Dataset):
        return DeviceData(data, seed, device)
    if isinstance(data, Shards):
        return ShardData(data, seed, device)
    if isinstance(data, DataLoader):
        data = rows_of_loader(data) or data
    elif not isinstance(data, Rows | Batches) and has_rows(data):
        data = Rows(data)
    if isinstance(data, Rows):
        return RowData(data, seed, device)
    if isinstance(data, Iterable | Batches):
        return IterableData(cast(Any, data), device)
    raise TypeError(
        "data must be a Source, Dataset, tensor, (x, labels), (x, cond), path, shards, a data set "
        f"with rows or an iterable of batches, got {type(data).__name__}"
    )
