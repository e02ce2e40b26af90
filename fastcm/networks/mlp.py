"""A residual MLP for vectors and very small images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fastcm.networks.embedding import (
    Conditioning,
    LogVariance,
    ZeroLinear,
    check_input,
    require_positive,
)


class Block(nn.Module):
    """h + Linear(SiLU(scale-shift(LayerNorm(h))))."""

    def __init__(self, width: int, cond_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(cond_dim, 2 * width)
        self.fc = nn.Linear(width, width)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.modulation(emb).chunk(2, dim=1)
        out: Tensor = h + self.fc(F.silu(self.norm(h) * (1 + scale) + shift))
        return out


class MLP(nn.Module):
    """Flatten, residual blocks modulated by time and class, and an output that starts at zero.

    Args:
        shape: shape of one sample, e.g. ``(2,)`` or ``(1, 8, 8)``.
        width: width of the residual stream, at least 8.
        depth: number of blocks.
        num_classes: labels are 0 .. num_classes - 1, num_classes is the null label; None for an
            unconditional network.
        time_scale: factor on t before the sinusoidal embedding; 1000 suits t in [0, 1].
        two_times: u(x, t, s), the mean velocity from t down to s, is what the network gives.
        guided: cond holds the weight of guidance, too; see `fastcm.sampling.append_weight`.
        log_variance: hold a `LogVariance`, for the weight `fastcm.losses.Learned`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 512,
        depth: int = 4,
        num_classes: int | None = None,
        time_scale: float = 1000.0,
        two_times: bool = False,
        guided: bool = False,
        log_variance: bool = False,
    ) -> None:
        super().__init__()
        require_positive(**{f"shape[{i}]": n for i, n in enumerate(shape)})
        require_positive(width=width, depth=depth)
        if not shape or width < 8:
            raise ValueError(f"MLP needs a shape and width >= 8, got {tuple(shape)} and {width}")
        self.description: dict[str, object] = {
            "name": "mlp",
            "shape": list(shape),
            "width": width,
            "depth": depth,
            "num_classes": num_classes,
            "time_scale": time_scale,
            **({"two_times": True} if two_times else {}),
            **({"guided": True} if guided else {}),
            **({"log_variance": True} if log_variance else {}),
        }
        self.shape = tuple(shape)
        size = math.prod(shape)
        cond_dim = width // 8
        self.conditioning = Conditioning(cond_dim, num_classes, time_scale, two_times, guided)
        if log_variance:
            self.log_variance = LogVariance()
        self.input = nn.Linear(size, width)
        self.blocks = nn.ModuleList(Block(width, cond_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.output = ZeroLinear(width, size)

    def forward(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None
    ) -> Tensor:
        """F of the shape of x ``[B, *shape]``, at times t and s ``[B]`` for labels cond ``[B]``."""
        check_input(x, t, self.shape)
        h = self.input(x.flatten(1))
        emb = self.conditioning(t, cond, s).to(h.dtype)
        for block in self.blocks:
            h = block(h, emb)
        out: Tensor = self.output(F.silu(self.norm(h)))
        return out.reshape(x.shape)
