"""Batches out of shards: their order, and threads that read them ahead."""

from __future__ import annotations

from bisect import bisect_right
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastcm import ops, rng
from fastcm.data.drawing import Upload
from fastcm.data.latents import sampled
from fastcm.data.shards import Shards, as_bytes, empty
from fastcm.networks.conditions import nested
from fastcm.runs.checkpoint import digest


@dataclass(frozen=True)
class _Window:
    """Shards whose rows are shuffled together, and the positions of the stream where they are.

    Args:
        epoch: that it is a part of.
        shards: their numbers, in ascending order.
        first: position of its first row.
        rows: of all its shards.
    """

    epoch: int
    shards: tuple[int, ...]
    first: int
    rows: int


class ShardOrder:
    """Where the rows of a data set stand in the stream that a run reads: a function of the seed.

    Args:
        rows: of each shard.
        window: shards that are shuffled together.
        seed: of the permutations.
    """

    def __init__(self, rows: tuple[int, ...], window: int, seed: int) -> None:
        self._rows, self._window, self._seed = rows, window, seed
        self._first_rows = [0, *accumulate(rows)]
        self._epochs: dict[int, list[_Window]] = {}

    def windows(self, epoch: int) -> list[_Window]:
        """Those of an epoch, in their order."""
        if epoch not in self._epochs:
            key = rng.NoiseKey(self._seed, epoch)
            numbers = ops.integers(len(self._rows), key, stream=rng.SHARDS)
            order = torch.argsort(numbers, stable=True).tolist()
            found, first = [], epoch * self._first_rows[-1]
            for at in range(0, len(order), self._window):
                shards = tuple(sorted(order[at : at + self._window]))
                found.append(_Window(epoch, shards, first, sum(self._rows[i] for i in shards)))
                first += found[-1].rows
            self._epochs = {e: w for e, w in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = found
        return self._epochs[epoch]

    def at(self, position: int) -> _Window:
        """The window that a position of the stream lies in."""
        windows = self.windows(position // self._first_rows[-1])
        return windows[bisect_right(windows, position, key=lambda window: window.first) - 1]

    def after(self, window: _Window) -> _Window:
        """The next one, perhaps of the next epoch."""
        return self.at(window.first + window.rows)

    def rows(self, window: _Window) -> Tensor:
        """The order of its rows, counted through its shards: int64 ``[rows]``."""
        numbers = [
            ops.integers(
                self._rows[i],
                rng.NoiseKey(self._seed, window.epoch, self._first_rows[i]),
                stream=rng.DATA,
            )
            for i in window.shards
        ]
        return torch.argsort(torch.cat(numbers), stable=True)


class _Read:
    """Rows of a window in the order they are wanted, being read by threads."""

    def __init__(self, arrays: dict[str, Tensor], parts: list[Future[None]]) -> None:
        self._arrays, self._parts = arrays, parts

    def arrays(self) -> dict[str, Tensor]:
        """Waits until all is there; raises what a thread did."""
        for part in self._parts:
            part.result()
        self._parts = []
        return self._arrays


class ShardData:
    """A source of batches from shards; see `fastcm.data.shards`.

    Args:
        data: the shards.
        seed: of the permutations.
        device: where the batches are wanted.
    """

    def __init__(self, data: Shards, seed: int, device: torch.device | str) -> None:
        self.data, self.paired = data, data.paired
        self._order = ShardOrder(data.rows, data.window, seed)
        self._upload = Upload(device)
        self._pool: ThreadPoolExecutor | None = None
        self._plan: tuple[int, range] | None = None
        self._held: dict[_Window, _Read] = {}
        self._latent_key = rng.NoiseKey(seed, device=device)

    def __len__(self) -> int:
        return len(self.data)

    def draw(self, step: int, batch_size: int) -> tuple[Tensor, Any]:
        return self.draw_rows(step, batch_size, range(batch_size))

    def draw_rows(self, step: int, batch_size: int, rows: range) -> tuple[Tensor, Any]:
        """Some rows of the batch of a step; the shards of the next window are read meanwhile.

        Raises:
            FileNotFoundError, ValueError: a shard is gone, damaged, or unlike the first.
        """
        if self._plan != (batch_size, rows):
            self._plan, self._held = (batch_size, rows), {}
        position, count = step * batch_size + rows.start, len(rows)
        parts: list[dict[str, Tensor]] = []
        while count:
            window = self._order.at(position)
            self._have(window)
            arrays = self._held[window].arrays()
            start = self._own(position) - self._own(window.first)
            take = min(count, window.first + window.rows - position)
            parts.append({name: x[start : start + take] for name, x in arrays.items()})
            position, count = position + take, count - take
        whole = {
            name: torch.cat([part[name] for part in parts]) if len(parts) > 1 else x
            for name, x in parts[0].items()
        }
        x, cond = self._batch(whole)
        if self.data.variance is None:
            return self._upload.batch(x, cond)
        held = (whole[self.data.variance],) if cond is None else (whole[self.data.variance], cond)
        x, (log_variance, *rest) = self._upload.batch(x, held)
        self._latent_key.step.fill_(step)  # no host synchronisation, unlike a new key
        x = sampled(x, log_variance, self._latent_key, first_sample=rows.start)
        return x, rest[0] if rest else None

    @property
    def latents(self) -> dict[str, Any] | None:
        """What made the samples of images; see `fastcm.data.latents`."""
        return self.data.latents

    def _batch(self, arrays: dict[str, Tensor]) -> tuple[Tensor, Any]:
        sample, *names = self.data.names
        x = arrays[sample]
        if self.paired:  # each half of the batch is dense
            x = torch.stack([x, arrays["noise"]]).transpose(0, 1)
        if len(names) > 1:
            return x, nested({name: arrays[name] for name in names})
        return x, arrays[names[0]] if names else None

    def describe(self) -> dict[str, object]:
        files = self.data.files
        names = [f"{f.name} {f.stat().st_size} {n}" for f, n in zip(files, self.data.rows)]
        listed = torch.frombuffer(bytearray("\n".join(names).encode()), dtype=torch.uint8)
        return {
            "shards": len(files),
            "samples": len(self),
            "holds": {name: str(self.data.fields[name]) for name in self.data.read_names},
            "window": self.data.window,
            "files": digest({"files": listed}),
        }

    def _own(self, position: int) -> int:
        """How many rows of the stream before a position are this process's."""
        assert self._plan is not None
        batch_size, rows = self._plan
        batches, rest = divmod(position, batch_size)
        return batches * len(rows) + min(max(rest - rows.start, 0), len(rows))

    def _have(self, window: _Window) -> None:
        """Have a window at hand and the next one being read; let go of those before."""
        wanted = [window, self._order.after(window)]
        self._held = {w: read for w, read in self._held.items() if w in wanted}
        for each in wanted:
            if each not in self._held:
                self._held[each] = self._begin(each)

    def _begin(self, window: _Window) -> _Read:
        """Start to read this process's rows of a window."""
        assert self._plan is not None
        data, (batch_size, mine) = self.data, self._plan
        order = self._order.rows(window)
        at = (torch.arange(window.rows) + window.first) % batch_size
        order = order[(at >= mine.start) & (at < mine.stop)]
        arrays = {name: empty(len(order), data.fields[name]) for name in data.read_names}
        if self.paired:
            arrays["noise"] = torch.empty_like(arrays[data.names[0]])
        if self._pool is None:
            self._pool = ThreadPoolExecutor(data.threads, "shards")
        parts, first = [], 0
        for i in window.shards:
            lines = ((order >= first) & (order < first + data.rows[i])).nonzero()[:, 0]
            index = order[lines] - first
            ascending = index.argsort()
            first += data.rows[i]
            if len(lines):
                parts.append(
                    self._pool.submit(self._read, i, index[ascending], lines[ascending], arrays)
                )
        return _Read(arrays, parts)

    def _read(self, i: int, index: Tensor, lines: Tensor, arrays: dict[str, Tensor]) -> None:
        """Read rows of a shard to their lines, in a thread."""
        data = self.data
        shard = data.opened(i)
        to = lines.numpy()
        shard.read(index.numpy(), {name: (as_bytes(arrays[name]), to) for name in data.read_names})
        if data.noise is not None:
            seed, firsts = data.noise
            key = rng.NoiseKey(seed, first_sample=firsts[i])
            shape = (int(index[-1]) + 1, *data.shape)
            arrays["noise"][lines] = ops.noise(shape, key, stream=rng.SAMPLE)[index]
