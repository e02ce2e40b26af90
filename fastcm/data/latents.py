"""Latents of images: what a folder of them says of itself, and how they are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fastcm import ops, rng
from fastcm.rng import NoiseKey
from fastcm.runs.files import read_state

ENCODED = "encoded.json"
"""In a folder of ``fastcm encode``: the setting that its shards were made by."""

NULL = "null.safetensors"
"""In a folder with conditions of prompts: what stands for no condition, of the same names."""

LOG_VARIANCE = "log_variance"
"""The array beside the mean ``x`` of each latent, where a folder holds moments."""


def latents_of(folder: Path) -> dict[str, Any] | None:
    """What made the latents in a folder, as the autoencoder records itself; None for other data.

    Raises:
        CheckpointError: the record cannot be read.
    """
    if not (folder / ENCODED).is_file():
        return None
    found = read_state(folder / ENCODED).get("latents")
    return found if isinstance(found, dict) else None


def sampled(mean: Tensor, log_variance: Tensor, key: NoiseKey, *, first_sample: int = 0) -> Tensor:
    """Latents of a mean and log-variance: mean + exp(log_variance / 2) z, a pure function of key.

    Args:
        mean, log_variance: ``[B, ...]`` of any float dtype, where the key is.
        key: seed and step; row i has the noise of sample ``first_sample + i``, of stream LATENT.

    Returns:
        float32 ``[B, ...]``.
    """
    z = ops.noise(mean.shape, key, stream=rng.LATENT, first_sample=first_sample)
    return mean.float() + (0.5 * log_variance.float()).exp() * z
