"""Several processes that train as one: how they find each other.

torchrun starts them, gloo carries what the hosts tell each other (`processes`). Their gradients are
averaged by `mean_gradients`, or by what `sharded` makes of the networks. One process alone does
nothing of it.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeGuard

import torch
import torch.distributed as dist

from fastcm.training.processes import PeerError, Processes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Parallel: TypeAlias = "Literal['ddp', 'fsdp'] | DeviceMesh"
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_COMMAND = "torchrun --standalone --nproc-per-node 2 ..."


def launched() -> tuple[int, int]:
    """(rank, number of processes) by torchrun's variables; (0, 1) without them.

    Raises:
        ValueError: they are no such numbers.
    """
    texts = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        rank, count = (int(text) for text in texts)
    except ValueError:
        rank, count = -1, 0
    if not 0 <= rank < count:
        raise ValueError(f"RANK and WORLD_SIZE must be as torchrun sets them, got {texts}")
    return rank, count


def local_device() -> str:
    """The device of this process by torchrun's LOCAL_RANK: a GPU if there are any, or "cpu".

    Raises:
        ValueError: there are fewer GPUs than processes.
    """
    if not torch.cuda.is_available():
        return "cpu"
    if "LOCAL_RANK" not in os.environ:
        return "cuda"
    index, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if index >= count:
        raise ValueError(f"process {index} of this machine has no GPU of its own: it has {count}")
    return f"cuda:{index}"


def join(parallel: str) -> bool:
    """Make the process group that torchrun's variables describe, unless there is one.

    Args:
        parallel: what needs it, for messages.

    Returns:
        Whether it was made here.

    Raises:
        ValueError: no group, and no such variables.
        ConnectionError: the processes do not reach each other, or the port is in use.
    """
    if not dist.is_available():
        raise ValueError(f'parallel="{parallel}" needs torch.distributed, which this torch lacks')
    if dist.is_initialized():
        return False
    missing = [name for name in _TORCHRUN if name not in os.environ]
    if missing:
        raise ValueError(
            f'parallel="{parallel}" needs processes that know each other, by {", ".join(missing)}: '
            f"start them with {_COMMAND}"
        )
    rank, count = launched()
    local, backend = int(os.environ.get("LOCAL_RANK", rank)), "gloo"
    if local < torch.cuda.device_count() and dist.is_nccl_available():
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    try:
        store = meeting_place() if os.environ.get("LOCAL_WORLD_SIZE") == str(count) else None
        if store is None:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    except RuntimeError as error:
        at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConnectionError(f"the processes did not meet at {at}: {error!s:.300}") from error
    return True


def meeting_place() -> Any:
    """Where processes of one host find each other, apart from those before a restart.

    torchrun keeps its store, and with it where the dead ones listened: pytorch issue 135712. Only
    on one host have all processes the same number of restarts.
    """
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(iter(rendezvous("env://")))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"start_{start}", store)  # type: ignore[attr-defined]


@contextmanager
def joined(parallel: Parallel | None) -> Iterator[Processes]:
    """The processes of a command; a group that is made here is destroyed at the end."""
    _check(parallel)
    made = parallel is not None and join(str(parallel))
    yield processes(parallel)
    if made:  # not after an error: the others may never come
        dist.destroy_process_group()


def processes(parallel: Parallel | None) -> Processes:
    """Those that train together: of the process group, or this one alone under None.

    A group that is made here lasts as long as the process.

    Raises:
        ValueError: `parallel` is something else; see also `join`.
    """
    _check(parallel)
    if parallel is None:
        return Processes()
    if join(str(parallel)):
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    return Processes(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))


def is_mesh(parallel: object) -> bool:
    """Whether it is a DeviceMesh; whoever has one has imported the module."""
    module = sys.modules.get("torch.distributed.device_mesh")
    return isinstance(parallel, getattr(module, "DeviceMesh", ()))


def shards(parallel: Parallel | None) -> TypeGuard[Parallel]:
    """Whether each process is to hold a part of the networks only."""
    return is_mesh(parallel) or parallel == "fsdp"


def _check(parallel: Parallel | None) -> None:
    if not is_mesh(parallel) and parallel not in (None, "ddp", "fsdp"):
        raise ValueError(
            f'parallel must be None, "ddp", "fsdp" or a DeviceMesh, got {parallel!r:.80}'
        )


def shown_elsewhere(error: BaseException, same: tuple[type[BaseException], ...]) -> bool:
    """Whether another process prints this error.

    Args:
        error: that ends a command.
        same: kinds that all processes raise alike.
    """
    return isinstance(error, PeerError) or (isinstance(error, same) and launched()[0] > 0)
