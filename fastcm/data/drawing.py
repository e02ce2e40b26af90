"""What sources of batches share: the order of rows, the form of a batch, its way to the device."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastcm import ops, rng
from fastcm.data.datasets import as_condition, as_samples, as_tensor
from fastcm.networks.conditions import each, named

PARSING = threading.Lock()
"""Held while a header of .npy is parsed: threads of Python 3.11 disturb each other in `ast`."""

Keys = str | Sequence[str]
SAMPLE_KEYS = ("x", "image", "img", "pixel_values", "latents")
CONDITION_KEYS = ("labels", "label", "y")


def permutation(count: int, key: rng.NoiseKey, epoch: int) -> Tensor:
    """The order of the rows in an epoch, int64 ``[count]``, where the key lives."""
    key.step.fill_(epoch)  # no host synchronisation, unlike a new key
    return torch.argsort(ops.integers(count, key, stream=rng.DATA), stable=True)


class Order:
    """Which row stands at which position of the stream of rows that a run reads, epoch by epoch.

    Args:
        count: of the rows.
        seed: of the permutations, which are those of `DeviceData`; None: the rows as they come.
    """

    def __init__(self, count: int, seed: int | None) -> None:
        self.count = count
        self._key = None if seed is None else rng.NoiseKey(seed)
        self._held: OrderedDict[int, Tensor] = OrderedDict()

    def rows(self, position: int, count: int) -> list[int]:
        """The rows at positions ``position .. position + count - 1``, across epochs."""
        found: list[int] = []
        while len(found) < count:
            epoch, first = divmod(position + len(found), self.count)
            last = min(first + count - len(found), self.count)
            if self._key is None:
                found += range(first, last)
            else:
                found += self._epoch(self._key, epoch)[first:last].tolist()
        return found

    def _epoch(self, key: rng.NoiseKey, epoch: int) -> Tensor:
        if epoch not in self._held:
            if len(self._held) == 2:
                self._held.popitem(last=False)
            self._held[epoch] = permutation(self.count, key, epoch)
        return self._held[epoch]


def picked(item: Any, keys: Keys | None) -> Any:
    """(x, cond) or x out of a dict, by its keys; anything else as it is.

    Args:
        item: a row or a batch.
        keys: of the sample and of the condition; several conditions make a dict. Default what
            there is of `SAMPLE_KEYS`, and of `CONDITION_KEYS`.

    Raises:
        ValueError: a key that does not exist, or keys for what is no dict.
    """
    if not isinstance(item, Mapping):
        if keys is None:
            return item
        raise ValueError(f"keys={keys!r} need rows that are dicts, got {type(item).__name__}")
    there = ", ".join(repr(key) for key in item)
    if keys is None:
        names = [next((k for k in SAMPLE_KEYS if k in item), "")]
        if not names[0]:
            raise ValueError(
                f"none of {', '.join(map(repr, SAMPLE_KEYS))} is a key: say which holds the "
                f"samples, and which the condition, with keys=; there are {there}"
            )
        names += [k for k in CONDITION_KEYS if k in item][:1]
    else:
        names = [keys] if isinstance(keys, str) else list(keys)
    missing = [repr(name) for name in names if name not in item]
    if missing or not names:
        raise ValueError(f"no key {', '.join(missing) or 'is given'}: there are {there}")
    x, *conds = (item[name] for name in names)
    if len(conds) > 1:
        return x, dict(zip(names[1:], conds))
    return (x, *conds)


class Form:
    """Checks that batches are (x, cond) of as many rows as wanted, and all like the first."""

    def __init__(self) -> None:
        self._first: tuple[object, ...] | None = None

    def __call__(self, batch: Any, rows: int) -> tuple[Tensor, Any]:
        """x uint8 or floating, and its condition: None, a tensor or a tree of tensors.

        Args:
            batch: x, or x and one or more conditions; tensors or arrays.
            rows: that x and every tensor of the condition must have.

        Raises:
            ValueError: it is anything else.
        """
        parts = list(batch) if isinstance(batch, tuple | list) else [batch]
        why = ""
        try:
            x, *conds = (each(as_tensor, part) for part in parts)
        except (TypeError, ValueError, RuntimeError) as error:
            x, conds, why = None, [], f" ({error!s:.200})"
        if not isinstance(x, Tensor) or x.ndim < 2:
            kinds = ", ".join(type(part).__name__ for part in parts)
            raise ValueError(f"a batch must be x [B, ...] or (x, cond), got {kinds}{why}")
        if not (x.dtype == torch.uint8 or x.is_floating_point()):
            raise ValueError(f"x must be uint8 or floating, got {x.dtype}")
        cond = None if not conds else conds[0] if len(conds) == 1 else tuple(conds)
        if x.shape[0] != rows:
            raise ValueError(f"a batch must have {rows} rows, got x {list(x.shape)}")
        leaves = [] if cond is None else named(cond)
        for name, leaf in leaves:
            if leaf.shape[:1] != x.shape[:1]:
                raise ValueError(f"{name} must have {rows} rows like x, got {list(leaf.shape)}")
        kinds_of = [(name, str(leaf.dtype)) for name, leaf in leaves]
        found = (list(x.shape[1:]), str(x.dtype), kinds_of)
        self._first = self._first or found
        if found != self._first:
            raise ValueError(
                "every batch must look like the first (sample shape, dtype, condition): "
                f"{self._first}, got {found}"
            )
        return x, cond


class Upload:
    """Copies host tensors to a device, on a GPU beside what is being computed there.

    The host runs ahead of a GPU, so the copy for a step overlaps with the step before it.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, host: Tensor) -> Tensor:
        if self.device.type != "cuda" or host.device.type != "cpu":
            return host.to(self.device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            copy = host.pin_memory().to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        copy.record_stream(current)  # its memory is not given to another copy too early
        return copy

    def batch(self, x: Tensor, cond: Any) -> tuple[Tensor, Any]:
        """A batch in the dtypes that training wants; they are made on the device."""
        return as_samples(self(x)), None if cond is None else as_condition(each(self, cond))
