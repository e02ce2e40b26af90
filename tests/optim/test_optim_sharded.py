"""The optimizers on DTensor parameters: two processes on the CPU, joined by gloo."""

from __future__ import annotations

import copy
import json
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import BACKENDS
from torch import Tensor, nn

from fastcm import EMA, AdamW
from fastcm.optim import one_sweep

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed")

WORLD = 2
OPTIONS: dict[str, Any] = {"lr": 0.01, "max_grad_norm": 0.5, "ema": EMA(0.9)}
CASES: dict[str, Callable[[Path], None]] = {}


def case(function: Callable[[Path], None]) -> Callable[[Path], None]:
    """A function that every process runs, once for each backend."""
    CASES[function.__name__] = function
    return function


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Of 5, 5, 1 and 1 rows: uneven over two processes, and nothing on the second."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 1)).to(dtype)


def sharded(dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, AdamW]:
    from torch.distributed.fsdp import fully_shard

    net = network(dtype)
    fully_shard(net[0])
    fully_shard(net)
    return net, AdamW(net.parameters(), **OPTIONS)


def train(net: nn.Module, optimizer: AdamW, steps: int = 3, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 3, generator=generator).to(optimizer.param_groups[0]["params"][0].dtype)
        (20 * net(x).square().mean()).backward()
        optimizer.step()


def full(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore
    return whole.detach()


def everything(optimizer: AdamW) -> list[Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = [t for p in parameters for t in optimizer.state[p].values()]
    return [full(t).clone() for t in (*parameters, *state)]


def assert_equal(a: AdamW, b: AdamW) -> None:
    assert all(map(torch.equal, everything(a), everything(b)))


def like(net: nn.Module) -> tuple[nn.Sequential, AdamW]:
    """Another sharded network with the same parameters, and an optimizer without state."""
    other, optimizer = sharded()
    with torch.no_grad():
        for p, q in zip(other.parameters(), net.parameters()):
            p.copy_(q)
    return other, optimizer


@case
def training_of_shards_is_that_of_one_process(_: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        one = network(dtype)
        single = AdamW(one.parameters(), **OPTIONS)
        net, optimizer = sharded(dtype)
        shards = [p.to_local().numel() for p in net.parameters()]  # type: ignore
        assert shards == ([9, 3, 5, 1] if dist.get_rank() == 0 else [6, 2, 0, 0])
        train(one, single)
        train(net, optimizer)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(
            everything(optimizer), everything(single), rtol=tolerance, atol=tolerance
        )
        norms = [torch.empty(()) for _ in range(WORLD)]
        dist.all_gather(norms, optimizer.grad_norm)
        assert norms[0] == norms[1]
        torch.testing.assert_close(norms[0], single.grad_norm, rtol=tolerance, atol=0)
        kinds = {type(t).__name__ for e in optimizer.state.values() for t in e.values() if t.ndim}
        assert kinds == {"DTensor"}


@case
def an_update_of_shards_is_local(_: Path) -> None:
    """Clip, moments and averages of one's own rows: a sum of squares is all that travels."""
    from torch.distributed.tensor.debug import CommDebugMode

    net, optimizer = sharded()
    train(net, optimizer)
    with CommDebugMode() as watch:
        optimizer.step()
    assert {str(op): n for op, n in watch.get_comm_counts().items()} == {"c10d.allreduce_": 1}


@case
def the_norm_counts_replicas_once(_: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    g = torch.arange(15.0).view(5, 3)
    for shape in ((2, 1), (1, 2)):
        mesh = init_device_mesh("cpu", shape)
        layouts = ([Replicate(), Shard(0)], [Shard(1), Shard(0)], [Replicate(), Replicate()])
        parameters = [nn.Parameter(torch.zeros(5, 3))]
        parameters += [
            nn.Parameter(distribute_tensor(torch.zeros(5, 3), mesh, placements))
            for placements in layouts
        ]
        parameters[0].grad = g
        for p, placements in zip(parameters[1:], layouts):
            p.grad = distribute_tensor(g, mesh, placements)
        # a gradient may be placed in another way than its parameter
        parameters[1].grad = distribute_tensor(g, mesh, [Replicate(), Replicate()])
        optimizer = AdamW(parameters, **OPTIONS)
        optimizer.step()
        torch.testing.assert_close(optimizer.grad_norm, 2 * g.norm())
        for p in parameters[1:]:
            assert torch.equal(full(p), parameters[0])


@case
def a_nan_in_one_process_stops_both(_: Path) -> None:
    net, optimizer = sharded()
    train(net, optimizer)
    before = everything(optimizer)
    if dist.get_rank() == 0:
        net[2].bias.grad.to_local().fill_(torch.nan)  # type: ignore
    optimizer.step()
    assert all(map(torch.equal, everything(optimizer), before))
    assert optimizer.counts.tolist() == [4, 1, 1]


@case
def the_state_goes_through_get_and_set_optimizer_state_dict(_: Path) -> None:
    from torch.distributed.checkpoint import state_dict as dcp

    net, optimizer = sharded()
    train(net, optimizer)
    for options in (
        dcp.StateDictOptions(),
        dcp.StateDictOptions(flatten_optimizer_state_dict=True),
        dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True),
    ):
        state = dcp.get_optimizer_state_dict(net, optimizer, options=options)
        other, fresh = like(net)
        dcp.set_optimizer_state_dict(other, fresh, state, options=options)
        assert_equal(fresh, optimizer)
        train(net, optimizer, seed=1)
        train(other, fresh, seed=1)
        assert_equal(fresh, optimizer)


@case
def distributed_checkpoints_continue_bit_for_bit(folder: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    net, optimizer = sharded()
    train(net, optimizer)
    model, state = get_state_dict(net, optimizer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder)
    train(net, optimizer, seed=1)
    other, fresh = sharded()
    model, state = get_state_dict(other, fresh)
    dcp.load({"model": model, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(other, fresh, model_state_dict=model, optim_state_dict=state)
    train(other, fresh, seed=1)
    assert_equal(fresh, optimizer)


@case
def states_are_copied_pickled_and_taken_from_one_process(_: Path) -> None:
    net, optimizer = sharded()
    train(net, optimizer)
    states = [
        copy.deepcopy(optimizer.state_dict()),
        pickle.loads(pickle.dumps(optimizer.state_dict())),
    ]
    single = network()
    whole = AdamW(single.parameters(), **OPTIONS)
    train(single, whole)
    states.append(whole.state_dict())
    stock = torch.optim.AdamW(net.parameters())
    stock.load_state_dict(optimizer.state_dict())
    states.append(stock.state_dict())
    for state in states:
        _, fresh = like(net)
        fresh.load_state_dict(state)
        torch.testing.assert_close(everything(fresh), everything(optimizer), rtol=1e-5, atol=1e-6)


@case
def averages_are_swapped_in_and_out_between_passes_of_fsdp(_: Path) -> None:
    """FSDP keeps the parameters of its root gathered after a forward pass."""
    net, optimizer = sharded()
    train(net, optimizer)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    trained, before = net(x).detach(), everything(optimizer)
    average = network()
    with torch.no_grad():
        for p, q in zip(average.parameters(), optimizer.state):
            p.copy_(full(optimizer.state[q]["ema_0"]))
    with optimizer.averaged(0, net), torch.no_grad():
        torch.testing.assert_close(net(x), average(x))
    assert torch.equal(net(x), trained) and not torch.allclose(average(x), trained)
    net(x).sum().backward()
    assert all(map(torch.equal, everything(optimizer), before))


@case
def a_live_copy_of_a_sharded_module_is_refused(_: Path) -> None:
    net, optimizer = sharded()
    with pytest.raises(ValueError, match="a sharded module cannot be copied: use `with optimizer"):
        optimizer.ema_module(0, net)


def work(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timedelta(seconds=20))
    found = {}
    for backend, choose in BACKENDS.items():
        one_sweep.choose = choose
        for name, function in CASES.items():
            try:
                function(Path(folder) / f"{backend}-{name}")
                found[f"{backend}-{name}"] = ""
            except Exception:
                found[f"{backend}-{name}"] = traceback.format_exc()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of both processes: the traceback of each case, empty where it passed."""
    folder = tmp_path_factory.mktemp("sharded")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.spawn(work, (port, str(folder)), nprocs=WORLD, join=False)
    deadline = time.monotonic() + 120
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the processes wait for each other")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test(name: str, backend: str, outcomes: list[dict[str, str]]) -> None:
    for rank, found in enumerate(outcomes):
        assert not found[f"{backend}-{name}"], f"process {rank}: {found[f'{backend}-{name}']}"
