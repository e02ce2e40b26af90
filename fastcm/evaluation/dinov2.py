"""DINOv2's vision transformer as FD-DINOv2 uses it, from weights in a local file or folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastcm.networks.files import read_weights, take_weights

SIDE = 224
"""Pixels of the network's input."""
HEAD = 64
"""Features of a head of attention, in every size of the network."""

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIZES = {384: "ViT-S/14", 768: "ViT-B/14", 1536: "ViT-g/14"}
_LARGE = 1024
_HINT = (
    "give dinov2_vitl14_pretrain.pth (or vits14, vitb14, vitg14) of facebookresearch/dinov2, or a "
    "Hugging Face folder such as facebook/dinov2-large, without registers"
)
_ATTENTION = r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)"
_RENAMED = (
    (r"embeddings\.(cls_token|mask_token|register_tokens)", r"\1"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.mlp\.weights_in\.", r"blocks.\1.mlp.w12."),
    (r"encoder\.layer\.(\d+)\.mlp\.weights_out\.", r"blocks.\1.mlp.w3."),
    (r"encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"layernorm\.", "norm."),
)
"""How `transformers` names the weights in its files, and DINOv2's own repository."""


class DINOv2(nn.Module):
    """The class token of DINOv2 after the last normalisation, 1,024 features of ViT-L/14.

    The size of the network follows from its weights; FD-DINOv2 is defined with ViT-L/14, and other
    sizes are named in the table.

    Args:
        path: ``.safetensors``, or what ``torch.save`` wrote, of which nothing but tensors is read,
            by the names of facebookresearch/dinov2 or of Hugging Face; or a folder with
            ``.safetensors`` files.

    Raises:
        FileNotFoundError: there is no such file, or the folder has none.
        ValueError: it is not readable, or holds another network, such as one with registers.

    Source: Oquab et al. 2023, "DINOv2"; Stein et al. 2023, "Exposing flaws of generative model
    evaluation metrics", for the distance. Images are resized as by EDM2's ``calculate_metrics.py``:
    bicubic with smoothing, in float32; the pixels that dgm-eval rounds in between are not rounded.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        found = _own_names(_read(Path(path)))
        for name in ("cls_token", "pos_embed", "patch_embed.proj.weight"):
            if name not in found:
                raise ValueError(f"{path} has no {name!r}: {_HINT}")
        if "register_tokens" in found:
            raise ValueError(f"{path} is a DINOv2 with registers, another network: {_HINT}")
        self.width = found["cls_token"].shape[-1]
        if self.width % HEAD:
            raise ValueError(f"'cls_token' in {path} has {self.width} features: {_HINT}")
        blocks = {int(name.split(".")[1]) for name in found if re.match(r"blocks\.\d+\.", name)}
        with torch.device("meta"):
            self.cls_token = nn.Parameter(torch.empty(1, 1, self.width))
            self.mask_token = nn.Parameter(torch.empty(1, self.width))  # of training
            self.pos_embed = nn.Parameter(torch.empty(1, found["pos_embed"].shape[1], self.width))
            self.patch_embed = _Patches(found["patch_embed.proj.weight"].shape[-1], self.width)
            self.blocks = nn.ModuleList(
                _Block(self.width, *_hidden(found, i)) for i in range(len(blocks))
            )
            self.norm = nn.LayerNorm(self.width, eps=1e-6)
        take_weights(self, {"mask_token": torch.zeros(1, self.width), **found}, str(path), _HINT)

    @property
    def distance(self) -> str:
        """What the Frechet distance in these features is called."""
        if self.width == _LARGE:
            return "FD-DINOv2"
        return f"FD-DINOv2 ({_SIZES.get(self.width, f'{self.width} features')})"

    def forward(self, x: Tensor) -> Tensor:
        """Features, float32 ``[B, width]``, of ``[B, 3, H, W]`` in 0..255, uint8 or float."""
        return self.tokens(self.pixels(x))[:, 0]

    def pixels(self, x: Tensor) -> Tensor:
        """Images as the network was trained on them: resized, and normalised as ImageNet's."""
        size = (SIDE, SIDE)
        x = functional.interpolate(
            x.float(), size=size, mode="bicubic", align_corners=False, antialias=True
        )
        mean, std = (x.new_tensor(c).view(1, 3, 1, 1) for c in (_MEAN, _STD))
        return (x / 255 - mean) / std

    def tokens(self, x: Tensor) -> Tensor:
        """Class token and patches, normalised, of square images that patches divide."""
        x = self.patch_embed.proj(x)
        grid = x.shape[-1]
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.positions(grid)
        for block in self.blocks:
            x = block(x)
        normalised: Tensor = self.norm(x)
        return normalised

    def positions(self, grid: int, *, offset: float = 0.1) -> Tensor:
        """The learned embeddings of places, resized to a grid of patches.

        Args:
            grid: patches of a side.
            offset: with which DINOv2 scales them, by (grid + 0.1) / side, which moves them a
                little; 0 would scale them exactly.
        """
        side = round((self.pos_embed.shape[1] - 1) ** 0.5)
        if side == grid:
            return self.pos_embed
        places = self.pos_embed[:, 1:].view(1, side, side, -1).permute(0, 3, 1, 2)
        scale = ((grid + offset) / side,) * 2
        places = functional.interpolate(places, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], places.flatten(2).transpose(1, 2)], 1)


class _Patches(nn.Module):
    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, size, stride=size)


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int, gated: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width)
        self.ls1 = _Scale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp: nn.Module = (_Gated if gated else _Layers)(width, hidden)
        self.ls2 = _Scale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return x


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        x = functional.scaled_dot_product_attention(*heads)
        projected: Tensor = self.proj(x.transpose(1, 2).flatten(2))
        return projected


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Layers(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return found


class _Gated(nn.Module):
    """SwiGLU, of ViT-g/14."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, -1)
        found: Tensor = self.w3(functional.silu(gate) * value)
        return found


def _hidden(found: dict[str, Tensor], block: int) -> tuple[int, bool]:
    """The width within a block's layers, and whether they are gated."""
    for name, gated in (("fc1", False), ("w3", True)):
        weight = found.get(f"blocks.{block}.mlp.{name}.weight")
        if weight is not None:
            return weight.shape[gated], gated
    return 1, False  # what is missing will be named


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_dir():
        return read_weights(path, "DINOv2")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no .safetensors file of DINOv2 weights in {path}")
    return {name: x for file in files for name, x in read_weights(file, "DINOv2").items()}


def _own_names(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by the names of DINOv2's repository, where query, key and value are one."""
    named: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for name, value in found.items():
        if match := re.fullmatch(_ATTENTION, name):
            joined.setdefault(f"blocks.{match[1]}.attn.qkv.{match[3]}", {})[match[2]] = value
            continue
        for pattern, own in _RENAMED:
            name, changed = re.subn(f"^{pattern}", own, name)
            if changed:
                break
        named[name] = value
    for name, parts in joined.items():
        if len(parts) == 3:
            named[name] = torch.cat([parts[key] for key in ("query", "key", "value")])
    return named
