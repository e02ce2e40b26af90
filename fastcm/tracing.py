"""Names for the parts of a step in a trace of torch's profiler."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch._C._autograd import _profiler_enabled
from torch.profiler import record_function

PREFIX = "fastcm: "
_NOTHING = nullcontext()


def is_profiled() -> bool:
    """Whether a profiler of this thread records."""
    return _profiler_enabled()


def part(name: str) -> AbstractContextManager[object]:
    """A range of that name while a profiler of this thread records; without one, nothing."""
    if not is_profiled():
        return _NOTHING
    return record_function(PREFIX + name)
