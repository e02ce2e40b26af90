"""What every network is called as, here and from outside: the protocol of the package."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Network = Callable[..., Tensor]
"""``net(x, t, cond) -> F``: x ``[B, ...]``, t ``[B]`` float32, F like x, cond a `Condition`.

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
