"""A diffusion transformer with adaLN-zero conditioning (Peebles & Xie 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcm.networks.embedding import (
    Conditioning,
    LogVariance,
    ZeroLinear,
    check_input,
    require_positive,
    sinusoid,
)


def modulate(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return h * (1 + scale) + shift


class Block(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the embedding; identity at the start."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.modulation = ZeroLinear(width, 6 * width)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(emb)[:, None].chunk(6, -1)
        h = h + gate1 * self._attend(modulate(self.norm1(h), scale1, shift1))
        hidden = F.gelu(self.fc1(modulate(self.norm2(h), scale2, shift2)), approximate="tanh")
        out: Tensor = h + gate2 * self.fc2(hidden)
        return out

    def _attend(self, h: Tensor) -> Tensor:
        qkv = self.qkv(h).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


def grid_embedding(rows: int, columns: int, width: int) -> Tensor:
    """2D sinusoidal position embedding, float32 ``[rows * columns, width]``: rows, then columns."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([sinusoid(axis.flatten(), width // 2) for axis in (y, x)], dim=1)


class DiT(nn.Module):
    """Patches, transformer blocks with adaLN-zero, an output that starts at zero.

    Args:
        in_channels: channels of the image.
        size: side of a square image, or (height, width).
        patch: side of a patch; divides height and width.
        width: width of the residual stream; a multiple of 4 and of num_heads.
        depth: number of blocks.
        num_heads: attention heads.
        num_classes: labels are 0 .. num_classes - 1, num_classes is the null label; None for an
            unconditional network.
        time_scale: factor on t before the sinusoidal embedding; 1000 suits t in [0, 1].
        two_times: u(x, t, s), the mean velocity from t down to s, is what the network gives.
        guided: cond holds the weight of guidance, too; see `fastcm.sampling.append_weight`.
        log_variance: hold a `LogVariance`, for the weight `fastcm.losses.Learned`.
    """

    position: Tensor

    def __init__(
        self,
        in_channels: int,
        size: int | tuple[int, int] | list[int],
        patch: int = 2,
        width: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_classes: int | None = None,
        time_scale: float = 1000.0,
        two_times: bool = False,
        guided: bool = False,
        log_variance: bool = False,
    ) -> None:
        super().__init__()
        sides = (size, size) if isinstance(size, int) else tuple(size)
        if len(sides) != 2:
            raise ValueError(f"size must be an int or (height, width), got {size!r}")
        rows, columns = sides
        require_positive(
            in_channels=in_channels,
            patch=patch,
            width=width,
            depth=depth,
            num_heads=num_heads,
            **{"size[0]": rows, "size[1]": columns},
        )
        if rows % patch or columns % patch:
            raise ValueError(f"patch must divide the size {rows} x {columns}, got {patch}")
        if width % 4 or width % num_heads:
            raise ValueError(f"width must be a multiple of 4 and of {num_heads} heads, got {width}")
        self.description: dict[str, object] = {
            "name": "dit",
            "in_channels": in_channels,
            "size": [rows, columns],
            "patch": patch,
            "width": width,
            "depth": depth,
            "num_heads": num_heads,
            "num_classes": num_classes,
            "time_scale": time_scale,
            **({"two_times": True} if two_times else {}),
            **({"guided": True} if guided else {}),
            **({"log_variance": True} if log_variance else {}),
        }
        self.shape = (in_channels, rows, columns)
        self.grid = (rows // patch, columns // patch)
        self.patch = patch
        self.conditioning = Conditioning(width, num_classes, time_scale, two_times, guided)
        if log_variance:
            self.log_variance = LogVariance()
        self.input = nn.Linear(in_channels * patch**2, width)
        self.width = width
        self.register_buffer("position", grid_embedding(*self.grid, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = ZeroLinear(width, 2 * width)
        self.output = ZeroLinear(width, in_channels * patch**2)

    def reset_parameters(self) -> None:
        """Compute the positions anew, which follow from the sizes."""
        self.position = grid_embedding(*self.grid, self.width)

    def forward(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None
    ) -> Tensor:
        """F of the shape of x ``[B, C, H, W]`` at times t and s ``[B]`` for labels cond ``[B]``."""
        check_input(x, t, self.shape)
        (channels, _, _), (rows, columns), p = self.shape, self.grid, self.patch
        patches = x.reshape(-1, channels, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        # The float32 positions keep the residual stream in float32 under autocast.
        h = self.input(patches.flatten(3).flatten(1, 2)) + self.position
        emb = self.conditioning(t, cond, s).to(h.dtype)
        for block in self.blocks:
            h = block(h, emb)
        scale, shift = self.modulation(emb)[:, None].chunk(2, -1)
        out: Tensor = self.output(modulate(self.norm(h), scale, shift))
        out = out.reshape(-1, rows, columns, channels, p, p)
        return out.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
