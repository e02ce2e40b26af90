"""One process at a time writes to a run directory."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import threading
import warnings
import weakref
from pathlib import Path
from types import ModuleType, TracebackType

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """Holds a run directory while inside ``with``; may be entered again, from any thread.

    The lock is the kernel's (flock on ``RUN/.lock``), so that of a killed process is gone with it,
    and no file has to be removed. Processes that it forked meanwhile do not keep it. Where the
    platform or the file system has no such lock, a warning says that nothing is guarded.

    Args:
        run: the directory; created if absent.

    Raises:
        BlockingIOError: upon entry: another process, or another trainer of this one, holds it.
        OSError: the directory cannot be written to.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._descriptor: int | None = None
        self._depth = 0
        self._guard = threading.Lock()

    def __enter__(self) -> RunLock:
        with self._guard:
            if self._depth == 0:
                self._descriptor = self._acquire()
            self._depth += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        with self._guard:
            self._depth -= 1
            if self._depth == 0 and self._descriptor is not None:
                descriptor, self._descriptor = self._descriptor, None
                os.close(descriptor)

    def _acquire(self) -> int | None:
        self.run.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            warnings.warn(
                f"{self.run} is not locked: this platform has no fcntl. "
                "Let only one process at a time train in it",
                stacklevel=3,
            )
            return None
        path = self.run / LOCK
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise BlockingIOError(
                f"{self.run} is in use: {_holder(path)} trains in it. Wait for it, stop it, or "
                "choose another directory"
            ) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _UNSUPPORTED:
                raise
            warnings.warn(
                f"{self.run} is not locked: its file system refuses ({error.strerror}). "
                "Let only one process at a time train in it",
                stacklevel=3,
            )
            return None
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(_myself()).encode())
        except OSError:  # a full disk: the name of the holder is a courtesy
            pass
        _closed_in_children(self)
        return descriptor

    def _forget(self) -> None:
        """In a forked child: the lock is the parent's, and ends with the parent."""
        self._guard = threading.Lock()
        self._depth = 0
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()
_registered = False


def _closed_in_children(lock: RunLock) -> None:
    global _registered
    _held.add(lock)
    if not _registered:
        os.register_at_fork(after_in_child=_forget_all)
        _registered = True


def _forget_all() -> None:
    for lock in list(_held):
        lock._forget()


def _myself() -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": " ".join(sys.argv)[:200],
    }


def _holder(path: Path) -> str:
    """The process that a lock file names."""
    try:
        named = json.loads(path.read_bytes()[:4096])
        pid, host, command = (named[key] for key in ("pid", "host", "command"))
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
    if host != socket.gethostname():
        return f"process {pid} on {host} ({command})"
    return "another trainer of this process" if pid == os.getpid() else f"process {pid} ({command})"
