"""What ``fastcm encode`` writes: rows of latents and of conditions, into a folder of shards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastcm.adapters.autoencoders import Autoencoder
from fastcm.adapters.text_encoders import TextEncoder
from fastcm.cli.filled import Filled, left_over
from fastcm.data import load
from fastcm.data.datasets import Dataset
from fastcm.data.images import holds_images, image_files, labels_of, read_image
from fastcm.data.latents import LOG_VARIANCE, NULL, sampled
from fastcm.data.writing import write_index
from fastcm.progress import Progress
from fastcm.rng import NoiseKey
from fastcm.runs.checkpoint import digest
from fastcm.runs.files import WRITING, write_tensors
from fastcm.training.interrupt import StopSignals


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
        root: the folder of the files.
    """

    shape: tuple[int, ...]
    name: str
    files: tuple[Path, ...] = ()
    data: Dataset | None = None
    labels: tuple[int, ...] | None = None
    size: int | None = None
    root: Path | None = None

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
        return Images(
            tuple(first.shape), root.name, tuple(files), labels=held, size=size, root=root
        )
    data = load(spec)
    if not isinstance(data, Dataset) or data.x.ndim != 4 or data.paired:
        raise ValueError(f"--images must be images [N, C, H, W], got {spec}")
    labels = None if data.labels is None else data.labels.tolist()
    held = None if labels is None else tuple(labels)
    return Images(tuple(data.x.shape[1:]), spec, data=data, labels=held)


class Part(Protocol):
    """What goes into each shard."""

    def check(self) -> None:
        """Raise ValueError for what can be told to fail, before anything is written."""
        ...

    def arrays(self, rows: range) -> dict[str, Tensor]:
        """Arrays of the rows of a shard, by name."""
        ...


@dataclass(frozen=True)
class Latents:
    """Latents of images, and their classes.

    Args:
        model: the autoencoder.
        source: of the images.
        batch: images encoded at once, from the first of a shard on.
        seed: of samples; None keeps the moments.
        labelled: whether classes are kept.
    """

    model: Autoencoder
    source: Images
    batch: int
    seed: int | None
    labelled: bool = True

    def check(self) -> None:
        self.model.latent_shape(self.source.shape)

    def arrays(self, rows: range) -> dict[str, Tensor]:
        means: list[Tensor] = []
        variances: list[Tensor] = []
        for start in range(rows.start, rows.stop, self.batch):
            part = range(start, min(start + self.batch, rows.stop))
            mean, log_variance = self.model.moments(self.source.read(part))
            if self.seed is not None and log_variance is not None:
                key = NoiseKey(self.seed, device=mean.device)
                mean, log_variance = sampled(mean, log_variance, key, first_sample=start), None
            means.append(mean.cpu().half())
            variances += [] if log_variance is None else [log_variance.cpu().half()]
        arrays = {"x": torch.cat(means)}
        if not arrays["x"].isfinite().all():
            raise ValueError(
                f"images {rows.start}..{rows.stop - 1} have latents that are no float16 numbers: "
                "try --precision fp32, or --scaling"
            )
        if variances:
            arrays[LOG_VARIANCE] = torch.cat(variances)
        if self.labelled and self.source.labels is not None:
            arrays["labels"] = torch.tensor(self.source.labels[rows.start : rows.stop])
        return arrays


@dataclass(frozen=True)
class Prompts:
    """Conditions of prompts.

    Args:
        encoder: of the pipeline.
        texts: of all rows.
        batch: prompts encoded at once, from the first of a shard on.
    """

    encoder: TextEncoder
    texts: tuple[str, ...]
    batch: int

    def check(self) -> None:
        if not self.texts:
            raise ValueError("there are no prompts to encode")

    def arrays(self, rows: range) -> dict[str, Tensor]:
        starts = range(rows.start, rows.stop, self.batch)
        parts = [self.texts[i : min(i + self.batch, rows.stop)] for i in starts]
        found = [self.encoder.encode(part) for part in parts]
        return {name: torch.cat([held[name] for held in found]) for name in found[0]}


def captions(source: Images) -> tuple[str, ...]:
    """The texts beside images: ``photo.txt`` beside ``photo.png``, or ``metadata.jsonl``.

    Raises:
        ValueError: images without a caption, or that are in no folder.
    """
    if not source.files or source.root is None:
        raise ValueError("captions lie beside images: --images must be a folder of files")
    listed: dict[Path, str] = {}
    for file in source.root.rglob("metadata.jsonl"):
        for line in filter(str.strip, file.read_text(encoding="utf-8").splitlines()):
            entry = json.loads(line)
            listed[file.parent / entry["file_name"]] = str(entry["text"])
    found, without = [], []
    for image in source.files:
        text = image.with_suffix(".txt")
        if image in listed:
            found.append(listed[image])
        elif text.is_file():
            found.append(text.read_text(encoding="utf-8").strip())
        else:
            without.append(image)
    if without:
        raise ValueError(
            f"{len(without)} images have no caption, such as {without[0]}: write it to "
            f"{without[0].with_suffix('.txt').name}, or into metadata.jsonl as file_name and text"
        )
    return tuple(found)


@dataclass(frozen=True)
class Encoding:
    """Rows into a folder of shards, each of the same bytes whoever writes it.

    Args:
        parts: what goes into each shard.
        count: of all rows.
        folder: with the setting.
        rows: of a shard.
        null: what stands for no condition, by name; written beside the shards.
    """

    parts: tuple[Part, ...]
    count: int
    folder: Filled
    rows: int
    null: dict[str, Tensor] | None = None

    def fill(self, mine: range) -> tuple[int, Any]:
        """Write what is missing of a range of rows: how many, and the signal that ended it.

        Raises:
            ValueError: images that the model does not take; a folder of another setting.
        """
        for part in self.parts:
            part.check()
        self.folder.check()
        drawn = 0
        with StopSignals() as stop, Progress("encoding", len(mine)) as bar:
            for rows in self.shards(mine):
                if stop.received is not None:
                    break
                if not self.path(rows).exists():
                    arrays = {k: v for part in self.parts for k, v in part.arrays(rows).items()}
                    self._claim()  # not before: what is refused leaves no folder
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
        """The rows of each shard, of all or of a part of them."""
        mine = range(self.count) if mine is None else mine
        return (
            range(start, min(start + self.rows, mine.stop))
            for start in range(mine.start, mine.stop, self.rows)
        )

    def path(self, rows: range) -> Path:
        return self.folder.path / f"shard_{rows.start // self.rows:06d}.safetensors"

    def there(self, mine: range) -> int:
        """How many rows of a range are encoded."""
        return sum(len(rows) for rows in self.shards(mine) if self.path(rows).exists())

    def complete(self) -> bool:
        """Whether all shards are there."""
        return self.count > 0 and self.there(range(self.count)) == self.count

    def _claim(self) -> None:
        self.folder.claim()
        if self.null is not None and not (self.folder.path / NULL).exists():
            self._write(self.folder.path / NULL, self.null)

    def _write(self, path: Path, arrays: dict[str, Tensor]) -> None:
        temporary = path.with_name(f"{WRITING}{path.name}-{os.getpid()}")
        try:
            write_tensors(temporary, arrays)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
