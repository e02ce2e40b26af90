"""Conditions of prompts in memory, out of a folder of ``fastcm encode``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastcm.data.latents import ENCODED
from fastcm.data.shard_files import open_shard
from fastcm.data.shards import as_bytes, empty, indexed
from fastcm.networks.conditions import nested


def encoded_prompts(folder: Path) -> Any:
    """All conditions in a folder: a dict by the keywords of the model, or the only tensor.

    Raises:
        ValueError: it is no such folder, or one that is not complete, or of images.
    """
    if not (folder / ENCODED).is_file():
        raise ValueError(f"{folder} is a folder, and not one of prompts that `fastcm encode` made")
    found: dict[str, list[torch.Tensor]] = {}
    for name, rows in indexed(folder).items():
        shard = open_shard(folder / name)
        if "x" in shard.fields:
            raise ValueError(f"{folder} holds images with their captions: encode --prompts alone")
        arrays = {key: empty(rows, field) for key, field in shard.fields.items()}
        lines = torch.arange(rows).numpy()
        shard.read(lines, {key: (as_bytes(x), lines) for key, x in arrays.items()})
        for key, x in arrays.items():
            found.setdefault(key, []).append(x)
    whole = {key: torch.cat(parts) for key, parts in found.items()}
    return next(iter(whole.values())) if len(whole) == 1 else nested(whole)
