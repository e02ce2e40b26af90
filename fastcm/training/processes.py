"""What processes that train together agree on, and how they end together."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fastcm.runs.description import differences
from fastcm.training.interrupt import StopSignals

T = TypeVar("T")


class PeerError(RuntimeError):
    """Another process of the training failed first, and shows why."""


class Disagreement(ValueError):
    """The processes were given different things; the same error in all of them."""


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

    def first_reason(self, mine: str | None) -> str | None:
        """The first that a process has against something, in all of them; None if none has any."""
        return next((reason for reason in self.exchange(mine) if reason is not None), None)

    def any(self, mine: bool) -> bool:
        """Whether it is so in one of the processes, in all of them."""
        if not self.joined:
            return mine
        found = torch.tensor(int(mine))
        with lost_peers():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._host)
        return bool(found)

    def carrier(self, device: torch.device) -> str | None:
        """The library that carries tensors of this device between them; None in one alone."""
        if not self.joined:
            return None
        group = dist.distributed_c10d._get_default_group()
        return str(group._get_backend(device).name()).lower()

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
