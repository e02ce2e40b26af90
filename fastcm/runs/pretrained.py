"""Pretrained weights in safetensors files, read by the element: nobody needs all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from fastcm.runs.files import CheckpointError, read_state

_INDEX = ".safetensors.index.json"


class Pretrained:
    """The tensors of a safetensors file, or of a folder of them.

    Args:
        path: a file, or a folder with one file or an index beside several
            (``model.safetensors.index.json``, as Hugging Face's libraries write it).

    Attributes:
        shapes: of the tensors, by name.

    Raises:
        FileNotFoundError: no such file, or none in the folder.
        CheckpointError: several without an index, an index or file that is none.
    """

    def __init__(self, path: str | Path) -> None:
        self._files: dict[str, Any] = {}
        self.shapes: dict[str, torch.Size] = {}
        for file in _files(Path(path)):
            try:
                opened: Any = safetensors.safe_open(file, framework="pt")
            except (safetensors.SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} is not a safetensors file: {error}") from error
            for name in opened.keys():  # noqa: SIM118
                self._files[name] = opened
                self.shapes[name] = torch.Size(opened.get_slice(name).get_shape())

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start to stop - 1 of the flattened tensor, on the CPU; whole rows are read."""
        return elements(self._files[name], name, start, stop)


def elements(opened: Any, name: str, start: int, stop: int) -> Tensor:
    """Of a file that ``safetensors.safe_open`` has opened; see `Pretrained.elements`."""
    piece = opened.get_slice(name)
    shape = torch.Size(piece.get_shape())
    inner = shape[1:].numel()
    if not shape or inner == 0:
        whole: Tensor = opened.get_tensor(name)
        return whole.view(-1)[start:stop]
    first, last = start // inner, -(-stop // inner)
    rows: Tensor = piece[first:last]
    return rows.reshape(-1)[start - first * inner : stop - first * inner]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is neither a safetensors file nor a folder of such")
    indices = sorted(path.glob(f"*{_INDEX}"))
    if len(indices) == 1:
        named = read_state(indices[0]).get("weight_map")
        if not isinstance(named, dict):
            raise CheckpointError(f"{indices[0]} has no weight_map")
        names = sorted({str(name) for name in named.values()})
        for name in names:
            if Path(name).name != name or "\\" in name or not (path / name).is_file():
                raise CheckpointError(f"{indices[0]} names {name!r}, which is no file beside it")
        return [path / name for name in names]
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise FileNotFoundError(f"{path} has no safetensors file")
    if len(found) > 1:
        raise CheckpointError(f"{path} has {len(found)} safetensors files and no index: name one")
    return found
