"""Seeded random weights of the networks of features, by the names of the published files."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastcm.evaluation import Inception


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.empty(shape).normal_(generator=generator)


def dinov2_weights(
    width: int = 64, depth: int = 1, *, side: int = 16, gated: bool = False
) -> dict[str, Tensor]:
    """A DINOv2 of patches of 14 pixels, by the names of facebookresearch/dinov2."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "mask_token": (1, width),
        "pos_embed": (1, side * side + 1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    mlp = {"w12": (4 * width, width), "w3": (width, 2 * width)}
    plain = {"fc1": (4 * width, width), "fc2": (width, 4 * width)}
    for i in range(depth):
        layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        layers |= {f"mlp.{name}": shape for name, shape in (mlp if gated else plain).items()}
        for name, shape in layers.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
        for norm in ("norm1", "norm2"):
            shapes[f"blocks.{i}.{norm}.weight"] = shapes[f"blocks.{i}.{norm}.bias"] = (width,)
        shapes[f"blocks.{i}.ls1.gamma"] = shapes[f"blocks.{i}.ls2.gamma"] = (width,)
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * normal(generator, *shape) for name, shape in sorted(shapes.items())}


def inception_shapes(classes: int) -> dict[str, tuple[int, ...]]:
    net = Inception.__new__(Inception)
    nn.Module.__init__(net)
    net.of_fid = True
    net._build(classes)
    return {name: tuple(x.shape) for name, x in net.state_dict().items()}


def inception_weights(classes: int = 1008) -> dict[str, Tensor]:
    """Weights under which features neither vanish nor explode, in the order of their names."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in sorted(inception_shapes(classes).items()):
        x = normal(generator, *shape)
        if name.endswith("conv.weight"):
            x *= (2 / x[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            x = 1 + 0.4 * x.tanh()
        else:
            x *= 0.1
        found[name] = x
    return found


def picture(height: int, width: int) -> Tensor:
    """uint8 ``[1, 3, height, width]``: waves of several lengths."""
    y, x = torch.arange(height)[:, None], torch.arange(width)
    waves = [(0.3 * x + 0.05 * y * c).sin() * (0.11 * y + c).cos() for c in range(3)]
    return ((torch.stack(waves) + 1) * 127).to(torch.uint8)[None]
