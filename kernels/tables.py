"""The tables that the kernels of the optimizer walk; without triton, for the CPU path too.

`tensors`, int64 ``[5, n]``, describes each parameter tensor by one column:
    PARAMETER  address of its first element
    GRADIENT   address of the first element of its gradient, 0 if it has none in this step
    OFFSET     its first element in each row of the flat state, a multiple of SEGMENT_ALIGN
    NUMEL      elements
    GROUP      row of `hyper`
Parameter and gradient are dense in memory, in the same order.

`chunks`, int32 ``[2, C]``, cuts the tensors into the work of one program: index of the tensor, and
of the chunk in it. A chunk is CHUNK elements, the last of a tensor is what is left. Tensors without
elements have none. The order is free, but tensors of one `Segment` are neighbours.

`moments`, float32 (float64 for float64 parameters) ``[2, total]``, holds exp_avg and exp_avg_sq.
Each average is such a flat tensor ``[total]`` of its own, and so are the masters of parameters of
less precision and, in bfloat16 or float16, the shadows of parameters and averages. `total` is a
multiple of SEGMENT_ALIGN and every first address one of 256, so each tensor begins at 16 bytes in
all of them. `averages` and `shadows`, int64, are tables of their addresses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PARAMETER = 0
GRADIENT = 1
OFFSET = 2
NUMEL = 3
GROUP = 4
COLUMNS = 5

SEGMENT_ALIGN = 64
"""Elements: 128 bytes of the narrowest row, a shadow's."""

CHUNK = 4096
"""Elements: four turns of the sweep; in the norm 16 for each thread, all in flight at once.

Finding a chunk costs three loads in a row, about one turn, hidden by the other programs of the
multiprocessor; smaller chunks would pay it more often, larger ones leave small networks too few.
"""


@dataclass(frozen=True)
class Segment:
    """A run of chunks that one launch covers.

    Args:
        first, count: of its chunks.
        parameter, gradient: dtypes of its tensors: float32, bfloat16, float16 or float64.
        aligned: all addresses of its parameters and gradients are multiples of 16.
    """

    first: int
    count: int
    parameter: torch.dtype
    gradient: torch.dtype
    aligned: bool
