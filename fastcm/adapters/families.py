"""How the pipelines of diffusers call each family of models: read from the model's config.

A condition goes by the keywords of the model's `forward`, and is nested where they are. Only
"guidance", the weight ``[B]`` that a model embeds, is the package's own name; see `_lcm_guidance`
for where it is not the model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastcm.networks.conditions import WEIGHT, Null

Config = Mapping[str, Any]
Inputs = dict[str, Any]


def first_channels(F: Tensor, x: Tensor) -> Tensor:
    """The prediction, of a model that also predicts a variance: twice the channels."""
    return F[:, : x.shape[1]] if F.dim() > 1 and F.shape[1] == 2 * x.shape[1] else F


def unchanged(x: Tensor, cond: Inputs) -> Inputs:
    return cond


@dataclass(frozen=True)
class Call:
    """How one model is called.

    sample: the keyword of x.
    keys: of the condition; True: needed, False: may be left out, a mapping: nested keys.
    channels, patch: of x; None where that is not known. patch holds the numbers that its sizes
        must be multiples of.
    size: of x behind its channels, where the config names it.
    unit: timestep of the model / timestep of the scheduler.
    null_condition: what stands for no condition, where the config names it.
    inputs: of (x, condition), what becomes of the condition and is added to it.
    packed: of x, the model's sample.
    output: of (output, x), F.
    """

    sample: str
    keys: Mapping[str, Any]
    channels: int | None = None
    patch: tuple[int, ...] | None = None
    size: tuple[int, ...] | None = None
    unit: float = 1.0
    null_condition: Null = None
    inputs: Callable[[Tensor, Inputs], Inputs] = unchanged
    packed: Callable[[Tensor], Tensor] | None = None
    output: Callable[[Tensor, Tensor], Tensor] = first_channels

    @property
    def needed(self) -> list[str]:
        return [key for key, needed in self.keys.items() if needed]

    def tokens(self, shape: tuple[int, ...]) -> int:
        """Of a transformer, for a sample ``[C, ...]``."""
        patch = self.patch or (1,) * (len(shape) - 1)
        return math.prod(n // p for n, p in zip(shape[1:], patch))


def call_of(name: str, config: Config) -> Call:
    """How a model of this class and config is called.

    Raises:
        ValueError: a class that is not one of `FAMILIES`; a config that asks for inputs that a
            network of x, t and a condition does not have.
    """
    if name not in FAMILIES:
        raise ValueError(
            f"{name} is not one of the families that are known here, {sorted(FAMILIES)}: wrap the "
            "model as DiffusersNetwork(model, time_scale=..., condition=...)"
        )
    channels, out = config["in_channels"], config.get("out_channels") or config["in_channels"]
    if out not in (channels, 2 * channels):
        raise ValueError(
            f"this {name} has in_channels = {channels} and out_channels = {out}: it takes more "
            "than the noisy sample (inpainting, image to video), which a network does not"
        )
    return FAMILIES[name](config)


def _square(config: Config) -> tuple[int, ...] | None:
    size = config.get("sample_size")
    return (size, size) if isinstance(size, int) else None if size is None else tuple(size)


def _unet(config: Config) -> Call:
    halvings = 2 ** (len(config["down_block_types"]) - 1)
    labelled = config.get("class_embed_type") or config.get("num_class_embeds")
    return Call(
        sample="sample",
        keys={"class_labels": True} if labelled else {},
        channels=config["in_channels"],
        patch=(halvings, halvings),
        size=_square(config),
    )


def _unet_condition(config: Config) -> Call:
    for key, known in (
        ("addition_embed_type", (None, "text", "text_time")),
        ("encoder_hid_dim_type", (None, "text_proj")),
    ):
        if config.get(key) not in known:
            raise ValueError(f"{key} must be one of {known}, got {config.get(key)!r}")
    keys: dict[str, Any] = {"encoder_hidden_states": True, "encoder_attention_mask": False}
    if config.get("class_embed_type") or config.get("num_class_embeds"):
        keys["class_labels"] = True
    if config.get("addition_embed_type") == "text_time":
        keys["added_cond_kwargs"] = {"text_embeds": True, "time_ids": True}
    width = config.get("time_cond_proj_dim")
    if width:
        keys[WEIGHT] = True
    return Call(
        sample="sample",
        keys=keys,
        channels=config["in_channels"],
        patch=(1, 1),
        size=_square(config),
        inputs=partial(_lcm_guidance, width=width) if width else unchanged,
    )


def _lcm_guidance(x: Tensor, cond: Inputs, *, width: int) -> Inputs:
    """The weight w as `timestep_cond`: sines and cosines of 1000 (w - 1), as LCM pipelines do."""
    rest = {key: value for key, value in cond.items() if key != WEIGHT}
    w = 1000.0 * (cond[WEIGHT].float() - 1.0)
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=w.device)
    angles = w[:, None] * torch.exp(-math.log(10000.0) / (half - 1) * steps)
    embedded = torch.cat([angles.sin(), angles.cos(), angles.new_zeros(len(w), width % 2)], 1)
    return {**rest, "timestep_cond": embedded.to(x.dtype)}


def _pixart(config: Config) -> Call:
    keys: dict[str, Any] = {"encoder_hidden_states": True, "encoder_attention_mask": False}
    sized = config.get("use_additional_conditions")
    # None: as the model decides, see its constructor
    if config["sample_size"] == 128 if sized is None else sized:
        keys["added_cond_kwargs"] = {"resolution": True, "aspect_ratio": True}
    return _transformer(config, keys)


def _dit(config: Config) -> Call:
    null = {"class_labels": config["num_embeds_ada_norm"]}
    return _transformer(config, {"class_labels": True}, null_condition=null)


def _sd3(config: Config) -> Call:
    return _transformer(config, {"encoder_hidden_states": True, "pooled_projections": True})


def _transformer(config: Config, keys: Mapping[str, Any], **more: Any) -> Call:
    patch = config["patch_size"]
    return Call(
        sample="hidden_states",
        keys=keys,
        channels=config["in_channels"],
        patch=(patch, patch),
        size=_square(config),
        **more,
    )


def _flux(config: Config) -> Call:
    keys = {"encoder_hidden_states": True, "pooled_projections": True}
    if config.get("guidance_embeds"):
        keys[WEIGHT] = True
    return Call(
        sample="hidden_states",
        keys=keys,
        channels=config["in_channels"] // 4,
        patch=(2, 2),
        unit=1e-3,
        inputs=_flux_ids,
        packed=pack,
        output=unpack,
    )


def pack(x: Tensor) -> Tensor:
    """Latents ``[B, C, H, W]`` as tokens of 2 x 2 pixels, ``[B, H W / 4, 4 C]``."""
    B, C, H, W = x.shape
    cut = x.reshape(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(B, H * W // 4, 4 * C)


def unpack(tokens: Tensor, x: Tensor) -> Tensor:
    """The inverse of `pack`, of the sizes of x."""
    B, C, H, W = x.shape
    return tokens.reshape(B, H // 2, W // 2, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def _flux_ids(x: Tensor, cond: Inputs) -> Inputs:
    """Row and column of each token of the image; those of the text are at zero."""
    rows, columns = (
        torch.arange(n // 2, dtype=torch.float32, device=x.device) for n in x.shape[2:]
    )
    grid = torch.meshgrid(rows, columns, indexing="ij")
    image = torch.stack([torch.zeros_like(grid[0]), *grid], dim=-1).reshape(-1, 3)
    text = image.new_zeros(cond["encoder_hidden_states"].shape[1], 3)
    return {**cond, "img_ids": image, "txt_ids": text}


def _sana(config: Config) -> Call:
    keys: dict[str, Any] = {"encoder_hidden_states": True, "encoder_attention_mask": False}
    more: dict[str, Any] = {}
    if config.get("guidance_embeds"):
        keys[WEIGHT] = True
        more["inputs"] = partial(_scaled_guidance, scale=config["guidance_embeds_scale"])
    return _transformer(config, keys, unit=config.get("timestep_scale", 1.0), **more)


def _scaled_guidance(x: Tensor, cond: Inputs, *, scale: float) -> Inputs:
    return {**cond, WEIGHT: scale * cond[WEIGHT]}


def _wan(config: Config) -> Call:
    keys = {"encoder_hidden_states": True}
    if config.get("image_dim"):
        keys["encoder_hidden_states_image"] = True
    return Call(
        sample="hidden_states",
        keys=keys,
        channels=config["in_channels"],
        patch=tuple(config["patch_size"]),
    )


FAMILIES: dict[str, Callable[[Config], Call]] = {
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _unet_condition,
    "PixArtTransformer2DModel": _pixart,
    "DiTTransformer2DModel": _dit,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "SanaTransformer2DModel": _sana,
    "WanTransformer3DModel": _wan,
}
"""By the name of the class, which a config.json gives as `_class_name`."""
