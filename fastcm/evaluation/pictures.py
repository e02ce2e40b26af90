"""Pictures of samples: grids as PNG, and labelled rows for comparison."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcm.runs.checkpoint import replace_file


def to_uint8(x: Tensor) -> Tensor:
    """Images in -1..1 (clamped), or uint8 already, as uint8 on the CPU."""
    if x.dtype == torch.uint8:
        return x.cpu()
    return ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def tile(x: Tensor, columns: int | None = None, *, pad: int = 1) -> Tensor:
    """Images ``[N, C, H, W]`` as one, ``[C, rows (H + pad) + pad, columns (W + pad) + pad]``.

    Raises:
        ValueError: x is not a non-empty set of images of 1, 3 or 4 channels.
    """
    if x.dim() != 4 or x.shape[1] not in (1, 3, 4) or len(x) == 0:
        raise ValueError(f"images must be [N, 1 | 3 | 4, H, W] with N > 0, got {list(x.shape)}")
    x = to_uint8(x)
    n, channels, height, width = x.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    out = torch.zeros(channels, rows * (height + pad) + pad, columns * (width + pad) + pad).byte()
    for i in range(n):
        top = pad + i // columns * (height + pad)
        left = pad + i % columns * (width + pad)
        out[:, top : top + height, left : left + width] = x[i]
    return out


def png(picture: Tensor) -> bytes:
    """A picture, uint8 ``[1 | 3 | 4, H, W]`` on the CPU, as the bytes of a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).squeeze(-1).numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def save_grid(
    x: Tensor, path: str | Path, *, columns: int | None = None, enlarge: int | None = None
) -> Path:
    """Write images ``[N, C, H, W]`` as one PNG.

    Args:
        x: in -1..1 or uint8.
        path: of the PNG; its folder must exist.
        columns: default a square.
        enlarge: integer factor without smoothing; default so that an image has about 32 pixels.
    """
    factor = enlarge or max(1, 32 // x.shape[-1])
    picture = tile(x, columns).repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    path = Path(path)
    replace_file(path, png(picture))
    return path


def save_rows(rows: Mapping[str, Tensor], path: str | Path, *, columns: int = 16) -> Path:
    """Write one labelled row of images per entry, the first `columns` of each, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.78 * len(rows)))
    axes = figure.subplots(len(rows), 1, squeeze=False)
    for axis, (label, x) in zip(axes[:, 0], rows.items()):
        picture = tile(x[:columns], columns).permute(1, 2, 0).squeeze(-1).numpy()
        axis.imshow(picture, cmap="gray", interpolation="nearest", vmin=0, vmax=255)
        axis.set_axis_off()
        axis.text(-0.01, 0.5, label, transform=axis.transAxes, ha="right", va="center", fontsize=11)
    figure.subplots_adjust(left=0.2, right=0.99, top=0.98, bottom=0.02, hspace=0.08)
    return save_figure(figure, path)


def save_figure(figure: Any, path: str | Path, *, colours: int | None = None) -> Path:
    """Write a `matplotlib.figure.Figure` as a PNG of 150 pixels per inch.

    Made without pyplot, a figure needs no display and leaves the user's backend alone.

    Args:
        figure: the figure.
        path: of the PNG; its folder must exist.
        colours: of a palette, which makes the file of a chart several times smaller.
    """
    from PIL import Image

    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    image = Image.open(drawn).convert("RGB")
    if colours is not None:
        image = image.quantize(colours, dither=Image.Dither.NONE)
    image.save(buffer, format="PNG", optimize=True)
    path = Path(path)
    replace_file(path, buffer.getvalue())
    return path
