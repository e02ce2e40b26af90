"""Networks in bfloat16, with float32 arithmetic around them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastcm.networks.protocol import Network

Precision = Literal["fp32", "bf16"]


def check_precision(precision: str) -> None:
    """Raise ValueError unless it is one of `Precision`."""
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be 'fp32' or 'bf16', got {precision!r}")


def half_of(net: Network) -> torch.dtype | None:
    """The half precision that a module's weights are in, or some of them; None for none."""
    for parameter in net.parameters() if isinstance(net, nn.Module) else ():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            return parameter.dtype
    return None


def check_not_double(name: str, net: Network) -> None:
    """Raise ValueError for a network in float64, which is never given a state of its own dtype."""
    held = net.parameters() if isinstance(net, nn.Module) else ()
    if {p.dtype for p in held} == {torch.float64}:
        raise ValueError(f"{name} is in float64, and its x in float32: give {name}.float()")


class Autocast:
    """A network with inputs of half precision, under autocast, whose output is what that makes.

    Autocast rather than bfloat16 copies of the weights: normalisations and time embeddings stay
    float32 in any network, and averages that change in place need no second copy.
    """

    def __init__(self, net: Network, device_type: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.net = net
        self.device_type, self.dtype = device_type, dtype
        self.log_variance = getattr(net, "log_variance", None)

    def __call__(self, x: Tensor, t: Tensor, cond: Any = None, **second: Tensor) -> Tensor:
        if self.device_type == "meta":  # has no autocast: what counts operators there casts itself
            return self.net(x.to(self.dtype), t, cond, **second)
        with torch.autocast(self.device_type, self.dtype):
            return self.net(x.to(self.dtype), t, cond, **second)
