"""Tables of the one-sweep optimizer: placeholder."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PARAMETER, GRADIENT, OFFSET, NUMEL, GROUP = range(5)
SEGMENT_ALIGN = 64
CHUNK = 4096


@dataclass(frozen=True)
class Segment:
    first: int
    count: int
    parameter: torch.dtype
    gradient: torch.dtype
    aligned: bool
