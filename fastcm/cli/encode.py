"""The command ``fastcm encode``: images as latents, in shards to train on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from fastcm.adapters.autoencoders import Autoencoder
from fastcm.adapters.autoencoders import load as load_autoencoder
from fastcm.cli.filled import Filled, left_over, share
from fastcm.data import load
from fastcm.data.datasets import Dataset
from fastcm.data.images import holds_images, image_files, labels_of, read_image
from fastcm.data.latents import ENCODED, LOG_VARIANCE, sampled
from fastcm.data.writing import write_index
from fastcm.progress import Progress
from fastcm.rng import NoiseKey, check_key
from fastcm.runs.checkpoint import digest
from fastcm.runs.files import WRITING, write_tensors
from fastcm.training.interrupt import StopSignals
from fastcm.training.parallel import launched, local_device


def encode(
    images: Annotated[
        str, typer.Option(help='folder of images, .npy, .npz, "digits" or "photographs"')
    ],
    vae: Annotated[Path, typer.Option(help="folder of an autoencoder or pipeline of diffusers")],
    out: Annotated[Path, typer.Option(help="folder for the shards")],
    size: Annotated[int | None, typer.Option(help="crop images to squares of this side")] = None,
    sample: Annotated[
        bool, typer.Option(help="keep one sample of each latent instead of its moments")
    ] = False,
    scaling: Annotated[
        float | None, typer.Option(help="of the latents, where the config does not say it")
    ] = None,
    rows: Annotated[int, typer.Option(help="images in a shard")] = 1024,
    batch: Annotated[int, typer.Option(help="images encoded at once")] = 16,
    seed: Annotated[int, typer.Option(help="of the samples")] = 0,
    precision: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    part: Annotated[
        str, typer.Option(help="I/N: the shards of process I of N, counted from 0")
    ] = "0/1",
) -> None:
    """Encode images by a pretrained autoencoder, once, to train on their latents.

    Shards hold float16 means and log-variances, of which a training draws each latent anew, and the
    classes of sub-folders. The folder is filled shard by shard: the same command continues where
    it was stopped, and processes with parts of their own work on it side by side. Those of
    torchrun divide it among them.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"--precision must be fp32 or bf16, got {precision!r}")
    for name, number in (("--rows", rows), ("--batch", batch)):
        if number < 1:
            raise ValueError(f"{name} must be >= 1, got {number}")
    check_key(seed)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = load_autoencoder(vae, scaling=scaling, device=local_device(), dtype=dtype)
    source = images_of(images, size, model.channels)
    settings = {
        "latents": model.record,
        "images": source.describe(),
        "sampled": seed if sample else None,
        "precision": precision,
        "rows": rows,
        "batch": batch,
    }
    settings = json.loads(json.dumps(settings))
    folder = Filled(out, settings, ENCODED, (".safetensors", ".npz", ".tar"), "latents")
    rank, count = part_of(part)
    mine = share(range(len(source)), rows, rank, count)
    work = Encoding(model, source, folder, rows, batch, seed if sample else None)
    drawn, stopped = work.fill(mine)
    print(f"{out}: {drawn} encoded, {work.there(mine)} of this process's {len(mine)} are there")
    if stopped is not None:
        print(f"{out}: stopped by {stopped.name}: the same command goes on")
        raise typer.Exit(128 + stopped)
    if work.complete():
        shape = model.latent_shape(source.shape)
        print(f"{len(source)} latents of {list(shape)} in {out}: train with --data {out}")


def part_of(text: str) -> tuple[int, int]:
    """The value of --part, or what torchrun says: (I, N)."""
    rank, _, count = text.partition("/")
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        raise ValueError(f"--part must be I/N with 0 <= I < N, got {text!r}")
    here = launched()
    if here[1] > 1 and text != "0/1":
        raise ValueError("--part is for processes that torchrun does not start: leave it out")
    return here if here[1] > 1 else (int(rank), int(count))


@dataclass(frozen=True)
class Images:
    """Images of one size, in memory or in files.

    Args:
        shape: of each, ``[C, H, W]``.
        name: of the folder or data set.
        files: in their order, or none.
        data: in memory, where there are no files.
        labels: of each, or None.
        size: to which files are cropped.
    """

    shape: tuple[int, ...]
    name: str
    files: tuple[Path, ...] = ()
    data: Dataset | None = None
    labels: tuple[int, ...] | None = None
    size: int | None = None

    def __len__(self) -> int:
        return len(self.files) if self.data is None else len(self.data)

    def describe(self) -> dict[str, Any]:
        """JSON-able: what the latents are of."""
        if self.data is not None:
            return {"name": self.name, "pixels": digest({"x": self.data.x})}
        listed = "\n".join(f"{file.name} {file.stat().st_size}" for file in self.files)
        names = torch.frombuffer(bytearray(listed.encode()), dtype=torch.uint8)
        return {"files": len(self.files), "names": digest({"names": names}), "size": self.size}

    def read(self, rows: range) -> Tensor:
        """uint8 or floating ``[n, C, H, W]``.

        Raises:
            ValueError: a file that cannot be read, or of another size, by its name.
        """
        if self.data is not None:
            return self.data.x[rows.start : rows.stop]
        return torch.stack([self._one(self.files[i]) for i in rows])

    def _one(self, file: Path) -> Tensor:
        try:
            image = read_image(file, self.size, self.shape[0])
        except Exception as error:  # decoders raise many kinds on damaged files
            raise ValueError(f"{file} cannot be read, remove or mend it: {error}") from error
        if image.shape != self.shape:
            raise ValueError(
                f"images differ in size: {file} is {list(image.shape)}, the first is "
                f"{list(self.shape)}; --size crops them"
            )
        return image


def images_of(spec: str, size: int | None, channels: int) -> Images:
    """The images that --images names.

    Raises:
        FileNotFoundError, ValueError: there are none, or they are no images of as many channels.
    """
    root = Path(spec)
    if root.is_dir() and holds_images(root):
        files = image_files(root)
        first = read_image(files[0], size, channels)
        labels = labels_of(files, root)
        held = None if labels is None else tuple(labels)
        return Images(tuple(first.shape), root.name, tuple(files), labels=held, size=size)
    data = load(spec)
    if not isinstance(data, Dataset) or data.x.ndim != 4 or data.paired:
        raise ValueError(f"--images must be images [N, C, H, W], got {spec}")
    labels = None if data.labels is None else data.labels.tolist()
    held = None if labels is None else tuple(labels)
    return Images(tuple(data.x.shape[1:]), spec, data=data, labels=held)


@dataclass(frozen=True)
class Encoding:
    """Latents of images into a folder of shards, each of the same bytes whoever writes it.

    Args:
        model: the autoencoder.
        source: of the images.
        folder: with the setting.
        rows: of a shard.
        batch: images encoded at once, from the first of a shard on.
        seed: of samples; None keeps the moments.
    """

    model: Autoencoder
    source: Images
    folder: Filled
    rows: int
    batch: int
    seed: int | None

    def fill(self, mine: range) -> tuple[int, Any]:
        """Write what is missing of a range of images: how many, and the signal that ended it.

        Raises:
            ValueError: images that the model does not take; a folder of another setting.
        """
        self.model.latent_shape(self.source.shape)
        self.folder.check()
        drawn = 0
        with StopSignals() as stop, Progress("encoding", len(mine)) as bar:
            for rows in self.shards(mine):
                if stop.received is not None:
                    break
                if not self.path(rows).exists():
                    arrays = self._encoded(rows)
                    self.folder.claim()  # not before: what is refused leaves no folder
                    self._write(self.path(rows), arrays)
                    drawn += len(rows)
                bar.advance(len(rows))
        for name, path in left_over(self.folder.path):
            if any(name == self.path(rows).name for rows in self.shards(mine)):
                path.unlink(missing_ok=True)
        stopped = stop.received if self.there(mine) < len(mine) else None
        if stopped is None and self.complete():
            counts = {self.path(rows).name: len(rows) for rows in self.shards()}
            write_index(self.folder.path, counts)
        return drawn, stopped

    def shards(self, mine: range | None = None) -> Iterable[range]:
        """The images of each shard, of all or of a part of them."""
        mine = range(len(self.source)) if mine is None else mine
        return (
            range(start, min(start + self.rows, mine.stop))
            for start in range(mine.start, mine.stop, self.rows)
        )

    def path(self, rows: range) -> Path:
        return self.folder.path / f"shard_{rows.start // self.rows:06d}.safetensors"

    def there(self, mine: range) -> int:
        """How many images of a range are encoded."""
        return sum(len(rows) for rows in self.shards(mine) if self.path(rows).exists())

    def complete(self) -> bool:
        """Whether all shards are there."""
        return len(self.source) > 0 and self.there(range(len(self.source))) == len(self.source)

    def _encoded(self, rows: range) -> dict[str, Tensor]:
        means: list[Tensor] = []
        variances: list[Tensor] = []
        for start in range(rows.start, rows.stop, self.batch):
            part = range(start, min(start + self.batch, rows.stop))
            mean, log_variance = (
                None if m is None else m.cpu() for m in self.model.moments(self.source.read(part))
            )
            assert mean is not None
            if self.seed is not None and log_variance is not None:
                mean, log_variance = (
                    sampled(mean, log_variance, NoiseKey(self.seed), first_sample=start),
                    None,
                )
            means.append(mean.half())
            variances += [] if log_variance is None else [log_variance.half()]
        arrays = {"x": torch.cat(means)}
        if not arrays["x"].isfinite().all():
            raise ValueError(
                f"images {rows.start}..{rows.stop - 1} have latents that are no float16 numbers: "
                "try --precision fp32, or --scaling"
            )
        if variances:
            arrays[LOG_VARIANCE] = torch.cat(variances)
        if self.source.labels is not None:
            arrays["labels"] = torch.tensor(self.source.labels[rows.start : rows.stop])
        return arrays

    def _write(self, path: Path, arrays: dict[str, Tensor]) -> None:
        temporary = path.with_name(f"{WRITING}{path.name}-{os.getpid()}")
        try:
            write_tensors(temporary, arrays)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
