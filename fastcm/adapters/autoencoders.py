"""Autoencoders of diffusers: images to latents and back, in the scale that networks are trained on.

Latents here are normalised, (z - shift) scale by the numbers of the model's config: what pipelines
give their networks, and what `Trainer` and `Sampler` see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcm.adapters.loading import MODEL, library, read_json
from fastcm.runs.checkpoint import digest
from fastcm.runs.description import differences

CLASSES = ("AutoencoderKL", "AutoencoderDC")


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """An autoencoder of images, see `load`.

    Args:
        model: of diffusers, frozen and in eval mode.
        shift, scale: ``[C, 1, 1]``: a latent is (z - shift) scale of the model's own z.
        factor: pixels of an image to one of its latent, along each side.
        record: JSON-able: class, numbers and a fingerprint of the weights.
    """

    model: Any
    shift: Tensor
    scale: Tensor
    factor: int
    record: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return self.shift.device

    @property
    def channels(self) -> int:
        """Of images."""
        return int(self.model.config.in_channels)

    def latent_shape(self, image_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the latent of an image ``[C, H, W]``.

        Raises:
            ValueError: other channels than the model's, sides that `factor` does not divide.
        """
        c, h, w = image_shape
        if c != self.channels or h % self.factor or w % self.factor:
            raise ValueError(
                f"the autoencoder takes images of {self.channels} channels, with sides that are "
                f"multiples of {self.factor}, got {list(image_shape)}: size= crops them"
            )
        return len(self.shift), h // self.factor, w // self.factor

    def image_shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the image of a latent ``[C, H, W]``.

        Raises:
            ValueError: it is no shape of this model's latents.
        """
        if len(latent_shape) != 3 or latent_shape[0] != len(self.shift):
            raise ValueError(
                f"the autoencoder decodes latents of {len(self.shift)} channels [C, H, W], got "
                f"{list(latent_shape)}: it is not that of these latents"
            )
        _, h, w = latent_shape
        return self.channels, h * self.factor, w * self.factor

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance of the latents of images.

        Args:
            images: ``[B, C, H, W]``, uint8 or floating in [-1, 1].

        Returns:
            float32 ``[B, c, h, w]`` each, normalised; None for a model without variance.

        Raises:
            ValueError: images of a shape that the model does not take.
        """
        self.latent_shape(images.shape[1:])
        x = images.to(self.device)
        x = x.float() / 127.5 - 1.0 if x.dtype == torch.uint8 else x
        out = self.model.encode(x.to(self.model.dtype))
        if not hasattr(out, "latent_dist"):
            return self._normalised(out.latent), None
        normal = out.latent_dist
        return self._normalised(normal.mean), normal.logvar.float() + 2.0 * self.scale.log()

    def decode(self, latents: Tensor, *, tile: int | None = None) -> Tensor:
        """Images of latents.

        Args:
            latents: ``[B, c, h, w]``, normalised.
            tile: side, in pixels, of the tiles in which large images are decoded, to save memory;
                neighbours overlap by a quarter and are blended, by the model of diffusers.

        Returns:
            float32 ``[B, C, H, W]``, about -1..1, on the model's device.

        Raises:
            ValueError: latents of another shape; a tile that is no multiple of 4 `factor`.
        """
        self.image_shape(latents.shape[1:])
        if tile is not None and (tile < 1 or tile % (4 * self.factor)):
            raise ValueError(f"tile must be a multiple of {4 * self.factor}, got {tile}")
        z = latents.to(self.device).float() / self.scale + self.shift
        with torch.no_grad():
            _tiled(self.model, tile, self.factor)
            x: Tensor = self.model.decode(z.to(self.model.dtype), return_dict=False)[0]
        return x.float()

    def check(self, record: Mapping[str, Any] | None) -> None:
        """Raise ValueError unless the latents of a data set or run were made by this model."""
        changed = [] if record is None else differences(dict(record), self.record)
        if changed:
            raise ValueError(
                f"the autoencoder is not that of the latents: {'; '.join(changed)}: give the one "
                "that encoded them"
            )

    def _normalised(self, z: Tensor) -> Tensor:
        return (z.float() - self.shift) * self.scale


def load(
    path: str | Path,
    *,
    scaling: float | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Autoencoder:
    """The autoencoder in a folder of diffusers.

    Args:
        path: the folder of the model, or of a pipeline with one in ``vae/``.
        scaling: factor of the latents, where the config does not say it.
        device: default the CPU.
        dtype: of the weights and of what is computed.

    Returns:
        Of `AutoencoderKL` (Stable Diffusion, SDXL, SD3, Flux) or `AutoencoderDC` (Sana).

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: a model of another class; no scaling_factor in the config.
        ImportError: diffusers is missing.
    """
    folder = Path(path) / "vae" if (Path(path) / "vae").is_dir() else Path(path)
    if not (folder / MODEL).is_file():
        raise FileNotFoundError(f"{folder} has no {MODEL}: give the folder of an autoencoder")
    config = read_json(folder / MODEL)
    name = config.get("_class_name")
    if name not in CLASSES:
        raise ValueError(
            f"{folder} holds {name}, and latents of images are made by {', '.join(CLASSES)}"
        )
    if scaling is None and "scaling_factor" not in config:
        raise ValueError(f"{folder}/config.json has no scaling_factor: give scaling=")
    kind: Any = getattr(library(), name)
    options = {"torch_dtype": dtype, "use_safetensors": True, "local_files_only": True}
    model: Any = kind.from_pretrained(folder, **options)
    model = model.eval().requires_grad_(False).to(device or "cpu")
    scaling = float(config["scaling_factor"] if scaling is None else scaling)
    channels = int(model.config.latent_channels)
    shift, scale = _numbers(config, channels, scaling)
    record = {
        "autoencoder": name,
        "scaling": scaling,
        "shift": shift,
        "scale": scale,
        "weights": digest(model.state_dict()),
    }
    rows = [
        torch.tensor(values, dtype=torch.float32, device=device or "cpu").view(-1, 1, 1)
        for values in (shift, scale)
    ]
    return Autoencoder(model, rows[0], rows[1], _factor(model, name), record)


def _numbers(
    config: Mapping[str, Any], channels: int, scaling: float
) -> tuple[list[float], list[float]]:
    """Shift and scale of each channel."""
    means, stds = config.get("latents_mean"), config.get("latents_std")
    if means is not None and stds is not None:
        return [float(m) for m in means], [scaling / float(s) for s in stds]
    return [float(config.get("shift_factor") or 0.0)] * channels, [scaling] * channels


def _factor(model: Any, name: str) -> int:
    if name == "AutoencoderDC":
        return int(model.spatial_compression_ratio)
    return int(2 ** (len(model.config.block_out_channels) - 1))


def _tiled(model: Any, tile: int | None, factor: int) -> None:
    """Have a model decode in tiles, or as a whole."""
    if tile is None:
        model.use_tiling = False
        return
    if hasattr(model, "tile_latent_min_size"):
        model.use_tiling = True
        model.tile_sample_min_size, model.tile_latent_min_size = tile, tile // factor
        model.tile_overlap_factor = 0.25
        return
    stride = tile - tile // 4
    model.enable_tiling(tile, tile, stride, stride)
