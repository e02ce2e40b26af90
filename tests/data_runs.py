"""Data for trainings that several processes of test_parallel.py share."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastcm.data import Shards, write_shards


class Augmented(Dataset[Any]):
    """Rows with random numbers added, as transforms do."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return self.x[i] + 0.1 * torch.randn(3)


def sharded(x: Tensor) -> Shards:
    """Shards in a folder of this process's own."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return replace(write_shards(folder, [x], rows=7), window=3)


class Counting:
    """A process's share of batches, each of numbers of its own."""

    def __init__(self, rank: int, rows: int) -> None:
        self.rank, self.rows, self.next = rank, rows, 0
        self.handed_out: list[int] = []

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            self.handed_out.append(self.next)
            self.next += 1
            yield torch.full((self.rows, 3), self.next / 100 + self.rank)

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next, "rank": torch.tensor(self.rank)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert int(state["rank"]) == self.rank
        self.next = state["next"]
