"""Several processes of one thread each, joined by gloo, for what is measured among them."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Work = Callable[..., dict[str, Any]]
"""work(rank, world, *arguments) in every process; the first one's result is returned."""


def together(work: Work, world: int, *arguments: Any) -> dict[str, Any]:
    """What the first of several processes returns; each has a thread, and they are a group."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        out = Path(folder) / "result.json"
        torch.multiprocessing.spawn(
            _begin, (work, world, port, str(out), arguments), nprocs=world, join=True
        )
        found: dict[str, Any] = json.loads(out.read_text())
    return found


def _begin(
    rank: int, work: Work, world: int, port: int, out: str, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    result = work(rank, world, *arguments)
    if rank == 0:
        Path(out).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
