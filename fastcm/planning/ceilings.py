"""What a device can do at best, as it was given or measured. Nothing is assumed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from fastcm.precision import Precision

_ROUNDS = 7


@dataclass(frozen=True)
class Ceilings:
    """Rates of one device; None where one is not known.

    Args:
        tflops: of matrix products in the precision of the networks, 1e12 a second.
        bandwidth: of its memory, 1e9 bytes a second, read and written.
        interconnect: to the other devices, 1e9 bits a second, each way.
        upload: from the host, 1e9 bytes a second.
        measured: names of those that were measured here.

    Raises:
        ValueError: one is not above 0.
    """

    tflops: float | None = None
    bandwidth: float | None = None
    interconnect: float | None = None
    upload: float | None = None
    measured: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in UNITS:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be > 0 {UNITS[name]}, got {value}")

    def completed(self, other: Ceilings) -> Ceilings:
        """With those of another where this one has none."""
        more = {
            name: getattr(other, name)
            for name in UNITS
            if getattr(self, name) is None and getattr(other, name) is not None
        }
        measured = (*self.measured, *(name for name in more if name in other.measured))
        return replace(self, **more, measured=measured)

    def described(self) -> str:
        """Each with where it comes from."""
        said = []
        for name, unit in UNITS.items():
            value = getattr(self, name)
            source = "measured" if name in self.measured else "given"
            said.append(
                f"{name} " + ("not known" if value is None else f"{value:g} {unit} {source}")
            )
        return ", ".join(said)


UNITS = {
    "tflops": "TFLOP/s",
    "bandwidth": "GB/s",
    "interconnect": "Gbit/s",
    "upload": "GB/s",
}
"""Of the ceilings."""


def measure(device: torch.device | str, precision: Precision = "fp32") -> Ceilings:
    """Measure a device: a large copy, a large product, and an all-reduce if there is a group.

    Every process of a group calls this at once. Takes a second or two.
    """
    device = torch.device(device)
    found = Ceilings(
        tflops=_product(device, precision) / 1e12,
        bandwidth=_copy(device) / 1e9,
        measured=("tflops", "bandwidth"),
    )
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return found
    return replace(
        found,
        interconnect=8 * _all_reduce(device) / 1e9,
        measured=(*found.measured, "interconnect"),
    )


def _product(device: torch.device, precision: Precision) -> float:
    """FLOPs a second of a square product."""
    n = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / _seconds(lambda: a @ b, device)


def _copy(device: torch.device) -> float:
    """Bytes a second of a copy that no cache holds, read and written."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.ones(size, dtype=torch.uint8, device=device)
    sink = torch.ones_like(source)
    return 2 * size / _seconds(lambda: sink.copy_(source), device)


def _all_reduce(device: torch.device) -> float:
    """Bytes a second that one process sends in a ring."""
    size, count = 2**24, dist.get_world_size()
    numbers = torch.zeros(size, dtype=torch.float32, device=device)
    sent = 2 * 4 * size * (count - 1) / count
    return sent / _seconds(lambda: dist.all_reduce(numbers), device)


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    """The median of some calls, after one to warm up."""
    taken = []
    for _ in range(1 + _ROUNDS):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])
