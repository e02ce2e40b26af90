"""Folders that are filled file by file: by one setting, resumed, by several processes at once."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcm.runs.description import differences
from fastcm.runs.files import WRITING, create_file, read_state

_LEFT_OVER = re.compile(rf"{re.escape(WRITING)}(.+)-(\d{{1,9}})")


@dataclass(frozen=True)
class Filled:
    """A folder and the setting that its files are made by.

    Args:
        path: of the folder.
        settings: JSON-able.
        record: name of the file that holds them.
        suffixes: of the files it is filled with; such files without a record are somebody else's.
        what: is in it, for messages.
    """

    path: Path
    settings: dict[str, Any]
    record: str
    suffixes: tuple[str, ...]
    what: str

    def check(self) -> None:
        """Raise ValueError if the folder was filled by another setting, or by an unknown one."""
        record = self.path / self.record
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is a file, not a folder for {self.what}")
        if not record.exists():
            foreign = next((n for n in os.listdir(self.path) if n.endswith(self.suffixes)), None)
            if foreign is None:
                return
            if not record.exists():  # asked again: another process writes it before its files
                raise ValueError(
                    f"{self.path} has {foreign} and no {self.record}: {self.what} would be mixed "
                    "up with other files, choose an empty folder"
                )
        changed = differences(read_state(record), self.settings)
        if changed:
            raise ValueError(
                f"{self.path} holds {self.what} of another setting: {'; '.join(changed)}; "
                "choose another folder"
            )

    def claim(self) -> None:
        """Record the setting; ValueError if another process was faster, and has another one."""
        if not (self.path / self.record).exists():
            self.path.mkdir(parents=True, exist_ok=True)
            create_file(self.path / self.record, json.dumps(self.settings, indent=1).encode())
        self.check()


def left_over(folder: Path) -> list[tuple[str, Path]]:
    """What killed processes of this machine left in a folder: names of files, and unfinished ones.

    None of what living processes write; on other systems than POSIX none at all.
    """
    if os.name != "posix":  # os.kill would do harm
        return []
    found = ((_LEFT_OVER.fullmatch(path.name), path) for path in folder.glob(f"{WRITING}*"))
    return [(m[1], path) for m, path in found if m is not None and not _is_running(int(m[2]))]


def share(indices: range, size: int, rank: int, count: int) -> range:
    """Which of the indices one of `count` processes takes: whole groups of `size`, evenly.

    Files and their contents are then those of one process.
    """
    start, end = indices.start // size, -(-indices.stop // size)
    cuts = (start + (end - start) * r // count for r in (rank, rank + 1))
    low, high = (min(max(cut * size, indices.start), indices.stop) for cut in cuts)
    return range(low, high)


def _is_running(pid: int) -> bool:
    """Whether it is a process of this machine, and another one."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()
