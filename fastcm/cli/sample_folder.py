"""Samples into a folder, batch by batch: resumable, by several processes side by side.

FOLDER/samples.json              what defines the samples: one setting a folder
FOLDER/000123.png                format "png": one file a sample, by its index
FOLDER/000512-001023.npz         format "npz": one file a batch, by its first and last index
"""

from __future__ import annotations

import io
import json
import os
import signal
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcm.adapters.autoencoders import Autoencoder
from fastcm.cli.filled import Filled, left_over
from fastcm.cli.runs import condition, labels
from fastcm.data.loading import PAIRS, SETTINGS, indices_of
from fastcm.evaluation import pictures
from fastcm.networks.conditions import named
from fastcm.progress import Progress
from fastcm.rng import check_key
from fastcm.runs.checkpoint import digest
from fastcm.runs.files import replace_file
from fastcm.sampling import Sampler
from fastcm.training.interrupt import StopSignals
from fastcm.training.processes import Processes

FORMATS = ("png", "npz", PAIRS)
_END = 2**32  # of the indices
_WRITERS = 8  # a small file costs waiting for the disk, not work


@dataclass(frozen=True)
class Decoder:
    """What makes images of samples that are latents.

    Args:
        autoencoder: of the latents.
        tile: see `fastcm.adapters.autoencoders.Autoencoder.decode`.
        batch: latents decoded at once.
    """

    autoencoder: Autoencoder
    tile: int | None = None
    batch: int = 8

    @property
    def record(self) -> dict[str, Any]:
        return {**self.autoencoder.record, "tile": self.tile, "batch": self.batch}

    def shape(self, latent: tuple[int, ...]) -> tuple[int, ...]:
        """Of an image; ValueError if it is no latent of this autoencoder."""
        return self.autoencoder.image_shape(latent)

    def __call__(self, x: Tensor) -> Tensor:
        parts = (
            self.autoencoder.decode(z, tile=self.tile).cpu() for z in torch.split(x, self.batch)
        )
        return torch.cat(list(parts))


@dataclass(frozen=True)
class Drawn:
    """What a call of `sample_folder` did.

    Args:
        drawn: samples of the range that were computed and written.
        present: samples of the range that were there before.
        seconds: that it took, without the checks of arguments.
        interrupted: the signal that ended it early, or None.
    """

    drawn: int = 0
    present: int = 0
    seconds: float = 0.0
    interrupted: signal.Signals | None = None


def sample_folder(
    sampler: Sampler,
    folder: str | Path,
    n: int,
    *,
    first: int = 0,
    seed: int = 0,
    label: int | None = None,
    cond: Any = None,
    guidance: float | list[float] | None = None,
    format: str | None = None,
    source: Mapping[str, Any] | None = None,
    decoder: Decoder | None = None,
    together: Processes | None = None,
) -> Drawn:
    """Draw samples first .. first + n - 1 into a folder, except those that are there already.

    Whole batches are computed, from one multiple of the sampler's `batch_size` to the next, and
    what the range needs of them is written: a sample does not depend on how the work was divided
    or interrupted. One batch is held at a time. Any number of processes may draw ranges that do
    not overlap. The first SIGTERM or SIGINT ends the call after the batch.

    Args:
        sampler: of a known `shape`; if its network has classes, sample i has label i % classes.
        folder: created when the first batch is drawn.
        n: how many; 0 writes nothing.
        first: index of the first, >= 0; first + n <= 2**32.
        seed: of the noise.
        label: the class of all samples, instead of all classes in turn.
        cond: rows of the condition that the samples have in turn, instead of labels.
        guidance: weight of guidance, or one per time, or None.
        format: "png" (the default of images ``[1 | 3 | 4, H, W]``) or "npz": ``arr_0`` of images
            uint8 ``[b, H, W, C]``, of other samples float32 ``[b, ...]``; with labels ``arr_1``,
            int64 ``[b]``. "pairs": samples float32 ``x``, with ``labels``, whose noise follows
            from the seed and their indices; see `fastcm.data.pairs`.
        source: what else defines the samples; JSON-able, recorded and compared.
        decoder: makes images of samples that are latents.
        together: processes that share the sampler's network and call this at once, each with a
            range of its own: they compute as many batches, and stop after the same one.

    Raises:
        ValueError: an argument out of its range; the folder has samples of another setting.
        OSError: the folder cannot be written to; the files in it stay valid.
    """
    check_range(n, first)
    check_key(seed)
    if sampler.shape is None:
        raise ValueError("the sampler must know the shape of a sample: Sampler(shape=...)")
    labels(sampler, 0, label, cond=cond)
    shape = sampler.shape if decoder is None else decoder.shape(sampler.shape)
    format = _format(format, shape)
    settings = {
        **(source or {}),
        "weights": digest(sampler.net.state_dict()),
        "seed": seed,
        "times": list(sampler.times),
        "method": sampler.method,
        "solver": sampler.solver,
        "guidance": guidance,
        "label": label,
        "format": format,
        "shape": list(shape),
        "batch_size": sampler.batch_size,
    }
    if cond is not None:
        settings["cond"] = digest(dict(named(cond)))
    if decoder is not None:
        settings["decoder"] = decoder.record
    if sampler.churn is not None:
        settings["churn"] = str(sampler.churn)
    if sampler.guidance_rescale is not None:
        settings["guidance_rescale"] = sampler.guidance_rescale
    if sampler.guide is not None:
        settings["guide"] = digest(sampler.guide.state_dict())
    together = together or Processes()
    if n == 0 and not together.joined:
        return Drawn()
    settings = json.loads(json.dumps(settings))
    out = _Folder(Path(folder), settings, SETTINGS, (".png", ".npz"), "samples")
    out.check()

    def computed(batch: range) -> tuple[Tensor, Any]:
        held = labels(sampler, len(batch), label, first=batch.start, cond=cond)
        options = condition(sampler, held, guidance, len(batch))
        x = sampler(len(batch), seed=seed, first_sample=batch.start, **options)
        return (x if decoder is None else decoder(x)).cpu(), held

    def draw(batch: range, parts: list[range]) -> None:
        x, held = computed(batch)
        x = pictures.to_uint8(x) if format != PAIRS and _is_image(x.shape[1:]) else x
        out.claim()  # not before: what the sampler refuses leaves no folder
        list(pool.map(lambda part: out.save(part, batch, x, held), parts))

    drawn = present = 0
    interrupted: signal.Signals | None = None
    begin, size = time.perf_counter(), sampler.batch_size
    starts = range(first - first % size, first + n, size)
    with (
        StopSignals() as stop,
        Progress("sampling", n) as bar,
        ThreadPoolExecutor(_WRITERS) as pool,
    ):
        for k in range(max(together.exchange(len(starts)))):
            start = starts.start + k * size
            wanted = range(max(start, first), min(start + size, first + n))
            parts = out.missing(wanted) if wanted else []
            said = together.exchange((bool(parts), stop.received))
            interrupted = next((number for _, number in said if number is not None), None)
            if interrupted is not None:
                break
            if parts:
                draw(range(start, min(start + size, _END)), parts)
            elif any(busy for busy, _ in said):
                computed(range(1))  # of the network each has a part
            count = sum(map(len, parts))
            drawn, present = drawn + count, present + len(wanted) - count
            bar.advance(len(wanted))
    out.clear(range(first, first + n))
    return Drawn(drawn, present, time.perf_counter() - begin, interrupted)


def check_range(n: int, first: int) -> None:
    """Raise ValueError unless samples first .. first + n - 1 exist."""
    if n < 0:
        raise ValueError(f"n must be >= 0, got {n}")
    if first < 0 or first + n > _END:
        raise ValueError(
            f"first must be >= 0 and first + n at most 2**32, got first={first}, n={n}"
        )


def _is_image(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and shape[0] in (1, 3, 4)


def _format(format: str | None, shape: tuple[int, ...]) -> str:
    if format is None:
        return "png" if _is_image(shape) else "npz"
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "png" and not _is_image(shape):
        raise ValueError(f"png holds images [1 | 3 | 4, H, W], samples are {list(shape)}: use npz")
    return format


class _Folder(Filled):
    """Files of samples, each named by the indices that it holds."""

    @property
    def format(self) -> str:
        return str(self.settings["format"])

    def missing(self, wanted: range) -> list[range]:
        """The indices that are in no file, a range for each file to write."""
        if self.format == "png":
            files = (range(i, i + 1) for i in wanted)
            return [file for file in files if not (self.path / self.name(file)).exists()]
        gaps, at = [], wanted.start
        for shard in self._shards():
            if shard.stop > at and shard.start < wanted.stop:
                gaps.append(range(at, shard.start))
                at = shard.stop
        gaps.append(range(at, wanted.stop))
        return [gap for gap in gaps if gap]

    def _shards(self) -> list[range]:
        names = os.listdir(self.path) if self.path.exists() else []
        shards = sorted(filter(None, map(indices_of, names)), key=lambda shard: shard.start)
        for a, b in pairwise(shards):
            if b.start < a.stop:
                raise ValueError(
                    f"{self.name(a)} and {self.name(b)} in {self.path} hold the same samples, as "
                    "if processes had drawn overlapping ranges: remove one of them"
                )
        return shards

    def name(self, part: range) -> str:
        if self.format == "png":
            return f"{part.start:06d}.png"
        return f"{part.start:06d}-{part.stop - 1:06d}.npz"

    def save(self, part: range, batch: range, x: Tensor, cond: Any) -> None:
        """Write the file of a part of a batch, with its labels if the condition is these."""
        cond = cond if isinstance(cond, Tensor) and cond.dtype == torch.int64 else None
        rows = slice(part.start - batch.start, part.stop - batch.start)
        x = x[rows]
        if self.format == "png":
            data = pictures.png(x[0])
        elif self.format == PAIRS:
            buffer = io.BytesIO()
            if cond is None:
                np.savez(buffer, x=x.numpy())
            else:
                np.savez(buffer, x=x.numpy(), labels=cond[rows].numpy())
            data = buffer.getvalue()
        else:
            arrays = [x.permute(0, 2, 3, 1).contiguous() if x.dtype == torch.uint8 else x]
            arrays += [] if cond is None else [cond[rows]]
            buffer = io.BytesIO()
            np.savez(buffer, *(array.numpy() for array in arrays))
            data = buffer.getvalue()
        replace_file(self.path / self.name(part), data)

    def clear(self, wanted: range) -> None:
        """Remove what killed processes left of files in a range; in others somebody may write."""
        for name, path in left_over(self.path):
            held = indices_of(name)
            ours = held is not None and held.start < wanted.stop and held.stop > wanted.start
            if ours or name == SETTINGS:
                path.unlink(missing_ok=True)
