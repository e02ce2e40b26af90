"""The first SIGTERM or SIGINT is a request to stop after the step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_DEFAULT = (signal.SIG_DFL, signal.default_int_handler)


class StopSignals:
    """Inside ``with``, notes the first SIGTERM or SIGINT instead of acting on it.

    The second acts at once, as without this. Handlers are installed in the main thread only, and
    only for a signal whose handler is the default: one that a user set, or a signal that is
    ignored as under nohup, stays as it is. They are put back at the end.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before in _DEFAULT:
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number in SIGNALS:  # pop: the handler may run in between
            before = self._before.pop(number, None)
            if before is not None and signal.getsignal(number) == self._note:
                signal.signal(number, before)
