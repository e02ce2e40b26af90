"""Iterables of batches: what a caller says of one, and where in it a run stands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fastcm.data.drawing import Keys


class Batches:
    """An iterable of batches that is read in its own order, such as a DataLoader with a sampler.

    One with ``state_dict`` and ``load_state_dict`` (torchdata's StatefulDataLoader, a streaming
    data set of Hugging Face) has its position saved with each checkpoint. Others are read from the
    start and on to where a resumed run stands. One with ``set_epoch``, or whose sampler or data
    set has it, is told the number of each pass.

    Args:
        iterable: yields x, (x, cond), or dicts.
        keys: of a dict: that of the sample, then those of the condition.
        per_process: in several processes each reads its own rows: the batches of an iterable are
            a process's share of the trainer's. It has to have a state.

    Raises:
        TypeError: it is not iterable, or has no state and is per_process.
    """

    def __init__(
        self, iterable: Iterable[Any], *, keys: Keys | None = None, per_process: bool = False
    ) -> None:
        if not isinstance(iterable, Iterable):
            raise TypeError(
                f"{type(iterable).__name__} is not iterable: give an iterable of batches"
            )
        self.iterable, self.keys, self.per_process = iterable, keys, per_process
        if per_process and not self.stateful:
            raise TypeError(
                f"{type(iterable).__name__} has no state_dict and load_state_dict, which "
                "per_process=True needs: several processes could not be resumed"
            )
        self.passes = 0

    @property
    def name(self) -> str:
        """Of its class."""
        return type(self.iterable).__name__

    @property
    def stateful(self) -> bool:
        """Whether its position can be saved."""
        return all(hasattr(self.iterable, name) for name in ("state_dict", "load_state_dict"))

    @property
    def ends(self) -> bool:
        """Whether it is an iterator, which cannot be begun again."""
        return isinstance(self.iterable, Iterator)

    def begin(self) -> Iterator[Any]:
        """The next pass, or what a loaded state left of one."""
        parts = [getattr(self.iterable, name, None) for name in ("sampler", "dataset")]
        for owner in (self.iterable, *parts):
            tell = getattr(owner, "set_epoch", None)
            if tell is not None:
                tell(self.passes)
        self.passes += 1
        return iter(self.iterable)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands: after the last batch that was handed out."""
        iterable: Any = self.iterable
        return {"passes": self.passes, "iterable": iterable.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another one stood, in the same pass."""
        iterable: Any = self.iterable
        iterable.load_state_dict(state["iterable"])
        self.passes = max(state["passes"] - 1, 0)
