"""Data with a position of its own: saved after the batch that was trained on last, and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fastcm import CheckpointError, FlowMatching, Trainer, data
from fastcm.networks import MLP
from fastcm.runs.checkpoint import list_checkpoints, load

N, BATCH = 26, 4


class Recording(MLP):
    """Notes the rows that it is trained on, which it can tell by their condition."""

    def __init__(self) -> None:
        super().__init__(shape=(2,), width=8, depth=1, num_classes=N)
        self.seen: list[int] = []

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        self.seen += cond.tolist()
        return super().forward(x, t, cond)


class Loader:
    """Reads ahead as one with workers does; its state is where its reader has got to."""

    def __init__(self, *, extra: Any = None) -> None:
        self.epoch, self.next, self.extra = 0, 0, extra
        self._start = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(N, generator=torch.Generator().manual_seed(self.epoch))
        batches = list(order.split(BATCH))
        start, self._start = self._start, 0
        for i in range(start, len(batches)):
            ahead = batches[i : i + 2]  # read already, not handed out
            self.next = i + 1
            yield torch.zeros(len(ahead[0]), 2), ahead[0]

    def state_dict(self) -> dict[str, Any]:
        state = {"next": self.next, "generator": torch.get_rng_state(), "extra": self.extra}
        return {"loader": state, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert torch.is_tensor(state["loader"]["generator"])
        self._start = self.next = state["loader"]["next"]


def trainer(run: Path | None, given: Any, **options: Any) -> Trainer:
    torch.manual_seed(0)
    return Trainer(
        Recording(), FlowMatching(), data=given, batch_size=BATCH, directory=run, compile=False,
        progress=False, **options,
    )  # fmt: skip


class Killed(BaseException):
    """Ends a run at once, as a signal that nobody handles."""


def kill(at: int) -> Any:
    def callback(trainer: Trainer, event: str) -> None:
        if event == "step" and trainer.step == at:
            trainer._saving.settle()  # the checkpoint of the step before is complete
            raise Killed

    return callback


def seen(trainer: Trainer) -> list[int]:
    assert isinstance(trainer.net, Recording)
    return trainer.net.seen


EPOCH = N // BATCH  # the short last batch is dropped


@pytest.mark.parametrize("at", [1, 4, EPOCH, EPOCH + 1, 2 * EPOCH])
def test_a_loader_killed_and_resumed_hands_out_each_row_once(tmp_path: Path, at: int) -> None:
    straight = trainer(None, Loader()).fit(3 * EPOCH)
    killed = trainer(tmp_path, Loader(), save_every=at, callbacks=[kill(at + 1)])
    with pytest.raises(Killed):
        killed.fit(3 * EPOCH)
    resumed = trainer(tmp_path, Loader()).load()
    assert resumed.step == at
    resumed.fit(3 * EPOCH - at)
    rows = seen(killed)[: at * BATCH] + seen(resumed)
    assert rows == seen(straight)
    for first in range(0, len(rows), EPOCH * BATCH):
        assert len({*rows[first : first + EPOCH * BATCH]}) == EPOCH * BATCH
    for a, b in zip(straight.net.parameters(), resumed.net.parameters()):
        assert torch.equal(a, b)


def test_epochs_differ_where_the_iterable_is_told_of_them() -> None:
    rows = seen(trainer(None, Loader()).fit(2 * EPOCH))
    assert rows[: EPOCH * BATCH] != rows[EPOCH * BATCH :]


def test_nothing_of_a_state_is_pickled(tmp_path: Path) -> None:
    trainer(tmp_path, Loader()).fit(2)
    (path,) = list_checkpoints(tmp_path)
    found = load(path)
    assert [t.dtype for t in found.groups["data"].values()] == [torch.uint8]
    (state,) = found.state["data_state"]
    assert state["iterable"]["loader"]["next"] == 2 and state["passes"] == 1
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}


def test_a_state_that_cannot_be_saved_is_named_at_the_first_save(tmp_path: Path) -> None:
    given = trainer(tmp_path, Loader(extra={"buffer": object()}), save_every=2)
    message = (
        r"the state of Loader\['iterable'\]\['loader'\]\['extra'\]\['buffer'\] is a builtins\.obj"
        r".*have state_dict return numbers"
    )
    with pytest.raises(ValueError, match=message):
        given.fit(5)
    assert given.step == 2


def test_a_checkpoint_without_the_position_is_refused(tmp_path: Path) -> None:
    plain = type("Loader", (), {"__iter__": Loader.__iter__, "epoch": 0, "_start": 0})
    trainer(tmp_path / "without", plain()).fit(2)
    with pytest.raises(CheckpointError, match="data is missing"):
        trainer(tmp_path / "without", Loader()).load()
    trainer(tmp_path / "with", Loader()).fit(2)
    with pytest.raises(CheckpointError, match="data is unexpected"):
        trainer(tmp_path / "with", plain()).load()


def test_several_processes_need_a_state_of_each() -> None:
    with pytest.raises(TypeError, match="list has no state_dict and load_state_dict"):
        data.Batches([torch.zeros(2, 2)], per_process=True)


def test_batches_may_be_dicts(tmp_path: Path) -> None:
    x, labels = torch.zeros(BATCH, 2), torch.arange(BATCH)
    batches = [{"image": x, "label": labels, "text": ["a"] * BATCH}]
    assert seen(trainer(None, batches).fit(2)) == [0, 1, 2, 3] * 2
    other = data.Batches(batches, keys=("image", "class"))
    with pytest.raises(ValueError, match=r"no key 'class': there are 'image', 'label', 'text'"):
        trainer(None, other).fit(1)


def rows_of_torchdata(**options: Any) -> Any:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    held = TensorDataset(torch.zeros(N, 2), torch.arange(N))
    options["generator"] = torch.Generator().manual_seed(0)
    return torchdata.StatefulDataLoader(held, BATCH, shuffle=True, drop_last=True, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_of_torchdata_resumes(tmp_path: Path, workers: int) -> None:
    options: dict[str, Any] = {"num_workers": workers}
    straight = trainer(None, rows_of_torchdata(**options)).fit(3 * EPOCH)
    for at in (4, EPOCH, EPOCH + 2):
        run = tmp_path / str(at)
        killed = trainer(run, rows_of_torchdata(**options), save_every=at, callbacks=[kill(at + 1)])
        with pytest.raises(Killed):
            killed.fit(3 * EPOCH)
        resumed = trainer(run, rows_of_torchdata(**options)).load().fit(3 * EPOCH - at)
        rows = seen(killed)[: at * BATCH] + seen(resumed)
        end = -(-at // EPOCH) * EPOCH * BATCH  # of the epoch; later ones it shuffles anew
        assert rows[:end] == seen(straight)[:end]
        assert all(len({*rows[i : i + EPOCH * BATCH]}) == EPOCH * BATCH for i in (0, 24, 48))


def test_a_stream_of_hugging_face_resumes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    def stream() -> Any:
        rows = {"x": [[0.0, 0.0]] * N, "label": list(range(N))}
        held = datasets.Dataset.from_dict(rows).to_iterable_dataset(num_shards=3)
        return held.with_format("torch").batch(BATCH, drop_last_batch=True)

    straight = trainer(None, stream()).fit(3 * EPOCH)
    for at in (4, EPOCH + 2):
        run = tmp_path / str(at)
        killed = trainer(run, stream(), save_every=at, callbacks=[kill(at + 1)])
        with pytest.raises(Killed):
            killed.fit(3 * EPOCH)
        resumed = trainer(run, stream()).load().fit(3 * EPOCH - at)
        assert seen(killed)[: at * BATCH] + seen(resumed) == seen(straight)
