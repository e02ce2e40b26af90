"""Values for a network on the meta device, whole or shard by shard.

Of a sharded network no process ever holds more than its shards and one module's parameters. The
values do not depend on how many processes there are, or on the device: modules draw theirs on a
CPU, in the order of `net.modules()`, from a seed; files are read by rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Union

import torch
from torch import Tensor, nn

from fastcm.runs.checkpoint import CHECKPOINTS, Checkpoint, load, load_newest
from fastcm.runs.pretrained import Pretrained
from fastcm.runs.shards import Part
from fastcm.runs.weights import weights_of
from fastcm.sharding.dtensors import first_element, is_dtensor, local

Init = Union[Literal["reset"], Callable[[nn.Module], None], str, Path]
"""Where values come from: "reset", each module's own ``reset_parameters()``; a function that is
called with every module that has tensors of its own, after that; or the path of a safetensors file,
of a folder of such with their index, or of a run, whose first average is taken."""


def is_hollow(net: nn.Module) -> bool:
    """Whether a network has parameters on the meta device.

    Raises:
        ValueError: some are, and some are not.
    """
    on_meta = {name: p.is_meta for name, p in net.named_parameters()}
    if not any(on_meta.values()):
        return False
    if not all(on_meta.values()):
        hollow = next(name for name, is_meta in on_meta.items() if is_meta)
        real = next(name for name, is_meta in on_meta.items() if not is_meta)
        raise ValueError(
            f"{hollow} is on the meta device and {real} is not: build the whole network on the one "
            "or the other"
        )
    return True


@torch.no_grad()
def materialise(net: nn.Module, init: Init, *, device: torch.device, seed: int = 0) -> None:
    """Give a network on the meta device memory on `device`, and values.

    Args:
        net: whole, or sharded by `fastcm.sharding.spread`: then all processes call this together,
            each for its shards. Parameters are new objects afterwards. Buffers that are not on the
            meta device keep their values.
        init: see `Init`.
        device: where it is to be.
        seed: of "reset" and functions; the global generators stay where they are.

    Raises:
        ValueError: modules whose tensors `init` leaves without values, by name; files that lack
            tensors or hold others.
        FileNotFoundError, CheckpointError: no such file or run, or a damaged one.
    """
    hollow = _given_memory(net, device)
    if init == "reset" or not isinstance(init, str | Path):
        _reset(net, hollow, init if callable(init) else None, seed)
        return
    path = Path(init)
    if not (path / CHECKPOINTS).is_dir():
        files = Pretrained(path)
        _read(net, hollow, path, files.shapes, files.elements)
        return
    select = _Parts(net)
    found, _ = load_newest(path, only={select.group}, select=select)
    _take(net, hollow, found, select)


@torch.no_grad()
def materialise_from(net: nn.Module, checkpoint: Path, group: str, *, device: torch.device) -> None:
    """As `materialise`, out of one group of one checkpoint."""
    hollow, select = _given_memory(net, device), _Parts(net, group)
    _take(net, hollow, load(checkpoint, only={group}, select=select), select)


def _given_memory(net: nn.Module, device: torch.device) -> set[str]:
    """Memory for what is on the meta device; its names, which have no values yet."""
    hollow = {f"{at}{name}" for at, _, name, t in _held(net) if t.is_meta}
    kept = [(table, name, t) for _, table, name, t in _held(net) if not t.is_meta]
    tied: dict[int, list[tuple[dict[str, Tensor], str]]] = {}
    for _, table, name, t in _held(net):
        tied.setdefault(id(t), []).append((table, name))
    net.to_empty(device=device)
    for table, name, t in kept:
        table[name] = t.to(device)
    for (table, name), *others in tied.values():  # to_empty makes another of each
        for other, alias in others:
            other[alias] = table[name]
    return hollow


def _held(net: nn.Module) -> Iterator[tuple[str, dict[str, Tensor], str, Tensor]]:
    """Every parameter and buffer: the name of its module, the table that it is in, its name."""
    for prefix, module in net.named_modules():
        for table in (module._parameters, module._buffers):
            for name, t in table.items():
                if t is not None:
                    yield prefix and f"{prefix}.", table, name, t


def _reset(
    net: nn.Module, wanted: set[str], init: Callable[[nn.Module], None] | None, seed: int
) -> None:
    """Have modules with tensors among those that are wanted draw theirs, one after another."""
    filled: set[int] = set()
    without: list[str] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for prefix, module in net.named_modules():
            at = prefix and f"{prefix}."
            tables = (module._parameters, module._buffers)
            own = [(d, name, t) for d in tables for name, t in d.items() if t is not None]
            mine = [(name, t) for _, name, t in own if f"{at}{name}" in wanted]
            if not mine:
                continue
            with _stand_ins(own) as values:
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
                if init is not None:
                    init(module)
                values.update({name: table[name].detach() for table, name, _ in own})
            for name, t in mine:
                value = values[name]
                if value.isnan().any():
                    without.append(f"{at}{name}")
                elif id(t) not in filled:  # a tied one has the value of its first place
                    filled.add(id(t))
                    _shard(t).copy_(_rows_of(t, value))
    if without:
        more = f" and {len(without) - 5} more" if len(without) > 5 else ""
        raise ValueError(
            f"init leaves {', '.join(without[:5])}{more} without values: give their modules a "
            "reset_parameters() that sets all parameters and buffers of their own, or init= a "
            "function of a module that does, or safetensors"
        )


@contextmanager
def _stand_ins(own: list[tuple[dict[str, Tensor], str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Whole tensors on the CPU, of NaNs where there are such, in place of the live ones."""
    try:
        for table, name, t in own:
            whole = torch.zeros(t.shape, dtype=t.dtype, device="cpu")
            if whole.is_floating_point() or whole.is_complex():
                whole.fill_(float("nan"))
            is_parameter = isinstance(t, nn.Parameter)
            table[name] = nn.Parameter(whole, t.requires_grad) if is_parameter else whole
        yield {}
    finally:
        for table, name, t in own:
            table[name] = t


def _shard(t: Tensor) -> Tensor:
    return local(t).view(-1)


def _rows_of(t: Tensor, value: Tensor) -> Tensor:
    """Of a whole value the elements that this process holds."""
    start, stop = _range(t)
    return value.contiguous().view(-1)[start:stop]


class _Parts:
    """Of a group in a checkpoint the elements that this process holds, for `shards.Select`.

    Attributes:
        shapes: of the tensors that were asked for.
    """

    def __init__(self, net: nn.Module, group: str = "average_0") -> None:
        self._live, self.group = weights_of(net), group
        self.shapes: dict[str, torch.Size] = {}

    def __call__(self, group: str, name: str, shape: torch.Size) -> Part | None:
        if group == self.group:
            self.shapes[name] = shape
        live = self._live.get(name)
        if live is None or live.shape != shape:
            return None
        start, stop = _range(live)
        return Part(start, stop, lambda flat: flat)


def _range(t: Tensor) -> tuple[int, int]:
    """Of the elements of a tensor, those that this process holds."""
    start = first_element(t) if is_dtensor(t) else 0
    return start, start + local(t).numel()


def _take(net: nn.Module, hollow: set[str], found: Checkpoint, select: _Parts) -> None:
    held = found.groups.get(select.group, {})
    _read(net, hollow, found.path, select.shapes, lambda name, *_: held[name])


def _read(
    net: nn.Module,
    hollow: set[str],
    path: Path,
    shapes: Mapping[str, torch.Size],
    elements: Callable[[str, int, int], Tensor],
) -> None:
    """The values of files, of which a process reads what it holds.

    Args:
        net: with memory.
        hollow: names of what has no value; what files do not hold is computed by its module.
        path: for messages.
        shapes: of what the files have.
        elements: of a tensor, from the first to before the last that are wanted.
    """
    live = weights_of(net)
    _reset(net, hollow - live.keys(), None, 0)
    problems = [f"{name} is missing" for name in live if name not in shapes]
    problems += [f"{name} is unexpected" for name in shapes if name not in live]
    problems += [
        f"{name} is {list(shapes[name])} instead of {list(t.shape)}"
        for name, t in live.items()
        if name in shapes and shapes[name] != t.shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{path} does not fit the network: {', '.join(problems[:5])}{more}")
    for name, t in live.items():
        _shard(t).copy_(elements(name, *_range(t)).view(-1))
