"""What every network is called as, here and from outside: the protocol of the package."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Network = Callable[..., Tensor]
"""``net(x, t, cond) -> F``: x ``[B, ...]``, t ``[B]`` float32, F like x.

Of two times it is ``net(x, t, cond, s=s)`` with s ``[B]``, s <= t: the mean velocity u(x, t, s) of
the way down, x_s = x_t - (t - s) u; at s = t the velocity itself, and that without s, too.
"""


def check_output(name: str, F: Tensor, x: Tensor) -> Tensor:
    """Raise ValueError if a network's output has another shape than its input."""
    if not isinstance(F, Tensor):
        raise TypeError(f"{name} must return a tensor, got {type(F).__name__}")
    if F.shape != x.shape:
        raise ValueError(
            f"{name} must return a tensor of the shape of its input, {list(x.shape)}, "
            f"got {list(F.shape)}"
        )
    return F


def unconditional(cond: Tensor, null: Tensor | int | None) -> Tensor:
    """The null condition for every row of `cond`."""
    if isinstance(null, Tensor):
        return null.to(cond).expand_as(cond)
    if null is None:
        raise ValueError("guidance needs null_condition, got None")
    return torch.full_like(cond, null)


def append_weight(cond: Tensor | None, weight: float | Tensor, n: int | None = None) -> Tensor:
    """Conditioning for a network that takes the guidance weight as an input.

    Args:
        cond: ``[B]`` labels (below 2**24, exact in float32), ``[B, C]`` features, or None.
        weight: one number, or ``[B]``.
        n: B, where `cond` is None.

    Returns:
        float32 ``[B, C + 1]`` (C = 1 for labels, 0 for None), the weight in the last column.

    Raises:
        ValueError: neither cond nor n is given; a cond of another rank.
    """
    if cond is None and n is None:
        raise ValueError("append_weight needs cond or n, got neither")
    if cond is not None and cond.dim() not in (1, 2):
        raise ValueError(f"cond must be [B] or [B, C], got shape {list(cond.shape)}")
    if cond is None:
        columns = torch.empty(n or 0, 0, dtype=torch.float32)
    else:
        columns = cond.reshape(len(cond), -1).float()
    w = torch.as_tensor(weight, dtype=torch.float32, device=columns.device)
    return torch.cat([columns, w.expand(len(columns))[:, None]], dim=1)


def split_weight(cond: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `append_weight`, for use inside the network.

    Returns:
        (features ``[B, C]``, weight ``[B]``), float32; labels are ``features[:, 0].long()``.
    """
    return cond[:, :-1], cond[:, -1]
