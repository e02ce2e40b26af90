"""Trainings that several processes of test_sharded.py share, each with a part of the weights."""

from __future__ import annotations

import gc
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from parallel_runs import DATA, LABELS, STEPS, Broken, differing, refused, reporting, trainer
from torch import Tensor, nn

import fastcm
from fastcm import (
    ConsistencyDistillation,
    ConsistencyTraining,
    ContinuousConsistency,
    FlowMatching,
    MeanFlow,
    Shortcut,
    Trainer,
)
from fastcm.losses import Learned
from fastcm.networks import MLP, DiT, UNet
from fastcm.runs import pretrained, shards
from fastcm.runs.checkpoint import list_checkpoints
from fastcm.runs.lock import RunLock
from fastcm.sharding.dtensors import is_dtensor, local, whole
from fastcm.training.processes import Disagreement, PeerError

IMAGES = torch.randn(32, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def mlp(seed: int = 0, **options: Any) -> MLP:
    """Of 18, 2 and 3 rows, which two or four processes cannot cut equally; two blocks."""
    torch.manual_seed(seed)
    return MLP(shape=(3,), width=18, depth=2, **options)


def run(objective: Any = None, net: nn.Module | None = None, **options: Any) -> Trainer:
    objective = objective or ConsistencyTraining()
    if net is None:
        net = mlp(two_times=getattr(objective, "two_times", False))
    return trainer(objective, net, **options)


def guided(**options: Any) -> Trainer:
    teacher = mlp(3, num_classes=3)
    for p in teacher.parameters():
        nn.init.normal_(p, std=0.3)
    objective = ConsistencyDistillation(
        teacher,
        guidance=2.0,
        null_condition=3,
        solver="heun",
        parameterization=fastcm.Parameterization(),
    )
    return run(objective, mlp(num_classes=3), data=(DATA, LABELS), **options)


def by(make: Callable[..., torch.optim.Optimizer], of: Any = None, **options: Any) -> Trainer:
    net = mlp()
    return run(of or FlowMatching(), net, optimizer=make(net.parameters()), **options)


def transformer(**options: Any) -> Trainer:
    torch.manual_seed(0)
    net = DiT(1, 4, width=16, depth=2, num_heads=2)
    return run(ConsistencyTraining(), net, data=IMAGES, **options)


def convolutional(**options: Any) -> Trainer:
    torch.manual_seed(0)
    net = UNet(1, 4, channel_mults=(1, 2), num_res_blocks=1, num_heads=2)
    return run(FlowMatching(), net, data=IMAGES, **options)


def partly(**options: Any) -> Trainer:
    """A block that is not trained, and is part of every average as it is."""
    net = mlp()
    net.blocks[0].requires_grad_(False)
    return run(ConsistencyTraining(), net, **options)


def tied(**options: Any) -> Trainer:
    """A parameter that two blocks share belongs to neither."""
    net = mlp()
    net.blocks[1].modulation = net.blocks[0].modulation
    return run(FlowMatching(), net, **options)


def hollow(**options: Any) -> Trainer:
    """Student and teacher on the meta device; positions are buffers that no file has."""
    with torch.device("meta"):
        net, teacher = (DiT(1, 4, width=18 * 4, depth=2, num_heads=2) for _ in range(2))
    objective = ConsistencyDistillation(teacher)
    fill = {"init": "reset", "teacher_init": scattered}
    return run(objective, net, data=IMAGES, **fill, **options)


def scattered(module: nn.Module) -> None:
    """Values for a teacher that says something."""
    for p in module.parameters(recurse=False):
        nn.init.normal_(p, std=0.2)


INVARIANT: dict[str, Callable[..., Trainer]] = {
    "flow": lambda **o: run(FlowMatching(), **o),
    "flow-accumulated": lambda **o: run(FlowMatching(), accumulate=2, **o),
    "flow-nan": lambda **o: run(FlowMatching(), data=Broken(), **o),
    "flow-learned": lambda **o: run(
        FlowMatching(weight=Learned()), mlp(log_variance=True), accumulate=2, **o
    ),
    "ct": run,
    "ct-checkpointed": lambda **o: run(checkpoint="blocks", **o),
    "ict": lambda **o: by(fastcm.RAdam, ConsistencyTraining.improved(STEPS), **o),
    "cd": guided,
    "shortcut": lambda **o: run(Shortcut(every=4), **o),
    "meanflow": lambda **o: run(MeanFlow(instant=0.5), **o),
    "sct": lambda **o: run(
        ContinuousConsistency(warmup=10), mlp(log_variance=True, time_scale=1.0), **o
    ),
    "sgd": lambda **o: by(lambda p: torch.optim.SGD(p, 0.01, momentum=0.9), **o),
    "torch-adamw": lambda **o: by(lambda p: torch.optim.AdamW(p, 1e-3), **o),
    "idle-parameter": lambda **o: run(FlowMatching(), mlp(log_variance=True), **o),
    "partly-frozen": partly,
    "tied": tied,
    "dit": transformer,
    "unet": convolutional,
    "hollow": hollow,
    "flow-bf16": lambda **o: run(FlowMatching(), precision="bf16", **o),
}
"""Trainings that end as in one process that holds everything."""
LONG = ("flow", "flow-accumulated", "ct", "cd")
IN_FOUR = ("flow-accumulated", "cd", "hollow")
MESHES = {2: {"mesh": (2,), "replicas": (2, 1)}, 4: {"replicas": (2, 2)}}


def steps_of(name: str) -> int:
    return STEPS if name in LONG else 12


def ended(trainer: Trainer) -> dict[str, Tensor]:
    """What a training ended with, whole."""
    weights = {
        f"{group}.{name}": whole(tensor).detach().clone()
        for group, tensors in trainer.state.weights().items()
        for name, tensor in tensors.items()
    }
    rest = {
        "counts": trainer.update.counts.clone(),
        "grad_norm": trainer.update.grad_norm.clone(),
        "loss": torch.tensor(trainer.metrics["loss"]),
    }
    return {**weights, **rest}


def moments(trainer: Trainer) -> dict[str, Tensor]:
    state = trainer.optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": whole(torch.as_tensor(value)).clone()
        for index, entries in state.items()
        for name, value in entries.items()
    }


Case = Callable[[Path], None]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """A function that both of two processes run."""
    CASES[function.__name__] = function
    return function


@case
def every_process_holds_a_part_of_everything(_: Path) -> None:
    run = guided(parallel="fsdp").fit(2)
    teacher = run.objective.teacher
    for tensors in (
        list(run.net.parameters()),
        list(teacher.parameters()),
        list(run.ema_network(0).parameters()),
        [t for entries in run.optimizer.state.values() for t in entries.values() if t.ndim],
    ):
        assert all(map(is_dtensor, tensors))
        held = torch.tensor([sum(local(t).numel() for t in tensors)])
        dist.all_reduce(held)
        assert int(held) == sum(t.numel() for t in tensors)


@case
def the_network_of_an_average_computes_with_the_average_of_now(_: Path) -> None:
    run = trainer_of_two()
    network, x, t = run.ema_network(0), torch.randn(5, 3), torch.rand(5)
    dist.broadcast(x, 0)
    dist.broadcast(t, 0)
    outputs = []
    for _step in range(3):
        run.fit(2)
        plain = mlp().requires_grad_(False)
        plain.load_state_dict({k: whole(v) for k, v in run.state.weights()["average_0"].items()})
        with torch.no_grad():
            outputs.append(network(x, t))
            assert torch.equal(outputs[-1], plain(x, t))
            assert torch.equal(run.ema_network(-2)(x, t), plain(x, t))
    assert not torch.equal(outputs[0], outputs[1])
    assert run.state.gradients.target_net is run.ema_network(1)


def trainer_of_two(**options: Any) -> Trainer:
    """Of an average, and another that is the target's."""
    return run(parallel="fsdp", averages=(fastcm.EMA(0.5),), **options)


@case
def nobody_pays_for_the_network_of_an_average_that_nobody_holds(_: Path) -> None:
    run = trainer_of_two()
    made = run.update._networks._made  # type: ignore[attr-defined]
    assert sorted(made) == [1]
    kept = run.ema_network(0)
    assert sorted(made) == [0, 1]
    del kept
    gc.collect()
    run.fit(1)
    assert sorted(made) == [1]


@case
def what_fsdp_notes_of_forward_passes_does_not_grow(_: Path) -> None:
    run = guided(parallel="fsdp")
    networks = (run.net, run.objective.teacher, run.state.gradients.target_net)

    def notes() -> list[int]:
        groups = [
            part._get_fsdp_state()._fsdp_param_group
            for net in networks
            for part in net.modules()
            if hasattr(part, "_get_fsdp_state")
        ]
        return [len(g._post_forward_indices) for g in groups if g is not None]

    run.fit(2)
    before = notes()
    run.fit(5)
    assert notes() == before and len(before) >= 9


@case
def a_checkpoint_is_of_the_parts_of_all(folder: Path) -> None:
    events: list[str] = []
    made = run(
        parallel="fsdp",
        directory=folder,
        save_every=2,
        callbacks=[lambda trainer, event: events.append(event)],
    ).fit(5)
    assert events.count("save") == differing(3, 0)
    assert (made.saved is not None) == (dist.get_rank() == 0)
    names = [path.name for path in list_checkpoints(folder)]
    assert names == ["step_000000005", "step_000000004", "step_000000002"]
    files = {p.name for p in list_checkpoints(folder)[0].iterdir()}
    groups = ("model", "average_0", "average_1", "optimizer")
    assert files == {
        "state.json",
        "random.safetensors",
        "counters.safetensors",
        *(f"{group}.index.json" for group in groups),
        *(f"{group}.0000{rank}.safetensors" for group in groups for rank in range(2)),
    }
    elsewhere = made.save(folder / "elsewhere")
    assert elsewhere == list_checkpoints(folder / "elsewhere")[0]


@case
def what_is_frozen_is_left_out_of_the_parts(folder: Path) -> None:
    options: dict[str, Any] = {"parallel": "fsdp", "save_frozen": False, "directory": folder}
    wanted = ended(partly(parallel="fsdp").fit(3))
    partly(**options).fit(2)
    found = partly(**options).load().fit(1)
    now = ended(found)
    assert now and not any(".blocks.0." in name for name in now)
    assert all(torch.equal(value, wanted[name]) for name, value in now.items())
    net = mlp()
    net.blocks[0].requires_grad_(False)
    read = fastcm.Sampler.from_run(folder, net=net, ema=-1).net.state_dict()
    assert all(torch.equal(value, wanted[f"model.{name}"]) for name, value in read.items())


@case
def shards_are_filled_out_of_files_by_what_each_process_holds(folder: Path) -> None:
    wanted = mlp(5)
    for p in wanted.parameters():
        nn.init.normal_(p)
    dist.barrier()
    if dist.get_rank() == 0:
        folder.mkdir()
        safetensors.torch.save_file(wanted.state_dict(), folder / "model.safetensors")
    dist.barrier()
    read: list[int] = []
    elements = pretrained.elements

    def counted(opened: Any, name: str, start: int, stop: int) -> Tensor:
        read.append(stop - start)
        return elements(opened, name, start, stop)

    pretrained.elements = counted
    try:
        made = run(net=on_meta(), parallel="fsdp", init=folder)
    finally:
        pretrained.elements = elements
    held = [local(p).numel() for p in made.net.parameters()]
    assert sorted(read) == sorted(held)
    for name, value in made.net.state_dict().items():
        assert torch.equal(whole(value), wanted.state_dict()[name])


@case
def shards_are_filled_out_of_runs(folder: Path) -> None:
    run(parallel="fsdp", directory=folder / "shards").fit(2)
    if dist.get_rank() == 0:
        run(directory=folder / "plain").fit(2)
    dist.barrier()
    for kind in ("shards", "plain"):
        average = fastcm.Sampler.from_run(folder / kind).net.state_dict()
        filled = run(net=on_meta(), parallel="fsdp", init=folder / kind)
        for name, value in filled.net.state_dict().items():
            assert torch.equal(whole(value), average[name]), (kind, name)


@case
def frozen_parameters_of_hollow_networks_have_their_fingerprint(_: Path) -> None:
    def left_out(net: nn.Module, **options: Any) -> Any:
        net.blocks[0].requires_grad_(False)  # type: ignore[index,union-attr]
        return run(net=net, parallel="fsdp", save_frozen=False, **options).state.left_out

    torch.manual_seed(0)
    assert left_out(on_meta(), init="reset") == left_out(mlp())


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return mlp()


@case
def a_damaged_part_makes_all_fall_back(folder: Path) -> None:
    for damage in ("altered", "missing"):
        here = folder / damage
        first = run(parallel="fsdp", directory=here).fit(3)
        wanted = ended(first)
        first.fit(2)
        file = here / "checkpoints" / "step_000000005" / "average_0.00001.safetensors"
        if dist.get_rank() == 0:
            data = file.read_bytes()
            if damage == "missing":
                file.unlink()
            else:
                file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        dist.barrier()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = run(parallel="fsdp", directory=here).load()
        assert found.step == 3
        texts = [str(w.message) for w in said if "falling back" in str(w.message)]
        assert len(texts) == 1 and file.name in texts[0]
        weights = {k: v for k, v in wanted.items() if k not in ("loss", "grad_norm")}
        found.metrics = {"loss": 0.0}
        now = ended(found)
        assert all(torch.equal(now[name], value) for name, value in weights.items())


@case
def a_write_that_fails_in_one_process_fails_in_all(folder: Path) -> None:
    made = run(parallel="fsdp", directory=folder).fit(2)
    real = shards.write_tensors

    def full(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    shards.write_tensors = differing(real, full)
    try:
        with pytest.raises(differing(PeerError, OSError), match="No space left"):
            made.fit(2)
    finally:
        shards.write_tensors = real
    dist.barrier()
    assert [path.name for path in list_checkpoints(folder)] == ["step_000000002"]
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_000000002"]
    made.fit(1)
    assert list_checkpoints(folder)[0].name == "step_000000005"


@case
def a_run_that_is_in_use_is_refused_by_all(folder: Path) -> None:
    made = run(parallel="fsdp").fit(1)
    lock = RunLock(folder)
    if dist.get_rank() == 0:
        lock.__enter__()
    with pytest.raises(differing(BlockingIOError, PeerError), match="in use"):
        made.save(folder)
    if dist.get_rank() == 0:
        lock.__exit__()
    made.save(folder)


@case
def a_signal_to_one_process_ends_all(folder: Path) -> None:
    def send(trainer: Trainer, event: str) -> None:
        if event == "step" and trainer.step == 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    made = run(parallel="fsdp", directory=folder, callbacks=[send]).fit(10)
    assert made.interrupted is signal.SIGTERM and 3 < made.step < 10
    dist.barrier()
    assert list_checkpoints(folder)[0].name == f"step_{made.step:09d}"


@case
def what_cannot_be_sharded_is_refused_by_name(_: Path) -> None:
    def make(net: nn.Module | None = None, **options: Any) -> Callable[[], object]:
        student = mlp() if net is None else net
        return lambda: run(FlowMatching(), student, **{"parallel": "fsdp", **options})

    mesh = dist.device_mesh.init_device_mesh  # type: ignore[attr-defined]
    refused("1 dimension.*or of 2", make(parallel=mesh("cpu", (1, 1, 2))))
    refused("mesh_dim_names", make(parallel=mesh("cpu", (1, 2))))
    alone = dist.device_mesh.DeviceMesh("cpu", [dist.get_rank()])  # type: ignore[attr-defined]
    refused("must hold all 2 processes", make(parallel=alone))
    refused("compile=True is not possible with shards", make(compile=True))
    refused("graph='step' is not possible", make(graph="step"))
    for layer, match in ((nn.Dropout(0.5), "dropout"), (nn.BatchNorm1d(3), "GroupNorm")):
        net = mlp()
        net.more = layer
        refused(match, make(net))
    scalar, slanted, mixed = mlp(), mlp(), mlp()
    scalar.scale = nn.Parameter(torch.tensor(1.0))
    refused("no dimension, scale", make(scalar))
    slanted.input.weight = nn.Parameter(torch.randn(3, 18).T)
    refused("not contiguous, input.weight", make(slanted))
    mixed.output.bfloat16()
    refused("one dtype", make(mixed))
    refused("net is compiled already", make(torch.compile(mlp())))  # type: ignore[arg-type]
    with torch.device("meta"):
        refused("meta device", make(mlp()))
    net = mlp()
    refused("LBFGS is not known", make(net, optimizer=torch.optim.LBFGS(net.parameters())))
    used = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(DATA[:2], torch.ones(2)).sum().backward()
    used.step()
    refused("has a state already", make(net, optimizer=used))
    more = torch.optim.SGD([*net.parameters(), nn.Parameter(torch.ones(1))], 0.1)
    refused("not of net", make(net, optimizer=more))
    sharded = run(FlowMatching(), parallel="fsdp").net
    refused("net is sharded already", make(sharded))
    seed = dist.get_rank()
    refused("weights: '[0-9a-f]+' -> '[0-9a-f]+'", make(mlp(seed)), Disagreement)


def work(rank: int, world: int, port: int, folder: str) -> None:
    here = Path(folder)
    with reporting(rank, world, port, here) as noted:
        for name, make in INVARIANT.items():
            if world == 2 or name in IN_FOUR:
                n = steps_of(name)
                noted(name, lambda make=make, n=n: ended(make(parallel="fsdp").fit(n)))  # type: ignore
        for name, shape in MESHES[world].items():
            place = here / f"{name}-{world}"
            noted(name, lambda shape=shape, place=place: on_mesh(shape, place))  # type: ignore
        noted("resumed", lambda: resumed(here / "run", parallel="fsdp"))
        if world == 2:
            noted("bits", lambda: stopped_and_not(here / "bits"))
        for name, function in CASES.items() if world == 2 else ():
            noted(name, lambda function=function, name=name: function(here / name))  # type: ignore


def on_mesh(shape: tuple[int, ...], folder: Path) -> dict[str, Tensor]:
    """CT on a mesh, with a checkpoint in the middle."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    run(parallel=mesh, directory=folder).fit(STEPS // 2)
    return ended(run(parallel=mesh, directory=folder).load().fit(STEPS - STEPS // 2))


def resumed(folder: Path, **options: Any) -> dict[str, Tensor]:
    """A few steps more of a run that others began."""
    result = run(directory=folder, averages=(fastcm.EMA(0.9),), **options)
    if folder.exists() and list_checkpoints(folder):
        result.load()
    return ended(result.fit(9))


def stopped_and_not(folder: Path) -> list[dict[str, Tensor]]:
    """The same run in one piece, and in two."""
    options: dict[str, Any] = {"parallel": "fsdp", "checkpoint": "blocks"}
    whole_run = run(**options).fit(7)
    run(directory=folder, **options).fit(3)
    halves = run(directory=folder, **options).load().fit(4)
    return [{**ended(r), **moments(r)} for r in (whole_run, halves)]
