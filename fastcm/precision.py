"""Networks in bfloat16, with float32 arithmetic around them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastcm.networks.protocol import Network

Precision = Literal["fp32", "bf16"]


def check_precision(precision: str) -> None:
    """Raise ValueError unless it is one of `Precision`."""
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be 'fp32' or 'bf16', got {precision!r}")


class Autocast:
    """A network with bfloat16 inputs, under autocast; its output is what autocast makes of it.

    Autocast rather than bfloat16 copies of the weights: normalisations and time embeddings stay
    float32 in any network, and averages that change in place need no second copy.
    """

    def __init__(self, net: Network, device_type: str) -> None:
        self.net = net
        self.device_type = device_type
        self.log_variance = getattr(net, "log_variance", None)

    def __call__(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, **second: Tensor
    ) -> Tensor:
        if self.device_type == "meta":  # has no autocast: what counts operators there casts itself
            return self.net(x.to(torch.bfloat16), t, cond, **second)
        with torch.autocast(self.device_type, torch.bfloat16):
            return self.net(x.to(torch.bfloat16), t, cond, **second)
