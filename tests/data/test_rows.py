"""Data sets that hand out one row at a time: their order, their workers, what is refused."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

import fastcm
from fastcm import FlowMatching, Trainer, data
from fastcm.data import DeviceData, Rows, as_source
from fastcm.data.rows import RowData
from fastcm.data.sources import IterableData, Source, draw_rows
from fastcm.networks import MLP


class Numbered(Dataset[Any]):
    """Row i holds the number i and has the label i % 3."""

    def __init__(self, n: int = 10) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        return torch.full((2,), float(i)), i % 3


class Noisy(Numbered):
    """With random numbers of all three generators in place of the data."""

    def __getitem__(self, i: int) -> Any:
        return torch.tensor([torch.rand(()).item(), random.random(), np.random.rand()])


class Dicts(Numbered):
    """As rows of Hugging Face."""

    def __getitem__(self, i: int) -> Any:
        x = torch.full((1, 2, 2), i, dtype=torch.uint8)
        return {"image": x, "label": i % 3, "text": f"a {i}", "emb": torch.ones(4, 5) * i}


def source(given: Any, seed: int = 3) -> Source:
    return as_source(given, seed=seed, device="cpu")


def numbers(source: Source, steps: Any, batch_size: int = 4) -> list[list[int]]:
    """Rows of the batches of some steps."""
    return [[int(x.flatten()[0]) for x in source.draw(s, batch_size)[0]] for s in steps]


def expected(n: int, steps: Any, batch_size: int = 4) -> list[list[int]]:
    x = torch.arange(n, dtype=torch.uint8)[:, None]
    return numbers(DeviceData(fastcm.Dataset(x), 3, "cpu"), steps, batch_size)


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_come_in_the_permutation_of_data_in_memory(workers: int) -> None:
    drawn = source(Rows(Numbered(), num_workers=workers))
    assert numbers(drawn, range(6)) == expected(10, range(6))
    x, labels = drawn.draw(6, 4)
    assert labels.dtype == torch.int64 and torch.equal(labels, x[:, 0].long() % 3)


def test_a_step_may_come_next_or_anywhere() -> None:
    drawn = source(Numbered())
    for steps in ([0, 1, 2], [7, 8], [1], [0]):
        assert numbers(drawn, steps) == expected(10, steps)
    assert numbers(drawn, [2], 25) == expected(10, [2], 25)


def test_a_process_reads_its_own_rows_and_no_others() -> None:
    class Counting(Numbered):
        read: list[int]

        def __getitem__(self, i: int) -> Any:
            self.read.append(i)
            return super().__getitem__(i)

    whole = numbers(source(Numbered()), range(4))
    parts = []
    for rows in (range(0, 2), range(2, 4)):
        dataset = Counting()
        dataset.read = []
        mine = source(dataset)
        parts.append([[int(i) for i in draw_rows(mine, s, 4, rows)[0][:, 0]] for s in range(4)])
        assert dataset.read == [i for batch in parts[-1] for i in batch]
    assert [a + b for a, b in zip(*parts)] == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_random_numbers_of_a_row_follow_from_seed_and_position(workers: int) -> None:
    straight = [source(Noisy(), seed=1).draw(step, 4)[0] for step in range(4)]
    rows = Rows(Noisy(), num_workers=workers)
    other = as_source(rows, seed=1, device="cpu")
    assert torch.equal(other.draw(2, 4)[0], straight[2])
    assert torch.equal(draw_rows(other, 3, 4, range(1, 3))[0], straight[3][1:3])
    assert not torch.equal(source(Noisy(), seed=2).draw(2, 4)[0], straight[2])
    assert torch.cat(straight).unique().numel() == 48


def test_generators_of_the_program_are_left_alone() -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    source(Noisy()).draw(0, 4)
    next(iter(source(Rows(Noisy(), num_workers=1)).draw(0, 4)))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_a_data_set_of_torch_is_read_as_the_loader_says() -> None:
    dataset = Numbered()
    tripled = DataLoader(
        dataset, 4, shuffle=True, collate_fn=lambda rows: torch.stack([3 * x for x, _ in rows])
    )
    assert numbers(source(tripled), range(3)) == [
        [3 * i for i in row] for row in expected(10, range(3))
    ]
    in_order = source(DataLoader(dataset, 4, num_workers=1))
    assert numbers(in_order, range(3)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    with pytest.raises(ValueError, match="DataLoader has batch_size=4, the trainer batch_size=5"):
        in_order.draw(0, 5)


def test_a_loader_of_another_order_keeps_it() -> None:
    dataset = Numbered()
    weighted = WeightedRandomSampler([1.0] * 10, 10)
    given: list[Any] = [
        DataLoader(dataset, 4, sampler=weighted),
        DataLoader(dataset, 4, sampler=torch.utils.data.RandomSampler(dataset, replacement=True)),
        DataLoader(dataset, batch_sampler=[[0, 1], [2, 3]]),
        data.Batches(DataLoader(dataset, 4, shuffle=True)),
    ]
    assert all(isinstance(source(loader), IterableData) for loader in given)
    assert numbers(source(given[2]), range(3), 2) == [[0, 1], [2, 3], [0, 1]]


@pytest.mark.parametrize("kind", ["tensors", "subset", "subset-of-tensors", "torchvision"])
def test_kinds_of_data_sets(kind: str) -> None:
    x, y = torch.arange(10.0)[:, None].expand(10, 2), torch.arange(10) % 3
    given: dict[str, Dataset[Any]] = {
        "tensors": TensorDataset(x, y),
        "subset": Subset(Subset(Numbered(30), range(5, 25)), range(2, 12)),
        "subset-of-tensors": Subset(TensorDataset(x, y), [9, 8, 7]),
        "torchvision": Pictures(),
    }
    drawn = source(given[kind])
    n = {"subset-of-tensors": 3}.get(kind, 10)
    moved = {"subset": lambda i: i + 7, "subset-of-tensors": lambda i: 9 - i}.get(kind, lambda i: i)
    assert numbers(drawn, range(5)) == [[moved(i) for i in b] for b in expected(n, range(5))]
    found, labels = drawn.draw(0, 4)
    assert torch.equal(labels, found.flatten(1)[:, 0].long() % 3)


class Pictures(Numbered):
    """As data sets of torchvision without a transform."""

    def __getitem__(self, i: int) -> Any:
        image = pytest.importorskip("PIL.Image")
        return image.new("RGB", (3, 2), (i, 0, 1)), i % 3


def test_pictures_stay_in_eight_bits() -> None:
    x, _ = source(Pictures()).draw(0, 4)
    assert x.dtype == torch.uint8 and x.shape == (4, 3, 2, 3)
    assert torch.equal(x[:, 2], torch.ones(4, 2, 3, dtype=torch.uint8))


def test_dicts_are_read_by_their_keys() -> None:
    x, cond = source(Dicts()).draw(0, 4)  # image and label are found, text is not looked at
    assert x.dtype == torch.uint8 and torch.equal(cond, x.flatten(1)[:, 0].long() % 3)
    assert source(Rows(Dicts(), keys="image")).draw(0, 4)[1] is None
    x, cond = source(Rows(Dicts(), keys=("emb", "label"))).draw(0, 4)
    assert x.shape == (4, 4, 5) and torch.equal(cond, x[:, 0, 0].long() % 3)
    x, cond = source(Rows(Dicts(), keys=("image", "label", "emb"))).draw(0, 4)
    assert sorted(cond) == ["emb", "label"] and cond["emb"].shape == (4, 4, 5)


def test_a_row_may_have_several_conditions() -> None:
    class Several(Numbered):
        def __getitem__(self, i: int) -> Any:
            return torch.zeros(2), i, {"a": torch.ones(3) * i}

    _, cond = source(Several()).draw(0, 4)
    assert torch.equal(cond[1]["a"][:, 0].long(), cond[0])


class Other(Numbered):
    def __init__(self, rows: list[Any]) -> None:
        super().__init__(len(rows))
        self.held = rows

    def __getitem__(self, i: int) -> Any:
        return self.held[i]


X = torch.zeros(2)


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        ([X, X, torch.zeros(3), X], None, r"x is Tensor \[[23]\] in row \d, Tensor \[[23]\] in ro"),
        ([(X, "a")] * 4, None, r"x \[B, \.\.\.\] or \(x, cond\), got Tensor, .*str"),
        ([{"a": X, "b": 1}] * 4, None, r"none of 'x', 'image'.* with keys=; there are 'a', 'b'"),
        ([{"a": X, "b": 1}] * 4, ("a", "c", "d"), r"no key 'c', 'd': there are 'a', 'b'"),
        ([X] * 4, "a", r"keys='a' need rows that are dicts, got Tensor"),
        ([torch.zeros(2, dtype=torch.int64)] * 4, None, r"uint8 or floating, got torch\.int64"),
        ([1.0] * 4, None, r"x \[B, \.\.\.\] or \(x, cond\)"),
    ],
)
def test_rows_that_make_no_batch_are_refused(rows: list[Any], keys: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(Rows(Other(rows), keys=keys)).draw(0, 4)


def test_batches_of_a_collate_fn_are_checked() -> None:
    def collate(rows: list[Any]) -> Any:
        return shapes.pop(0)

    shapes: list[Any] = [torch.zeros(4, 2), torch.zeros(4, 3), torch.zeros(3, 2)]
    drawn = source(Rows(Numbered(), collate_fn=collate))
    drawn.draw(0, 4)
    for message in (r"must look like the first .*\[2\].*, got .*\[3\]", "must have 4 rows, got x"):
        with pytest.raises(ValueError, match=message):
            drawn.draw(1, 4)
    shapes += [(torch.zeros(4, 2), {"a": torch.zeros(4), "b": torch.zeros(3)})]
    with pytest.raises(ValueError, match=r"cond\['b'\] must have 4 rows like x, got \[3\]"):
        drawn.draw(1, 4)


def test_data_sets_without_rows_or_length_are_refused() -> None:
    class Endless(Dataset[Any]):
        def __getitem__(self, i: int) -> Any:
            return X

    with pytest.raises(TypeError, match=r"Endless has no __len__.*fastcm\.data\.Batches"):
        source(Endless())
    with pytest.raises(ValueError, match="empty data: Numbered has 0 rows"):
        source(Numbered(0))
    with pytest.raises(TypeError, match="generator has no __getitem__"):
        Rows(iter(()) if False else (i for i in ()))
    with pytest.raises(ValueError, match="sampler: of Rows the trainer decides this"):
        Rows(Numbered(), sampler=[1])


def test_an_error_of_a_worker_names_its_cause() -> None:
    class Broken(Numbered):
        def __getitem__(self, i: int) -> Any:
            raise OSError(f"row {i} is gone")

    with pytest.raises(OSError, match=r"row \d is gone"):
        source(Rows(Broken(), num_workers=1)).draw(0, 4)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_an_interrupt_is_left_to_the_process_that_trains() -> None:
    drawn = source(Rows(Numbered(), num_workers=2))
    assert numbers(drawn, range(2)) == expected(10, range(2))  # one of each, which has begun
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(cast(int, worker.pid), signal.SIGINT)
    assert numbers(drawn, range(2, 12)) == expected(10, range(2, 12))
    assert isinstance(drawn, RowData)
    drawn.close()
    assert not any(worker.is_alive() for worker in workers)
    assert numbers(drawn, [12]) == expected(10, [12])


def test_an_iterable_data_set_stays_an_iterable() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter([X] * 8)

    drawn = source(DataLoader(Stream(), 4))
    assert isinstance(drawn, IterableData) and drawn.draw(3, 4)[0].shape == (4, 2)


def test_descriptions_tell_what_is_read() -> None:
    found = [
        source(given).describe()
        for given in (
            Numbered(),
            Numbered(9),
            Dicts(),
            Rows(Numbered(), shuffle=False),
            Rows(Dicts(), keys="image"),
            Rows(Dicts(), keys=["image", "label"]),
        )
    ]
    assert all(found.count(each) == 1 for each in found)
    assert isinstance(source(Numbered()), RowData)


def weights(trainer: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.net.parameters()]


def test_a_run_on_rows_resumes_in_the_same_bits(tmp_path: Path) -> None:
    def trainer(directory: Path | None = None) -> Trainer:
        torch.manual_seed(0)
        net = MLP(shape=(3,), width=8, depth=1)
        rows = Rows(Noisy(), num_workers=1)
        return Trainer(
            net, FlowMatching(), data=rows, batch_size=4, directory=directory, compile=False,
            progress=False,
        )  # fmt: skip

    straight = weights(trainer().fit(7))
    trainer(tmp_path).fit(3)
    resumed = weights(trainer(tmp_path).load().fit(4))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed))


def as_floats(rows: dict[str, Any]) -> dict[str, Any]:
    return {"x": [[float(i) for i in x] for x in rows["x"]]}


def test_lists_of_numbers_are_tensors() -> None:
    x, cond = source(Other([([float(i), 0.0], [i, 1]) for i in range(4)])).draw(0, 4)
    assert x.shape == cond.shape == (4, 2) and torch.equal(x[:, 0].long(), cond[:, 0])


def test_rows_of_hugging_face() -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"img": [[i, i] for i in range(10)], "label": list(range(10)), "text": ["a"] * 10}
    drawn = source(datasets.Dataset.from_dict(rows).with_format("torch", dtype=torch.float32))
    assert isinstance(drawn, RowData)
    assert numbers(drawn, range(5)) == expected(10, range(5))
    image = pytest.importorskip("PIL.Image")
    listed = source(datasets.Dataset.from_dict({"x": rows["img"]}).with_transform(as_floats))
    assert numbers(listed, range(5)) == expected(10, range(5))
    rows = {"image": [image.new("L", (2, 2), i) for i in range(10)], "label": list(range(10))}
    drawn = source(Rows(datasets.Dataset.from_dict(rows), num_workers=1))
    assert numbers(drawn, range(5)) == expected(10, range(5))
    assert torch.equal(drawn.draw(1, 4)[1], torch.tensor(expected(10, [1])[0]))
