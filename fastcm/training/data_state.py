"""Where data with an order of its own stands, for checkpoints: one state for every process."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastcm.data import Source
from fastcm.data.sources import IterableData
from fastcm.runs.checkpoint import Checkpoint
from fastcm.runs.files import CheckpointError
from fastcm.runs.nested import flatten, unflatten
from fastcm.training.processes import Processes

GROUP = "data"
"""Of the tensors in a checkpoint."""
ENTRY = "data_state"
"""Of the rest in its state: a list, the processes in their order."""


class DataState:
    """Collects the states of a source, and gives each process its own back.

    A source whose rows follow from the number of the step has none.

    Args:
        source: of this process.
        processes: that train together.
    """

    def __init__(self, source: Source, processes: Processes) -> None:
        self._source, self._processes = source, processes
        self._collected: list[tuple[Any, dict[str, Tensor]]] = []

    @property
    def _stateful(self) -> IterableData | None:
        source = self._source
        return source if isinstance(source, IterableData) and source.stateful else None

    def collect(self) -> None:
        """Ask all processes for their states, before one of them saves; all of them call this.

        Raises:
            ValueError: a state holds what a checkpoint does not.
        """
        source = self._stateful
        if source is None:
            return
        what = f"the state of {source.given.name}"
        self._collected = self._processes.from_all(lambda: flatten(source.state_dict(), what))

    def contents(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Groups of tensors and entries of the state, of what was collected; perhaps none."""
        if self._stateful is None:
            return {}, {}
        assert self._collected, "collect comes before a save"
        tensors = {
            f"{rank}.{name}": tensor
            for rank, (_, held) in enumerate(self._collected)
            for name, tensor in held.items()
        }
        return {GROUP: tensors}, {ENTRY: [plain for plain, _ in self._collected]}

    def read(self, found: Checkpoint) -> Any:
        """This process's state in a checkpoint, or None; changes nothing.

        Raises:
            CheckpointError: there is none, or not one for each process.
        """
        if self._stateful is None:
            return None
        states, count = found.state.get(ENTRY), self._processes.count
        if not isinstance(states, list) or len(states) != count:
            held = len(states) if isinstance(states, list) else 0
            raise CheckpointError(
                f"{found.path} holds the position in the data of {held} processes, there are "
                f"{count}: an iterable that each reads for itself is resumed by as many"
            )
        rank = self._processes.rank
        mine = f"{rank}."
        tensors = {
            name.removeprefix(mine): tensor
            for name, tensor in found.groups[GROUP].items()
            if name.startswith(mine)
        }
        state = unflatten(states[rank], tensors)
        if not isinstance(state, dict) or {*state} != {"passes", "iterable"}:
            raise CheckpointError(f"{found.path}: {ENTRY} is not the position of an iterable")
        return state

    def resume(self, state: Any, step: int) -> None:
        """Put the source where it stood, if it has a state."""
        source = self._stateful
        if source is not None and state is not None:
            source.load_state_dict(state, step)

    @property
    def groups(self) -> set[str]:
        """Names of the groups that a checkpoint has on its account."""
        return set() if self._stateful is None else {GROUP}
