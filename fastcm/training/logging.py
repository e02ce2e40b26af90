"""What a run reports: metrics.jsonl, and how its numbers are read from the device."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcm.runs.checkpoint import replace_file
from fastcm.schedules import intervals
from fastcm.training.state import State
from fastcm.training.tensorboard import Scalars


class MetricsFile:
    """Appends one JSON object a line to metrics.jsonl in a run; None writes nothing.

    Args:
        run: the directory.
        tensorboard: write them for TensorBoard, too.

    Raises:
        ValueError, ImportError: `tensorboard` without a directory, or without that package.
    """

    def __init__(self, run: Path | None, *, tensorboard: bool = False) -> None:
        if tensorboard and run is None:
            raise ValueError("tensorboard=True needs a run directory: directory=...")
        self.path = run and run / "metrics.jsonl"
        self._scalars = Scalars(run / "tensorboard") if tensorboard and run else None

    def drop_after(self, step: int) -> None:
        """Forget the lines of later steps and a torn last line: a resumed run repeats them."""
        if self._scalars is not None:
            self._scalars.drop_after(step)
        if self.path is None or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        replace_file(self.path, "".join(kept).encode())

    def write(self, metrics: dict[str, Any]) -> None:
        if self._scalars is not None:
            self._scalars.write(metrics)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps({k: _finite(v) for k, v in metrics.items()}) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Reading:
    """Metrics of one step on their way from the device.

    Args:
        host: numbers that are known.
        device: 0-d tensors; copied at once, so the next step may overwrite them.
    """

    def __init__(self, host: dict[str, Any], device: dict[str, Tensor]) -> None:
        self._host, self._names = host, list(device)
        values = torch.stack([v.detach().double().reshape(()) for v in device.values()])
        self._event: Any = None
        if values.is_cuda:
            self._values = torch.empty(
                len(values), dtype=values.dtype, device="cpu", pin_memory=True
            )
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(values.device))
        else:
            self._values = values.cpu()

    @property
    def arrived(self) -> bool:
        return self._event is None or bool(self._event.query())

    def values(self) -> dict[str, Any]:
        """All metrics; waits if they have not arrived."""
        if self._event is not None:
            self._event.synchronize()
        read = dict(zip(self._names, self._values.tolist()))
        counts = {k: int(v) for k, v in read.items() if k in ("skipped", "intervals")}
        return {**self._host, **read, **counts}


def measure(state: State, loss: Tensor, it_s: float, batch_size: int) -> Reading:
    """Start to read the metrics of the step just taken, without waiting for the device."""
    host = {
        "step": state.step,
        "lr": state.optimizer.param_groups[0]["lr"],
        "it_s": round(it_s, 3),
        "img_s": round(it_s * batch_size, 1),
        "memory_mb": round(peak_memory(state.device) / 2**20, 1),
    }
    last, update = state.key.step - 1, state.update
    device = {
        "loss": loss,
        "grad_norm": update.grad_norm,
        "skipped": update.counts[1],
        **{f"ema_{i}": average.decay(last) for i, average in enumerate(update.averages)},
    }
    discretization = getattr(state.gradients.objective, "discretization", None)
    if discretization is not None:
        n = intervals(discretization, last)
        device["intervals"] = torch.full_like(last, n) if isinstance(n, int) else n
    return Reading(host, device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a GPU, the most that was resident elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Rate:
    """Steps per second since the last reading."""

    def __init__(self) -> None:
        self._time = time.perf_counter()
        self._step: int | None = None

    def read(self, step: int) -> float:
        now = time.perf_counter()
        steps = step - (step if self._step is None else self._step)
        rate = steps / max(now - self._time, 1e-9)
        self._time, self._step = now, step
        return rate
