"""What a process holds: by the system, and of a training by its tensors."""

from __future__ import annotations

import ctypes
from pathlib import Path

from torch import nn

import fastcm
from fastcm.optim.one_sweep import OneSweep


def memory(field: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" the most since `forget`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def forget() -> None:
    """Have the most memory counted from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def give_back() -> None:
    """Have the C library return what tensors free at once, lest its heap be counted, too.

    As MALLOC_MMAP_THRESHOLD_=65536 does: glibc alone, which otherwise raises it as it runs.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or mallopt(-3, 65536) != 1:
        raise OSError("this C library has no mallopt(M_MMAP_THRESHOLD)")


def state_bytes(trainer: fastcm.Trainer) -> dict[str, int]:
    """Of parameters, moments, averages and the teacher, as they are; what is shared counts once."""
    optimizer = trainer.optimizer
    assert isinstance(optimizer, OneSweep)
    net, teacher = trainer.net, getattr(trainer.objective, "teacher", nn.Module())
    held = [p for p in net.parameters() if p.requires_grad]
    moments = sum(
        optimizer.state[p][name].nbytes for p in held for name in ("exp_avg", "exp_avg_sq")
    )
    own = {p.data_ptr() for p in net.parameters()}
    averages = [
        p for i in range(len(trainer.averages)) for p in trainer.ema_network(i).parameters()
    ]
    return {
        "parameters": sum(t.nbytes for t in [*net.parameters(), *net.buffers()]),
        "moments": moments,
        "averages": sum(p.nbytes for p in averages if p.data_ptr() not in own),
        "teacher": sum(p.nbytes for p in teacher.parameters() if p.data_ptr() not in own),
    }
