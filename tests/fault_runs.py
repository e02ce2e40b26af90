"""Trains in processes that may be killed: a server that forks one for every line it reads.

torch is imported once. A line of standard input is a job in JSON; on standard output appear
"started PID", what the run tells ("ready", "step N", "saved N", "error ...", "done N"), and
"ended STATUS" when it is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fastcm import EMA, ConsistencyTraining, PowerEMA, Trainer, warmup_cosine
from fastcm.networks import MLP

TARGET = EMA(0.9)


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def make(directory: Path | None, **options: Any) -> Trainer:
    """A small run: 50 rows in batches of 8, warm-up, three averages, dropout-free."""
    torch.manual_seed(0)
    net = MLP(shape=(3,), width=16, depth=1)
    data = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    return Trainer(
        net,
        ConsistencyTraining(target_average=TARGET),
        data=data,
        batch_size=8,
        averages=(EMA(0.99, warmup=True), PowerEMA(0.1), TARGET),
        lr_schedule=warmup_cosine(7, 10_000),
        compile=False,
        progress=False,
        directory=directory,
        **{"log_every": 5, **options},
    )


def train(job: dict[str, Any]) -> None:
    pause = job.pop("pause", 0)
    limit = job.pop("file_bytes", None)
    if job.pop("unprivileged", False) and os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    directory, steps = Path(job.pop("directory")), job.pop("steps")
    forked = job.pop("forks", False)

    def tell(trainer: Trainer, event: str) -> None:
        if event == "save":
            assert trainer.saved is not None
            say(f"saved {int(trainer.saved.name.removeprefix('step_'))}")
        if event == "step" and pause:
            if forked and trainer.step == 1 and os.fork() == 0:
                say(f"forked {os.getpid()}")
                time.sleep(600)
            say(f"step {trainer.step}")
            time.sleep(pause)

    trainer = make(directory, callbacks=[tell], **job)
    if (directory / "checkpoints").exists() and any((directory / "checkpoints").glob("step_*")):
        trainer.load()
    if limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    say(f"ready {trainer.step}")
    trainer.fit(steps - trainer.step)
    if trainer.interrupted is not None:
        say(f"interrupted {trainer.interrupted.name}")
    say(f"done {trainer.step}")


def main() -> None:
    torch.set_num_threads(1)
    make(None).fit(2)  # imports and compiles what a first step does
    say("listening")
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stdin.close()
            try:
                train(json.loads(line))
            except BaseException as error:
                say(f"error {type(error).__name__}: {error}".replace("\n", " "))
                os._exit(1)
            os._exit(0)
        say(f"started {pid}")
        _, status = os.waitpid(pid, 0)
        say(f"ended {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
