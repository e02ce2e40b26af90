"""`fastcm encode`: the same shards whoever writes them, and a training and samples of them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

diffusers = pytest.importorskip("diffusers")

from test_cli_sample import here  # noqa: E402
from test_sample_folder import pixels  # noqa: E402
from tiny_autoencoders import dc, kl, saved  # noqa: E402

import fastcm  # noqa: E402
from fastcm.adapters.autoencoders import load as load_autoencoder  # noqa: E402
from fastcm.cli import encode as module  # noqa: E402
from fastcm.data import as_source, shards  # noqa: E402
from fastcm.data.latents import sampled  # noqa: E402
from fastcm.evaluation.pictures import to_uint8  # noqa: E402
from fastcm.rng import NoiseKey  # noqa: E402
from fastcm.runs.files import WRITING  # noqa: E402

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(kl(), tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, 11 images of 8 x 8."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for i in range(11):
        place = folder / ("a" if i < 6 else "b") / f"{i:02d}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(place)
    return folder


@pytest.fixture
def call(monkeypatch: Patch, capsys: Capture) -> Any:
    def command(name: str, *options: object) -> tuple[int, str, str]:
        code, out, error = here(monkeypatch, capsys, [name, *map(str, options)])
        return code, re.sub(r"\s+", " ", out), re.sub(r"\s+", " ", error)

    return command


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def options(images: object, vae: Path, out: Path) -> list[object]:
    return ["--images", images, "--vae", vae, "--out", out, "--rows", 4, "--batch", 3]


def test_shards_hold_the_moments_and_the_classes(
    call: Any, images: Path, vae: Path, tmp_path: Path
) -> None:
    code, said, error = call("encode", *options(images, vae, tmp_path / "x"))
    assert code == 0, error
    assert "11 encoded" in said and "all 11 latents are in" in said
    data = shards(tmp_path / "x")
    model = load_autoencoder(vae)
    assert data.rows == (4, 4, 3) and data.names == ("x", "labels") and data.num_classes == 2
    assert data.latents == model.record and data.variance == "log_variance"
    held = data.read(1, data.read_names)
    files = sorted(images.rglob("*.png"))[4:8]
    mean, log_variance = model.moments(torch.stack([pixels(f) for f in files]))
    assert log_variance is not None
    assert held["labels"].tolist() == [0, 0, 1, 1]
    for name, wanted in (("x", mean), ("log_variance", log_variance)):
        assert held[name].dtype == torch.float16
        torch.testing.assert_close(held[name].float(), wanted, rtol=2e-3, atol=2e-3)


def test_the_folder_is_the_same_however_it_was_filled(
    call: Any, images: Path, vae: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    one, parts, stopped = (tmp_path / name for name in ("one", "parts", "stopped"))
    assert call("encode", *options(images, vae, one))[0] == 0
    code, said, _ = call("encode", *options(images, vae, parts), "--part", "1/2")
    assert code == 0 and "7 encoded" in said and "all 11" not in said
    with pytest.raises(ValueError, match="lacks latents: the same `fastcm encode` again"):
        shards(parts)
    assert call("encode", *options(images, vae, parts), "--part", "0/2")[0] == 0
    assert contents(parts) == contents(one)
    for rank in (1, 0):
        for name, value in (("RANK", rank), ("WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        assert call("encode", *options(images, vae, stopped))[0] == 0
        if rank:
            (stopped / "shard_000002.safetensors").unlink()
            (stopped / f"{WRITING}shard_000001.safetensors-999999999").write_bytes(b"torn")
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    code, said, _ = call("encode", *options(images, vae, stopped))
    assert code == 0 and "3 encoded" in said
    assert contents(stopped) == contents(one)


def test_a_signal_ends_it_after_a_shard(
    call: Any, images: Path, vae: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    import os
    import signal

    write = module.Encoding._write

    def stopping(self: Any, path: Path, arrays: Any) -> None:
        write(self, path, arrays)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module.Encoding, "_write", stopping)
    code, said, _ = call("encode", *options(images, vae, tmp_path / "x"))
    assert code == 128 + signal.SIGTERM and "4 encoded" in said and "stopped by SIGTERM" in said
    assert sorted(contents(tmp_path / "x")) == ["encoded.json", "shard_000000.safetensors"]


def test_samples_and_models_without_variance_are_kept_as_they_are(
    call: Any, images: Path, vae: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        extra = ["--sample", "--seed", 7]
        assert call("encode", *options(images, vae, tmp_path / name), *extra)[0] == 0
    data = shards(tmp_path / "one")
    assert data.variance is None and contents(tmp_path / "one") == contents(tmp_path / "two")
    model = load_autoencoder(vae)
    x = torch.stack([pixels(f) for f in sorted(images.rglob("*.png"))[8:]])
    wanted = sampled(*model.moments(x), NoiseKey(7), first_sample=8)  # type: ignore[arg-type]
    found = data.read(2, ["x"])["x"].float()
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)
    plain = saved(dc(), tmp_path / "dc")
    assert call("encode", *options(images, plain, tmp_path / "three"))[0] == 0
    assert shards(tmp_path / "three").variance is None


def test_each_draw_of_a_latent_is_another_and_follows_from_seed_and_step(
    call: Any, images: Path, vae: Path, tmp_path: Path
) -> None:
    assert call("encode", *options(images, vae, tmp_path / "x"))[0] == 0
    data = shards(tmp_path / "x", window=3)
    source, again = (as_source(data, seed=3, device="cpu") for _ in range(2))
    x, labels = source.draw(0, 11)
    later, same = source.draw(1, 11)[0], again.draw(1, 11)[0]
    assert x.dtype == torch.float32 and sorted(labels.tolist()) == [0] * 6 + [1] * 5
    assert torch.equal(later, same)
    half = again.draw_rows(0, 11, range(5, 11))[0]  # type: ignore[attr-defined]
    assert torch.equal(half, x[5:])
    plain = data.without_labels()
    assert as_source(plain, seed=3, device="cpu").draw(0, 4)[1] is None
    means = torch.cat([data.read(i, ["x"])["x"] for i in range(3)]).float()
    draws = torch.stack([source.draw(step, 11)[0].sum(0) for step in range(200)])
    assert (draws.mean(0) - means.sum(0)).abs().max() < 6 * draws.std(0).max() / 200**0.5
    whole = data.to_memory()
    assert len(whole) == 11 and torch.equal(whole.x, data.to_memory().x)


def test_a_run_on_latents_is_sampled_as_images(
    call: Any, images: Path, vae: Path, tmp_path: Path
) -> None:
    assert call("encode", *options(images, vae, tmp_path / "x"))[0] == 0
    run = tmp_path / "run"
    small = ["--net", "mlp", "--width", 16, "--steps", 2, "--batch", 8]
    code, _, error = call("train", "--data", tmp_path / "x", "--out", run, *small, "--conditional")
    assert code == 0, error
    sampler = fastcm.Sampler.from_run(run)
    assert sampler.shape == (4, 4, 4)
    latents = sampler(5, cond=torch.arange(5) % 2)
    wanted = to_uint8(load_autoencoder(vae).decode(latents))
    assert call("sample", run, "--n", 5, "--out", tmp_path / "png", "--vae", vae)[0] == 0
    for i in range(5):
        assert torch.equal(pixels(tmp_path / "png" / f"{i:06d}.png"), wanted[i])
    code, _, error = call("sample", run, "--n", 5, "--out", tmp_path / "x.npy", "--vae", vae)
    assert code == 0 and np.load(tmp_path / "x.npy").shape == (5, 3, 8, 8)
    assert call("sample", run, "--n", 5, "--out", tmp_path / "npz")[0] == 0
    (file,) = (tmp_path / "npz").glob("*.npz")
    assert np.load(file)["arr_0"].shape == (5, 4, 4, 4)
    other = saved(kl(), tmp_path / "other")
    weights = safetensors.torch.load_file(other / "diffusion_pytorch_model.safetensors")
    safetensors.torch.save_file(
        {k: v + 1 for k, v in weights.items()}, other / "diffusion_pytorch_model.safetensors"
    )
    for more, said in (
        (["--out", tmp_path / "grid.png"], "are latents: --vae decodes them into pictures"),
        (["--out", tmp_path / "y", "--vae", other], "is not that of the latents: weights:"),
        (["--out", tmp_path / "y", "--tile", 16], "--tile has a meaning only with --vae"),
        (["--out", tmp_path / "png"], "holds samples of another setting"),
    ):
        code, _, error = call("sample", run, "--n", 5, *more)
        assert code == 2 and said in error, error


def test_what_cannot_be_encoded_is_said(call: Any, images: Path, vae: Path, tmp_path: Path) -> None:
    from PIL import Image

    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name, side in (("a", 8), ("b", 10)):
        Image.new("RGB", (side, side)).save(mixed / f"{name}.png")
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "a.png").write_bytes((mixed / "a.png").read_bytes())
    (torn / "b.png").write_bytes(b"no image")
    assert call("encode", *options(images, vae, tmp_path / "full"))[0] == 0
    for given, more, said in (
        ("digits", [], "takes images of 3 channels, with sides that are multiples of 2"),
        (mixed, [], "images differ in size"),
        (torn, [], "b.png cannot be read, remove or mend it"),
        (tmp_path / "none", [], "no such file or folder"),
        (images, ["--part", "2/2"], "--part must be I/N with 0 <= I < N, got '2/2'"),
        (images, ["--rows", 0], "--rows must be >= 1, got 0"),
        (images, ["--precision", "fp8"], "--precision must be fp32 or bf16"),
        (images, ["--out", tmp_path / "full", "--seed", 1, "--sample"], "of another setting"),
        (images, ["--size", 7], "multiples of 2, got [3, 7, 7]"),
    ):
        command = [*options(given, vae, tmp_path / "x"), *more]
        code, _, error = call("encode", *command)
        assert code == 2 and said in error, error
    assert not (tmp_path / "x").exists()
    assert call("encode", *options(mixed, vae, tmp_path / "x"), "--size", 8)[0] == 0


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    from tiny_text_encoders import write

    return write("sdxl", tmp_path_factory.mktemp("pipeline"))


def test_captions_beside_images_make_conditions_of_a_text_model(
    call: Any, images: Path, vae: Path, pipeline: Path, tmp_path: Path
) -> None:
    from fastcm.adapters.text_encoders import load as load_text_encoder

    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    listed = []
    texts = []
    for i, file in enumerate(sorted(folder.rglob("*.png"))):
        texts.append(f"cat {'abcdefghijk'[i]}")
        if i % 2:
            file.with_suffix(".txt").write_text(texts[-1] + "\n")
        else:
            name = str(file.relative_to(folder))
            listed.append(json.dumps({"file_name": name, "text": texts[-1]}))
    (folder / "metadata.jsonl").write_text("\n".join(listed))
    command = [*options(folder, vae, tmp_path / "x"), "--text-encoder", pipeline, "--size", 8]
    code, said, error = call("encode", *command)
    assert code == 0 and "all 11 latents are in" in said, error
    again = [*command[:5], tmp_path / "y", *command[6:]]
    assert call("encode", *again, "--part", "1/2")[0] == call("encode", *again)[0] == 0
    assert contents(tmp_path / "x") == contents(tmp_path / "y")
    data = shards(tmp_path / "x", window=3)
    encoder = load_text_encoder(pipeline, size=(8, 8))
    held = data.read(1, data.names)
    for key, wanted in encoder.encode(texts[4:8]).items():
        torch.testing.assert_close(held[key], wanted, rtol=2e-3, atol=2e-3)
    _, cond = as_source(data, seed=0, device="cpu").draw(0, 5)
    assert cond["added_cond_kwargs"]["text_embeds"].shape == (5, 6)
    null = data.null_condition
    assert torch.equal(null["encoder_hidden_states"], encoder.null()["encoder_hidden_states"])
    assert null["added_cond_kwargs"]["time_ids"].tolist() == [8, 8, 0, 0, 8, 8]
    sorted(folder.rglob("*.txt"))[0].unlink()
    code, _, error = call("encode", *command)
    assert code == 2 and "1 images have no caption, such as" in error


def test_prompts_alone_are_conditions_of_samples(
    call: Any, vae: Path, pipeline: Path, tmp_path: Path
) -> None:
    from fastcm.adapters.text_encoders import load as load_text_encoder
    from fastcm.cli.runs import read_condition

    lines = [f"dog {letter}" for letter in "abcde"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(lines))
    command = ["--prompts", file, "--text-encoder", pipeline, "--size", 8, "--rows", 2]
    code, said, error = call("encode", *command, "--out", tmp_path / "x")
    assert code == 0 and "all 5 prompts are in" in said, error
    cond = read_condition(tmp_path / "x")
    wanted = load_text_encoder(pipeline, size=(8, 8)).encode(lines)
    found = cond["added_cond_kwargs"]["text_embeds"]
    name = "added_cond_kwargs.text_embeds"
    torch.testing.assert_close(found.float(), wanted[name].float(), rtol=2e-3, atol=2e-3)
    for more, said in (
        (["--vae", vae, "--out", tmp_path / "y"], "--images and --vae go together"),
        (["--out", tmp_path / "x", "--batch", 3], "holds latents of another setting"),
    ):
        code, _, error = call("encode", *command, *more)
        assert code == 2 and said in error
    alone = call("encode", "--out", tmp_path / "y", "--text-encoder", pipeline)
    assert alone[0] == 2 and "give one" in alone[2]
    assert call("encode", "--out", tmp_path / "y")[0] == 2
    with pytest.raises(ValueError, match="not one of prompts that `fastcm encode` made"):
        read_condition(tmp_path)
