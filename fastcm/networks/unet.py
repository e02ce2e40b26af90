"""A convolutional U-Net in the style of DDPM and ADM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcm.networks.embedding import (
    Conditioning,
    LogVariance,
    ZeroConv2d,
    check_input,
    require_positive,
)


def group_norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups of at least 4 channels; `channels` is a multiple of 4."""
    return nn.GroupNorm(math.gcd(channels // 4, 32), channels)


class Attention(nn.Module):
    """h + self-attention over the pixels of h."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        if channels % num_heads:
            raise ValueError(
                f"num_heads must divide the {channels} channels at every level with attention, "
                f"got {num_heads}"
            )
        self.num_heads = num_heads
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = ZeroConv2d(channels, channels, 1)

    def forward(self, h: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(h)).flatten(2).unflatten(1, (3, self.num_heads, -1))
        # fused attention reads heads whose channels lie side by side
        q, k, v = qkv.transpose(-1, -2).contiguous().unbind(1)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        out: Tensor = h + self.proj(attended.reshape(h.shape))
        return out


class Block(nn.Module):
    """Residual block with scale-shift by the embedding, optional resampling and attention."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        cond_dim: int,
        *,
        dropout: float,
        num_heads: int = 0,
        resample: Literal["down", "up"] | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(cond_dim, 2 * out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = ZeroConv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        self.attention = Attention(out_channels, num_heads) if num_heads else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self._resized(F.silu(self.norm1(x))))
        scale, shift = self.modulation(emb)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        h = self.skip(self._resized(x)) + self.conv2(self.dropout(h))
        out: Tensor = self.attention(h)
        return out

    def _resized(self, h: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(h, 2)
        if self.resample == "up":
            # nearest; the gradient of F.interpolate adds in no fixed order when it is compiled
            B, C, H, W = h.shape
            return h[:, :, :, None, :, None].expand(B, C, H, 2, W, 2).reshape(B, C, 2 * H, 2 * W)
        return h


class UNet(nn.Module):
    """GroupNorm-SiLU residual blocks, attention at chosen levels, an output that starts at zero.

    Height and width of the input must be multiples of ``2 ** (len(channel_mults) - 1)``.

    Args:
        in_channels: channels of the image.
        base_channels: channels at full resolution before the multiplier, a multiple of 4.
        channel_mults: one multiplier per level; each level halves the resolution of the last.
        num_res_blocks: blocks per level on the way down (one more on the way up).
        attention_levels: levels with self-attention, 0 is full resolution; None for the last one.
            The middle of the network always has it.
        num_heads: attention heads.
        num_classes: labels are 0 .. num_classes - 1, num_classes is the null label; None for an
            unconditional network.
        dropout: probability inside the residual blocks.
        time_scale: factor on t before the sinusoidal embedding; 1000 suits t in [0, 1].
        two_times: u(x, t, s), the mean velocity from t down to s, is what the network gives.
        guided: cond holds the weight of guidance, too; see `fastcm.sampling.append_weight`.
        log_variance: hold a `LogVariance`, for the weight `fastcm.losses.Learned`.
    """

    def __init__(
        self,
        in_channels: int,
        base_channels: int = 64,
        channel_mults: Sequence[int] = (1, 2, 2),
        num_res_blocks: int = 2,
        attention_levels: Sequence[int] | None = None,
        num_heads: int = 4,
        num_classes: int | None = None,
        dropout: float = 0.0,
        time_scale: float = 1000.0,
        two_times: bool = False,
        guided: bool = False,
        log_variance: bool = False,
    ) -> None:
        super().__init__()
        require_positive(
            in_channels=in_channels,
            base_channels=base_channels,
            num_res_blocks=num_res_blocks,
            num_heads=num_heads,
            **{f"channel_mults[{i}]": m for i, m in enumerate(channel_mults)},
        )
        if not channel_mults or base_channels % 4:
            raise ValueError(
                f"UNet needs channel_mults and base_channels that is a multiple of 4, got "
                f"{tuple(channel_mults)} and {base_channels}"
            )
        last = len(channel_mults) - 1
        attention = {last} if attention_levels is None else set(attention_levels)
        if not attention <= set(range(last + 1)):
            raise ValueError(f"attention_levels must be within 0..{last}, got {sorted(attention)}")
        self.description: dict[str, object] = {
            "name": "unet",
            "in_channels": in_channels,
            "base_channels": base_channels,
            "channel_mults": list(channel_mults),
            "num_res_blocks": num_res_blocks,
            "attention_levels": sorted(attention),
            "num_heads": num_heads,
            "num_classes": num_classes,
            "dropout": dropout,
            "time_scale": time_scale,
            **({"two_times": True} if two_times else {}),
            **({"guided": True} if guided else {}),
            **({"log_variance": True} if log_variance else {}),
        }
        self.in_channels = in_channels
        self.multiple = 2**last
        cond_dim = 4 * base_channels
        widths = [base_channels * m for m in channel_mults]

        def block(
            i: int, o: int, heads: int = 0, resample: Literal["down", "up"] | None = None
        ) -> Block:
            return Block(i, o, cond_dim, dropout=dropout, num_heads=heads, resample=resample)

        self.conditioning = Conditioning(cond_dim, num_classes, time_scale, two_times, guided)
        if log_variance:
            self.log_variance = LogVariance()
        self.input = nn.Conv2d(in_channels, base_channels, 3, padding=1)
        channels, skips = base_channels, [base_channels]
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            heads = num_heads if level in attention else 0
            if level:
                self.down.append(block(channels, channels, resample="down"))
                skips.append(channels)
            for _ in range(num_res_blocks):
                self.down.append(block(channels, width, heads))
                channels = width
                skips.append(channels)

        self.middle = nn.ModuleList(
            [block(channels, channels, num_heads), block(channels, channels)]
        )
        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            heads = num_heads if level in attention else 0
            stage = nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                stage.append(block(channels + skips.pop(), width, heads))
                channels = width
            if level:
                stage.append(block(channels, channels, resample="up"))
            self.up.append(stage)
        self.norm = group_norm(channels)
        self.output = ZeroConv2d(channels, in_channels, 3, padding=1)

    def forward(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None
    ) -> Tensor:
        """F of the shape of x ``[B, C, H, W]`` at times t and s ``[B]`` for labels cond ``[B]``."""
        check_input(x, t, (self.in_channels, None, None))
        if x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise ValueError(
                f"height and width of x must be multiples of {self.multiple}, got {list(x.shape)}"
            )
        h = self.input(x)
        emb = self.conditioning(t, cond, s).to(h.dtype)
        skips = [h]
        for block in self.down:
            h = block(h, emb)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for stage in self.up:
            assert isinstance(stage, nn.ModuleList)
            for block in stage:
                grows = block.resample == "up"
                h = block(h if grows else torch.cat((h, skips.pop()), dim=1), emb)
        out: Tensor = self.output(F.silu(self.norm(h)))
        return out
