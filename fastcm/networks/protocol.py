"""What every network is called as, here and from outside: the protocol of the package."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor, nn

Network = Callable[..., Tensor]
"""``net(x, t, cond) -> F``: x ``[B, ...]``, t ``[B]`` float32, F like x, cond a `Condition`.

Of two times it is ``net(x, t, cond, s=s)`` with s ``[B]``, s <= t: the mean velocity u(x, t, s) of
the way down, x_s = x_t - (t - s) u; at s = t the velocity itself, and that without s, too.
"""


def check_signature(name: str, net: Network, *, two_times: bool = False) -> None:
    """Raise TypeError if a module cannot be called as `Network` says."""
    if not isinstance(net, nn.Module):
        return
    try:
        signature = inspect.signature(net.forward)
    except (TypeError, ValueError):  # compiled elsewhere
        return
    try:
        signature.bind("x", "t", "cond")
    except TypeError:
        raise TypeError(
            f"{name} is called as {name}(x, t, cond), and {type(net).__name__}.forward takes "
            f"{signature}: give it these three, cond=None being the last, or wrap it in a module "
            "that does"
        ) from None
    if two_times:
        try:
            signature.bind("x", "t", "cond", s="s")
        except TypeError:
            raise TypeError(
                f"{name} is called as {name}(x, t, cond, s=s) for the mean velocity from t to s, "
                f"and {type(net).__name__}.forward takes {signature}"
            ) from None


def check_output(name: str, F: Tensor, x: Tensor) -> Tensor:
    """Raise ValueError if a network's output has another shape than its input."""
    if not isinstance(F, Tensor):
        raise TypeError(
            f"{name} must return a tensor, got {type(F).__name__}: wrap it in a module whose "
            "forward returns the tensor out of it"
        )
    if F.shape != x.shape:
        raise ValueError(
            f"{name} must return a tensor of the shape of its input, {list(x.shape)}, "
            f"got {list(F.shape)}"
        )
    return F
