"""Autoencoders of diffusers' real classes with tiny random weights, in folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def kl(**more: Any) -> Any:
    """As of Stable Diffusion 3: a factor and a shift; sides shrink by 2."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=8,
        **{"scaling_factor": 1.5, "shift_factor": 0.25, **more},
    )


def dc() -> Any:
    """As of Sana: without variance; sides shrink by 2."""
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(4, 8),
        decoder_block_out_channels=(4, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.4,
    )


MAKES = {"AutoencoderKL": kl, "AutoencoderDC": dc}


def saved(model: Any, folder: Path, **changes: Any) -> Path:
    """The model in a folder; entries of its config that are None are left out."""
    model.save_pretrained(folder)
    if changes:
        path = folder / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder
