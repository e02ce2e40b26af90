"""Data sets that hand out one row at a time, such as those of torch and Hugging Face."""

from __future__ import annotations

import itertools
import random
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
    get_worker_info,
)
from torch.utils.data import Dataset as TorchDataset

from fastcm.data.drawing import Form, Keys, Order, Upload, picked

_OURS = (
    "batch_size", "sampler", "batch_sampler", "drop_last", "generator", "persistent_workers",
    "in_order",
)  # fmt: skip


class Rows:
    """A data set with rows by their number, in an order that follows from the seed alone.

    An epoch is a permutation of all rows, that of `DeviceData`: the same at any number of workers
    and processes, and resumed from the number of the step. Batches run on from one epoch into the
    next. Random numbers that a row asks torch, numpy or `random` for follow from the seed and its
    position too, if the data set reads row by row (it has no ``__getitems__``).

    Args:
        dataset: has ``__len__`` and ``__getitem__``. A row is x, (x, cond, ...), or a dict; images
            of Pillow become uint8 ``[C, H, W]``.
        keys: of a dict: that of the sample, then those of the condition; see docs/data.md.
        shuffle: False: rows 0, 1, 2, ... in each epoch.
        num_workers: processes that read ahead; 0: each step reads its own rows.
        collate_fn: makes a batch of a list of rows; default torch's. Its batch may be a dict.
        **options: others of `torch.utils.data.DataLoader`, such as prefetch_factor.

    Raises:
        TypeError, ValueError: no ``__len__`` or ``__getitem__``, no rows, an option that is not the
            caller's.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        keys: Keys | None = None,
        shuffle: bool = True,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        **options: Any,
    ) -> None:
        self.name = type(dataset).__name__
        if not hasattr(dataset, "__getitem__"):
            raise TypeError(f"{self.name} has no __getitem__: fastcm.data.Batches reads iterables")
        try:
            self.count = len(dataset)
        except TypeError as error:
            raise TypeError(
                f"{self.name} has no __len__, which the order of its rows needs: give it one, or "
                "read its batches as they come, with fastcm.data.Batches(DataLoader(...))"
            ) from error
        if self.count < 1:
            raise ValueError(f"empty data: {self.name} has {self.count} rows")
        taken = [name for name in _OURS if name in options]
        if taken:
            raise ValueError(f"{', '.join(taken)}: of Rows the trainer decides this")
        self.dataset, self.keys, self.shuffle = dataset, keys, shuffle
        self.collate_fn = collate_fn
        self.options: dict[str, Any] = {"num_workers": num_workers, **options}
        self.batch_size: int | None = None

    def __len__(self) -> int:
        return self.count


def rows_of_loader(loader: DataLoader[Any]) -> Rows | None:
    """The rows that a DataLoader draws from, if it draws each once in an epoch; else None.

    Its data set, workers and collate_fn stay, its order is replaced: by a permutation of the seed
    for one that shuffles, and 0, 1, 2, ... for one that does not.
    """
    plain = type(loader.batch_sampler) is torch.utils.data.BatchSampler
    if isinstance(loader.dataset, IterableDataset) or not plain or hasattr(loader, "state_dict"):
        return None
    sampler = loader.sampler
    if isinstance(sampler, RandomSampler):
        if sampler.replacement or sampler.num_samples != len(sampler.data_source):
            return None
    elif not isinstance(sampler, SequentialSampler):
        return None
    names = ["pin_memory", "timeout", "worker_init_fn"]
    names += ["multiprocessing_context", "prefetch_factor"] if loader.num_workers else []
    rows = Rows(
        loader.dataset,
        shuffle=isinstance(sampler, RandomSampler),
        num_workers=loader.num_workers,
        collate_fn=None if loader.collate_fn is default_collate else loader.collate_fn,
        **{name: getattr(loader, name) for name in names},
    )
    rows.batch_size = loader.batch_size
    return rows


def has_rows(data: object) -> bool:
    """Whether data is a map-style data set: of torch, or with rows by a list of numbers."""
    return (isinstance(data, TorchDataset) and not isinstance(data, IterableDataset)) or (
        hasattr(data, "__getitem__") and hasattr(data, "__getitems__")
    )


class RowData:
    """Batches of the rows of a data set; see `Rows`.

    Args:
        rows: of the data set.
        seed: of the permutations.
        device: where the batches are wanted.
    """

    def __init__(self, rows: Rows, seed: int, device: torch.device | str) -> None:
        self._rows, self._seed = rows, seed
        self._order = Order(len(rows), seed if rows.shuffle else None)
        self._upload, self._form = Upload(device), Form()
        self._iterator: Iterator[Any] | None = None
        self._end: weakref.finalize[..., RowData] | None = None
        self._next: tuple[int, int, range] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def draw(self, step: int, batch_size: int) -> tuple[Tensor, Any]:
        return self.draw_rows(step, batch_size, range(batch_size))

    def draw_rows(self, step: int, batch_size: int, rows: range) -> tuple[Tensor, Any]:
        """Some rows of the batch of a step; those of the next steps are read meanwhile.

        Raises:
            ValueError: rows that do not make a batch, or one unlike the first.
        """
        expected = self._rows.batch_size
        if expected not in (None, batch_size):
            raise ValueError(
                f"the DataLoader has batch_size={expected}, the trainer batch_size={batch_size}: "
                "give both the same"
            )
        try:
            if self._iterator is None or self._next != (step, batch_size, rows):
                self.close()
                self._iterator = self._read_from(step, batch_size, rows)
                self._end = weakref.finalize(self, _stop, self._iterator)
            x, cond = self._form(next(self._iterator), len(rows))
        except BaseException:
            self.close()
            raise
        self._next = (step + 1, batch_size, rows)
        return self._upload.batch(x, cond)

    def close(self) -> None:
        """End the workers; a later draw starts others."""
        self._iterator = None
        if self._end is not None:
            self._end()

    def describe(self) -> dict[str, object]:
        return {
            "dataset": self._rows.name,
            "samples": len(self),
            "order": "shuffled" if self._rows.shuffle else "sequential",
            "keys": self._rows.keys if isinstance(self._rows.keys, str | None)
            else list(self._rows.keys),
        }  # fmt: skip

    def _read_from(self, step: int, batch_size: int, rows: range) -> Iterator[Any]:
        given, options = self._rows, dict(self._rows.options)
        options["pin_memory"] = options.get("pin_memory") or self._upload.device.type == "cuda"
        options["worker_init_fn"] = partial(_begin, options.get("worker_init_fn"))
        loader: DataLoader[Any] = DataLoader(
            _Addressed(given.dataset, self._seed, given.keys, given.collate_fn),
            batch_sampler=_Addresses(self._order, step, batch_size, rows),
            collate_fn=_as_is,
            generator=torch.Generator(),  # not the global one, which a checkpoint holds
            **options,
        )
        return iter(loader)


class _Addresses:
    """The (position, row) of every row of this process, batch by batch, without end."""

    def __init__(self, order: Order, step: int, batch_size: int, rows: range) -> None:
        self._order, self._step, self._batch_size, self._rows = order, step, batch_size, rows

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        count = len(self._rows)
        for step in itertools.count(self._step):
            first = step * self._batch_size + self._rows.start
            yield list(zip(range(first, first + count), self._order.rows(first, count)))


class _Addressed(TorchDataset[Any]):
    """Reads batches by the (position, row) of their rows; in a worker, if there are any."""

    def __init__(
        self,
        dataset: Any,
        seed: int,
        keys: Keys | None,
        collate_fn: Callable[[list[Any]], Any] | None,
    ) -> None:
        self._seed, self._keys, self._collate = seed, keys, collate_fn
        self._subset: list[Any] = []
        while type(dataset) is Subset:  # whose rows are read one by one, as those of others
            self._subset.append(dataset.indices)
            dataset = dataset.dataset
        self._dataset = dataset

    def __getitems__(self, addresses: list[tuple[int, int]]) -> Any:
        rows = [row for _, row in addresses]
        for indices in self._subset:
            rows = [int(indices[row]) for row in rows]
        if type(self._dataset) is TensorDataset and self._collate is None:
            index = torch.tensor(rows)
            return [tensor[index] for tensor in self._dataset.tensors]
        with _random_numbers_kept():
            many = getattr(self._dataset, "__getitems__", None)
            if many is not None:
                _seed_all(self._seed, addresses[0][0])
                items = list(many(rows))
            else:
                items = []
                for (position, _), row in zip(addresses, rows):
                    _seed_all(self._seed, position)
                    items.append(self._dataset[row])
        if self._collate is not None:
            return picked(self._collate(items), self._keys)
        return _collated([picked(item, self._keys) for item in items], rows)


def _collated(items: list[Any], rows: list[int]) -> Any:
    """One batch of rows, by torch's `default_collate`."""
    items = [tuple(map(_pixels, i)) if isinstance(i, tuple | list) else _pixels(i) for i in items]
    try:
        return default_collate(items)
    except (RuntimeError, TypeError) as error:
        shapes: dict[str, int] = {}
        for item, row in zip(items, rows):
            x = item[0] if isinstance(item, tuple) and item else item
            shapes.setdefault(f"{type(x).__name__} {list(getattr(x, 'shape', ()))}", row)
        found = ", ".join(f"{shape} in row {row}" for shape, row in shapes.items())
        raise ValueError(
            f"rows that make no batch: x is {found} ({error!s:.200}); have the transform of the "
            "data set give all the same shape and kind, or pass a collate_fn"
        ) from error


def _pixels(value: Any) -> Any:
    """An image of Pillow as uint8 ``[C, H, W]``, a list of numbers as a tensor, else as it is."""
    if isinstance(value, list):
        try:
            return torch.as_tensor(value, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            return value
    if type(value).__module__.partition(".")[0] != "PIL":
        return value
    if value.mode[0] in "IF":
        raise ValueError(f"an image of more than 8 bits per channel (mode {value.mode})")
    if value.mode not in ("L", "RGB", "RGBA"):
        value = value.convert("L" if value.mode == "1" else "RGB")
    pixels = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8)
    return pixels.view(value.height, value.width, -1).permute(2, 0, 1)


def _stop(iterator: Iterator[Any]) -> None:
    """End the workers now: the collector of garbage would take apart what they are told with."""
    shutdown = getattr(iterator, "_shutdown_workers", None)
    if shutdown is not None:
        shutdown()


def _as_is(batch: Any) -> Any:
    return batch


def _begin(then: Callable[[int], None] | None, worker: int) -> None:
    """A worker begins: Ctrl-C is for the process that trains, which finishes its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if then is not None:
        then(worker)


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Leave the generators of the process that trains as they are; a worker's are its own."""
    if get_worker_info() is not None:
        yield
        return
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def _seed_all(seed: int, position: int) -> None:
    number = _mixed(_mixed(seed) ^ position)
    torch.default_generator.manual_seed(number >> 1)
    random.seed(number)
    np.random.seed(number >> 32)


def _mixed(x: int) -> int:
    """SplitMix64 (Steele et al. 2014): neighbouring numbers become unrelated ones."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)
