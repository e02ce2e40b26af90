"""Trainings that several processes of test_parallel.py share: what every one of them runs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from data_runs import Augmented, Counting, sharded
from torch import Tensor, nn

import fastcm
from fastcm import (
    ConsistencyDistillation,
    ConsistencyTraining,
    FlowMatching,
    MeanFlow,
    Shortcut,
    Trainer,
    data,
)
from fastcm.networks import MLP
from fastcm.runs.checkpoint import list_checkpoints
from fastcm.training.processes import Disagreement, PeerError

STEPS = 50
DATA = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(50) % 3


def mlp(seed: int = 0, **options: Any) -> MLP:
    torch.manual_seed(seed)
    return MLP(shape=(3,), width=16, depth=1, **options)


def teacher() -> MLP:
    """One that says something: the last layer of a new network is zero."""
    net = mlp(3, num_classes=3)
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    return net


def guided(**options: Any) -> Trainer:
    objective = ConsistencyDistillation(teacher(), guidance=2.0, null_condition=3)
    return trainer(objective, mlp(num_classes=3), data=(DATA, LABELS), **options)


def trainer(objective: Any = None, net: nn.Module | None = None, **options: Any) -> Trainer:
    """Of 16 rows a step: an epoch ends within a batch."""
    objective = objective or ConsistencyTraining()
    if net is None:
        net = mlp(two_times=getattr(objective, "two_times", False))
    defaults = {"data": DATA, "batch_size": 16, "compile": False, "progress": False}
    return Trainer(net, objective, **{**defaults, "log": lambda line: None, **options})


class Broken:
    """The data, but the last row of one step is no number."""

    def draw(self, step: int, batch_size: int) -> tuple[Tensor, Tensor | None]:
        rows = (step * batch_size + torch.arange(batch_size)) % len(DATA)
        x = DATA[rows]
        if step == 7:
            x[-1] = torch.nan
        return x, None

    def describe(self) -> dict[str, object]:
        return {"broken": True}


def dropped() -> FlowMatching:
    return FlowMatching(condition_dropout=0.3, null_condition=3)


def by_sgd(**options: Any) -> Trainer:
    net = mlp()
    return trainer(
        FlowMatching(), net, optimizer=torch.optim.SGD(net.parameters(), 0.01), **options
    )


INVARIANT: dict[str, Callable[..., Trainer]] = {
    "flow": lambda **o: trainer(FlowMatching(), **o),
    "flow-accumulated": lambda **o: trainer(FlowMatching(), accumulate=2, **o),
    "flow-conditional": lambda **o: trainer(
        dropped(), mlp(num_classes=3), data=(DATA, LABELS), accumulate=2, **o
    ),
    "flow-nan": lambda **o: trainer(FlowMatching(), data=Broken(), **o),
    "ct": lambda **o: trainer(**o),
    "cd": guided,
    "meanflow": lambda **o: trainer(MeanFlow(), **o),
    "meanflow-accumulated": lambda **o: trainer(MeanFlow(instant=0.5), accumulate=2, **o),
    "shortcut": lambda **o: trainer(Shortcut(every=4), **o),
    "idle-parameter": lambda **o: trainer(FlowMatching(), mlp(log_variance=True), **o),
    "sgd": by_sgd,
    "rows": lambda **o: trainer(FlowMatching(), data=Augmented(DATA), **o),
    "shards": lambda **o: trainer(FlowMatching(), data=sharded(DATA), **o),
    "flow-bf16": lambda **o: trainer(FlowMatching(), precision="bf16", **o),
}
"""Trainings that must not depend on how many processes share them."""
IN_FOUR = ("flow", "flow-accumulated", "ct", "cd", "meanflow", "shortcut")


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """What a training ended with."""
    networks = {
        f"{name}.{key}": tensor.detach().clone()
        for name, net in trainer.state.networks.items()
        for key, tensor in net.state_dict().items()
    }
    rest = {
        "counts": trainer.update.counts.clone(),
        "grad_norm": trainer.update.grad_norm.clone(),
        "loss": torch.tensor(trainer.metrics["loss"]),
    }
    return {**networks, **rest}


def same_everywhere(trainer: Trainer) -> bool:
    """Whether all processes have the same bits."""
    tensors = [t.double().reshape(-1) for t in everything(trainer).values()]
    mine = torch.cat(tensors)
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, mine)
    return all(torch.equal(mine, other) for other in theirs)


Case = Callable[[Path], None]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """A function that both of two processes run."""
    CASES[function.__name__] = function
    return function


def differing(first: Any, second: Any) -> Any:
    """The first in process 0, the second in the other."""
    return (first, second)[dist.get_rank()]


def refused(match: str, make: Callable[[], object], kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=match):
        make()


@case
def what_differs_between_processes_is_refused_by_all(_: Path) -> None:
    for options, match in (
        ({"seed": differing(3, 4)}, "process 1 .* seed: 3 -> 4"),
        ({"log_every": differing(5, 6)}, "log_every: 5 -> 6"),
        ({"data": DATA + dist.get_rank()}, "data.contents: '[0-9a-f]+' -> '[0-9a-f]+'"),
        ({"net": mlp(dist.get_rank())}, "weights: '[0-9a-f]+' -> '[0-9a-f]+'"),
        ({"objective": differing(ConsistencyTraining(), FlowMatching())}, "objective.type"),
        ({"accumulate": differing(1, 2)}, "accumulate: 1 -> 2"),
    ):
        refused(match, lambda options=options: trainer(parallel="ddp", **options), Disagreement)
    run = trainer(parallel="ddp")
    refused("steps: 1 -> 2", lambda: run.fit(differing(1, 2)))


@case
def what_cannot_be_shared_is_refused(_: Path) -> None:
    def make(**options: Any) -> None:
        trainer(parallel="ddp", **options)

    refused("batch_size 6 is not a multiple of 2 processes x accumulate 2", lambda: make(
        batch_size=6, accumulate=2
    ))  # fmt: skip
    refused("micro-batches of 4 rows: .* multiples of 8", lambda: make(
        objective=Shortcut(), batch_size=8
    ))  # fmt: skip
    refused("got an iterable of batches", lambda: make(data=[DATA[:16]]))
    for layer, match in ((nn.Dropout(0.5), "dropout"), (nn.BatchNorm1d(3), "GroupNorm")):
        net = mlp()
        net.more = layer
        refused(match, lambda net=net: make(net=net))


@case
def the_error_of_one_process_ends_all(folder: Path) -> None:
    trainer(parallel="ddp", directory=folder).fit(1)
    kind = differing(FileExistsError, PeerError)
    with pytest.raises(kind, match="holds a run already"):
        trainer(parallel="ddp", directory=folder).fit(1)
    missing = differing(folder, folder / "missing")
    with pytest.raises(differing(PeerError, FileNotFoundError), match="missing"):
        trainer(parallel="ddp").load(missing)


@case
def a_signal_to_one_process_saves_and_ends_all_at_the_same_step(folder: Path) -> None:
    def send(trainer: Trainer, event: str) -> None:
        if event == "step" and trainer.step == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    run = trainer(parallel="ddp", directory=folder, callbacks=[send]).fit(10)
    assert run.interrupted is signal.SIGTERM
    assert 3 < run.step < 10
    assert same_everywhere(run)
    dist.barrier()
    assert list_checkpoints(folder)[0].name == f"step_{run.step:09d}"


@case
def the_first_process_alone_writes_prints_and_tells_of_saves(folder: Path) -> None:
    lines: list[str] = []
    events: list[str] = []
    options: dict[str, Any] = {"directory": folder, "log_every": 2, "save_every": 4}
    run = trainer(
        parallel="ddp",
        log=lines.append,
        compile="auto",
        callbacks=[lambda trainer, event: events.append(event)],
        **options,
    ).fit(6)
    assert bool(lines) == (dist.get_rank() == 0)
    assert events.count("step") == 6 and events.count("log") == 3
    assert events.count("save") == differing(2, 0)
    assert (run.saved is not None) == (dist.get_rank() == 0)
    elsewhere = run.save(folder / "elsewhere")
    assert elsewhere.parent.parent == folder / "elsewhere" and elsewhere.exists()


@case
def what_one_process_chose_for_compiling_all_do(_: Path) -> None:
    run = trainer(parallel="ddp", compile="auto")
    run.state.gradients._choose = differing(lambda *a: False, None)  # type: ignore
    run.fit(1)
    assert run.state.gradients.compiled is False


@case
def what_one_process_has_against_something_all_hear(_: Path) -> None:
    among = trainer(parallel="ddp").processes
    assert among.first_reason(differing(None, "memory")) == "memory"
    assert among.first_reason(differing("this", "that")) == "this"
    assert among.first_reason(None) is None
    assert among.any(differing(False, True)) and not among.any(False)
    assert among.carrier(torch.device("cpu")) == "gloo"


@case
def each_process_goes_on_where_its_own_data_stood(folder: Path) -> None:
    def make(**options: Any) -> tuple[Trainer, Counting]:
        held = Counting(dist.get_rank(), 8)
        given = data.Batches(held, per_process=True)
        return trainer(parallel="ddp", data=given, directory=folder, **options), held

    run, _ = make()
    run.fit(3)
    run, held = make()
    run.load().fit(2)
    assert held.handed_out == [3, 4] and same_everywhere(run)
    dist.barrier()
    alone = trainer(data=Counting(dist.get_rank(), 16))
    refused("position in the data of 2 processes, there are 1", lambda: alone.load(folder))


Noted = Callable[[str, Callable[[], Any]], None]


@contextmanager
def reporting(rank: int, world: int, port: int, here: Path) -> Iterator[Noted]:
    """One of several processes, which notes what functions give, or their traceback, in a file."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found: dict[str, Any] = {}

    def noted(name: str, function: Callable[[], Any]) -> None:
        try:
            found[name] = function()
        except Exception:
            found[name] = traceback.format_exc()

    yield noted
    torch.save(found, here / f"{world}-{rank}.pt")
    dist.destroy_process_group()


def work(rank: int, world: int, port: int, folder: str, cases: bool) -> None:
    here = Path(folder)

    def trained(make: Callable[..., Trainer]) -> dict[str, Tensor]:
        result = make(parallel="ddp").fit(STEPS)
        assert same_everywhere(result)
        return everything(result)

    with reporting(rank, world, port, here) as noted:
        for name, make in INVARIANT.items():
            if world > 2 and name not in IN_FOUR:
                continue
            noted(name, lambda make=make: trained(make))  # type: ignore
        noted("resumed", lambda: resumed(here / "run", parallel="ddp"))
        noted("bits", lambda: stopped_and_not(here / f"bits-{world}"))
        for name, function in CASES.items() if cases else ():
            noted(name, lambda function=function, name=name: function(here / name))  # type: ignore


def worker(launcher: int, rank: int) -> int:
    """The process of a rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"no process {rank} among {children}")


def killed(launcher: subprocess.Popen[str], checkpoint: Path) -> str:
    """Kill the second process of torchrun once a checkpoint is there; what was said to the end."""
    try:
        deadline = time.monotonic() + 120
        while not checkpoint.exists():
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(worker(launcher.pid, 1), signal.SIGKILL)
        told, _ = launcher.communicate(timeout=120)
    finally:
        launcher.kill()
    assert launcher.returncode == 0, told
    told = told.replace("\n", " ")
    assert "Traceback" not in told and "fastcm: " not in told
    return told


def resumed(run: Path, **options: Any) -> dict[str, Tensor]:
    """A few steps more of a run that others began."""
    result = trainer(directory=run, averages=(fastcm.EMA(0.9),), **options)
    if run.exists() and list_checkpoints(run):
        result.load()
    return everything(result.fit(9))


def stopped_and_not(folder: Path) -> list[dict[str, Tensor]]:
    """The same run in one piece, and in two."""
    whole = trainer(parallel="ddp").fit(7)
    trainer(parallel="ddp", directory=folder).fit(3)
    halves = trainer(parallel="ddp", directory=folder).load().fit(4)
    return [everything(whole), everything(halves)]
