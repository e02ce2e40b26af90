"""Writing checkpoints beside the training: a snapshot, and a thread that takes it to the disk."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcm.runs import checkpoint
from fastcm.runs.lock import RunLock

Groups = dict[str, dict[str, Tensor]]


class Snapshot:
    """Copies of tensors in host memory, which is kept from one copy to the next."""

    def __init__(self) -> None:
        self._buffers: Groups = {}

    def take(self, groups: Mapping[str, Mapping[str, Tensor]]) -> tuple[Groups, Callable[[], None]]:
        """The copies, and a function that waits until they are complete.

        From a GPU they are only put into its current stream: later work in it may overwrite the
        originals. Copies of before are overwritten.
        """
        copies: Groups = {}
        streams: dict[torch.device, torch.cuda.Stream] = {}
        for group, tensors in groups.items():
            kept = self._buffers.get(group, {})
            copies[group] = {}
            for name, tensor in tensors.items():
                copy = kept.get(name)
                if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                    copy = torch.empty(
                        tensor.shape,
                        dtype=tensor.dtype,
                        device="cpu",
                        pin_memory=tensor.is_cuda,
                    )
                copies[group][name] = copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
                if tensor.is_cuda and tensor.device not in streams:
                    streams[tensor.device] = torch.cuda.current_stream(tensor.device)
        self._buffers = copies
        events = [stream.record_event() for stream in streams.values()]

        def wait() -> None:
            for event in events:
                event.synchronize()

        return copies, wait


class Writer:
    """Saves into runs in a thread, at most one checkpoint at a time.

    `start` returns when the snapshot is taken. An error of the thread is raised by the next
    `settle`, as it was. The thread is not a daemon: a process that ends waits for it.
    """

    def __init__(self) -> None:
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._path: Path | None = None
        self._error: BaseException | None = None

    @property
    def succeeded(self) -> bool:
        """Whether a checkpoint is complete that `settle` has not told of."""
        return self._path is not None and self._thread is not None and not self._thread.is_alive()

    def settle(self) -> Path | None:
        """Wait for the write that was started, if any.

        Returns:
            Its checkpoint, the first time; None where another process made it complete.

        Raises:
            OSError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
        error, path = self._error, self._path
        self._thread = self._error = self._path = None
        if error is not None:
            raise error
        return path

    def start(
        self,
        run: Path,
        lock: RunLock | nullcontext[None],
        step: int,
        groups: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        save: Callable[..., Path | None] | None = None,
        ready: AbstractContextManager[None] | None = None,
        **keep: int,
    ) -> None:
        """Begin to save what the tensors and the state hold now; see `checkpoint.save`.

        Args:
            run: its directory.
            lock: of the run; held until the write is done. Nothing where another process holds it.
            step, groups, state: as there.
            save: `joint.save` for what several processes write; default `checkpoint.save`.
            ready: where all that can fail is done before the thread starts.
            **keep: keep and keep_every.
        """
        assert self._thread is None, "settle comes before start"
        state = json.loads(json.dumps(state))
        held = False
        try:
            with ready or nullcontext():
                copies, wait = self._snapshot.take(groups)
                lock.__enter__()
                held = True
        except BaseException:
            if held:
                lock.__exit__(None, None, None)
            raise

        def write() -> None:
            try:
                wait()
                self._path = (save or checkpoint.save)(run, step, copies, state, **keep)
            except BaseException as error:  # raised by settle
                self._error = error
            finally:
                lock.__exit__(None, None, None)

        self._thread = threading.Thread(target=write, name=f"checkpoint {step}")
        self._thread.start()

    def release(self) -> None:
        """Give back the memory of the snapshot, once nothing is written from it."""
        if self._thread is None:
            self._snapshot = Snapshot()
