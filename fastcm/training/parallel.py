"""Several processes that train as one: their rows, and what they agree on.

torchrun starts the processes, gloo carries what the hosts tell each other. Their gradients are
averaged by `mean_gradients`, or by what `sharded` makes of the networks. One process alone does
nothing of it.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeGuard, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fastcm.runs.description import differences
from fastcm.training.interrupt import StopSignals

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
Parallel: TypeAlias = "Literal['ddp', 'fsdp'] | DeviceMesh"
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_COMMAND = "torchrun --standalone --nproc-per-node 2 ..."


class PeerError(RuntimeError):
    """Another process of the training failed first, and shows why."""


class Disagreement(ValueError):
    """The processes were given different things; the same error in all of them."""


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


class Processes:
    """Those that train together, each of which takes its rows of every batch.

    Whatever is exchanged here travels between hosts, and never waits for a GPU.

    Args:
        rank: of this one.
        count: how many there are.
        host: a group of gloo, for their own talk; None: there is no other process.
    """

    def __init__(self, rank: int = 0, count: int = 1, host: Any = None) -> None:
        self.rank, self.count, self._host = rank, count, host

    @property
    def first(self) -> bool:
        """Whether this one prints and writes."""
        return self.rank == 0

    @property
    def joined(self) -> bool:
        """Whether there is a process group, perhaps of one."""
        return self._host is not None

    def apart(self) -> Processes:
        """The same, for talk of another thread; all of them make it at once."""
        return Processes(self.rank, self.count, dist.new_group(backend="gloo"))

    def rows(self, batch_size: int, accumulate: int = 1, period: int = 1) -> range:
        """This process's rows of a batch.

        Args:
            batch_size: rows of all processes.
            accumulate: micro-batches that each cuts its rows into.
            period: of the objective's treatment of rows; a micro-batch must hold whole ones.

        Raises:
            ValueError: they cannot be cut equally.
        """
        if not self.joined:
            return range(batch_size)
        size, ragged = divmod(batch_size, self.count * accumulate)
        if ragged:
            raise ValueError(
                f"batch_size {batch_size} is not a multiple of {self.count} processes x "
                f"accumulate {accumulate}"
            )
        if size % period:
            raise ValueError(
                f"batch_size {batch_size} on {self.count} processes with accumulate {accumulate} "
                f"makes micro-batches of {size} rows: this objective needs multiples of {period}"
            )
        mine = size * accumulate
        return range(self.rank * mine, (self.rank + 1) * mine)

    def agree(self, make: Callable[[], Mapping[str, Any]]) -> None:
        """Compare what was given to each process.

        Args:
            make: gives a JSON-able description; not called where there is nobody to compare with.

        Raises:
            Disagreement: in all of them, if one differs from the first; both values are named.
        """
        if not self.joined:
            return
        given = self.exchange(make())
        for rank, theirs in enumerate(given):
            changed = differences(given[0], theirs)
            if changed:
                raise Disagreement(
                    f"process {rank} was given something else than process 0: {'; '.join(changed)}"
                )

    @contextmanager
    def together(self) -> Iterator[None]:
        """If one fails inside, all do: that one by its error, the others by a PeerError.

        Not to be nested, and no collective but `agree` and `exchange` inside.

        Raises:
            PeerError: another process failed.
        """
        try:
            yield
        except (PeerError, Disagreement):
            raise
        except Exception as error:
            self.exchange(error=error)
            raise
        self.exchange()

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; it is called there alone."""
        return cast(T, self.from_all(lambda: make() if self.first else None)[0])

    def from_all(self, make: Callable[[], T]) -> list[T]:
        """What each process makes, in all of them."""
        with self.together():
            made = make()
        return self.exchange(made)

    def exchange(self, mine: Any = None, error: Exception | None = None) -> list[Any]:
        """What every process says, in all of them.

        Args:
            mine: of this one.
            error: it has nothing else to say: it is raised here, and a PeerError elsewhere.
        """
        if not self.joined:
            if error is not None:
                raise error
            return [mine]
        told = None if error is None else f"{type(error).__name__}: {error}"
        said: list[Any] = [None] * self.count
        with lost_peers():
            dist.all_gather_object(said, (told, mine), group=self._host)
        for rank, (failure, _) in enumerate(said):
            if failure is not None:
                if error is not None and rank == self.rank:
                    raise error
                raise PeerError(f"process {rank} failed: {failure}")
        return [value for _, value in said]

    def ask_to_stop(self, signals: StopSignals) -> Callable[[], signal.Signals | None]:
        """Ask all whether a signal has arrived, while a step is taken.

        Returns:
            A function that waits for the answer, the same in all of them: a signal or None.
        """
        if not self.joined:
            return lambda: signals.received
        number = torch.tensor(signals.received or 0)
        with lost_peers():
            work = dist.all_reduce(number, dist.ReduceOp.MAX, group=self._host, async_op=True)

        def answer() -> signal.Signals | None:
            with lost_peers():
                work.wait()
            return signal.Signals(int(number)) if number else None

        return answer

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a 0-d tensor over all processes, on its device."""
        if not self.joined:
            return value
        mean = value.detach() / self.count
        with lost_peers():
            dist.all_reduce(mean)
        return mean


@contextmanager
def lost_peers() -> Iterator[None]:
    """Turn what torch raises when another process is gone into a PeerError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise PeerError(f"another process of the training is gone: {error!s:.200}") from error
        raise


def shown_elsewhere(error: BaseException, same: tuple[type[BaseException], ...]) -> bool:
    """Whether another process prints this error.

    Args:
        error: that ends a command.
        same: kinds that all processes raise alike.
    """
    return isinstance(error, PeerError) or (isinstance(error, same) and launched()[0] > 0)
