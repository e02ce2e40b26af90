"""The command ``fastcm encode``: images and prompts as what networks are trained on, in shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fastcm.adapters.autoencoders import load as load_autoencoder
from fastcm.adapters.text_encoders import load as load_text_encoder
from fastcm.cli.encode_folder import Encoding, Latents, Part, Prompts, captions, images_of
from fastcm.cli.filled import Filled, share
from fastcm.data.latents import ENCODED
from fastcm.rng import check_key
from fastcm.runs.checkpoint import digest
from fastcm.training.parallel import launched, local_device


def encode(
    out: Annotated[Path, typer.Option(help="folder for the shards")],
    images: Annotated[
        str | None, typer.Option(help='folder of images, .npy, .npz, "digits" or "photographs"')
    ] = None,
    vae: Annotated[
        Path | None, typer.Option(help="folder of an autoencoder or pipeline of diffusers")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="text file, a prompt a line; beside --images: captions")
    ] = None,
    text_encoder: Annotated[
        Path | None, typer.Option(help="folder of a pipeline of diffusers, which encodes prompts")
    ] = None,
    size: Annotated[int | None, typer.Option(help="crop images to squares of this side")] = None,
    sample: Annotated[
        bool, typer.Option(help="keep one sample of each latent instead of its moments")
    ] = False,
    scaling: Annotated[
        float | None, typer.Option(help="of the latents, where the config does not say it")
    ] = None,
    rows: Annotated[int, typer.Option(help="in a shard")] = 1024,
    batch: Annotated[int, typer.Option(help="rows encoded at once")] = 16,
    seed: Annotated[int, typer.Option(help="of the samples")] = 0,
    precision: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    part: Annotated[
        str, typer.Option(help="I/N: the shards of process I of N, counted from 0")
    ] = "0/1",
) -> None:
    """Encode images and prompts by pretrained models, once, to train on what they make.

    Shards hold float16 means and log-variances of latents, of which a training draws each anew,
    with the classes of sub-folders; of images with captions the conditions of a text model
    instead, and of prompts alone these. The folder is filled shard by shard: the same command
    continues where it was stopped, and processes with parts of their own work on it side by side.
    Those of torchrun divide it among them.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"--precision must be fp32 or bf16, got {precision!r}")
    for name, number in (("--rows", rows), ("--batch", batch)):
        if number < 1:
            raise ValueError(f"{name} must be >= 1, got {number}")
    check_key(seed)
    if (images is None) != (vae is None):
        raise ValueError("--images and --vae go together: what is encoded, and by what")
    if text_encoder is None and (images is None or prompts is not None):
        raise ValueError("give --images with --vae, --prompts with --text-encoder, or all of these")
    if text_encoder is not None and (images is None) == (prompts is None):
        raise ValueError(
            "--text-encoder encodes --prompts, or the captions that lie beside --images: give one"
        )
    device = local_device()
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    settings: dict[str, Any] = {"precision": precision, "rows": rows, "batch": batch}
    parts: list[Part] = []
    texts: tuple[str, ...] = () if prompts is None else lines_of(prompts)
    count, null = len(texts), None
    if images is not None and vae is not None:
        model = load_autoencoder(vae, scaling=scaling, device=device, dtype=dtype)
        source = images_of(images, size, model.channels)
        count = len(source)
        draw = seed if sample else None
        parts.append(Latents(model, source, batch, draw, labelled=text_encoder is None))
        settings |= {"latents": model.record, "images": source.describe(), "sampled": draw}
        texts = () if text_encoder is None else captions(source)
    if text_encoder is not None:
        sides = None if size is None else (size, size)
        encoder = load_text_encoder(text_encoder, device=device, dtype=dtype, size=sides)
        parts.append(Prompts(encoder, texts, batch))
        null = encoder.null()
        spoken = torch.frombuffer(bytearray("\0".join(texts).encode()), dtype=torch.uint8)
        settings |= {"text_encoder": encoder.record, "prompts": digest({"texts": spoken})}
    settings = json.loads(json.dumps(settings))
    folder = Filled(out, settings, ENCODED, (".safetensors", ".npz", ".tar"), "latents")
    rank, processes = part_of(part)
    mine = share(range(count), rows, rank, processes)
    work = Encoding(tuple(parts), count, folder, rows, null)
    drawn, stopped = work.fill(mine)
    print(f"{out}: {drawn} encoded, {work.there(mine)} of this process's {len(mine)} are there")
    if stopped is not None:
        print(f"{out}: stopped by {stopped.name}: the same command goes on")
        raise typer.Exit(128 + stopped)
    if work.complete():
        what = "latents" if images is not None else "prompts"
        print(f"all {count} {what} are in {out}")


def lines_of(file: Path) -> tuple[str, ...]:
    """The prompts in a text file, one a line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    try:
        return tuple(file.read_text(encoding="utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text: {error}") from error


def part_of(text: str) -> tuple[int, int]:
    """The value of --part, or what torchrun says: (I, N)."""
    rank, _, count = text.partition("/")
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        raise ValueError(f"--part must be I/N with 0 <= I < N, got {text!r}")
    here = launched()
    if here[1] > 1 and text != "0/1":
        raise ValueError("--part is for processes that torchrun does not start: leave it out")
    return here if here[1] > 1 else (int(rank), int(count))
