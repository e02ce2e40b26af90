"""Autoencoders: latents are those of diffusers' pipelines, and images come back in their scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

from tiny_autoencoders import MAKES, kl, saved  # noqa: E402

from fastcm.adapters.autoencoders import load  # noqa: E402
from fastcm.data.latents import sampled  # noqa: E402
from fastcm.rng import NoiseKey  # noqa: E402


def images(n: int = 2, side: int = 8) -> Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8)


@pytest.mark.parametrize("name", MAKES)
def test_latents_are_what_a_pipeline_gives_its_network(name: str, tmp_path: Path) -> None:
    model = MAKES[name]().eval()
    found = load(saved(model, tmp_path / "vae"))
    x = images()
    mean, log_variance = found.moments(x)
    with torch.no_grad():
        out = model.encode(x.float() / 127.5 - 1.0)
        if name == "AutoencoderKL":
            wanted = (out.latent_dist.mean - 0.25) * 1.5
            spread = (out.latent_dist.logvar / 2).exp() * 1.5
            assert log_variance is not None
            torch.testing.assert_close((log_variance / 2).exp(), spread)
        else:
            wanted = out.latent * model.config.scaling_factor
            assert log_variance is None
        torch.testing.assert_close(mean, wanted)
        shift = 0.25 if name == "AutoencoderKL" else 0.0
        plain = model.decode(mean / model.config.scaling_factor + shift, return_dict=False)[0]
    torch.testing.assert_close(found.decode(mean), plain)
    assert found.latent_shape((3, 8, 8)) == (4, 4, 4) == tuple(mean.shape[1:])
    assert found.image_shape((4, 4, 4)) == (3, 8, 8)
    floating = found.moments(x.float() / 127.5 - 1.0)[0]
    torch.testing.assert_close(floating, mean)


def test_channels_may_have_numbers_of_their_own(tmp_path: Path) -> None:
    numbers = {"latents_mean": [0.0, 1.0, 2.0, 3.0], "latents_std": [1.0, 2.0, 4.0, 8.0]}
    model = kl(shift_factor=None, **numbers).eval()
    found = load(saved(model, tmp_path))
    x = images()
    with torch.no_grad():
        z = model.encode(x.float() / 127.5 - 1.0).latent_dist.mean
    shift, std = (torch.tensor(v).view(4, 1, 1) for v in numbers.values())
    torch.testing.assert_close(found.moments(x)[0], (z - shift) * 1.5 / std)
    again = found.decode(found.moments(x)[0])
    with torch.no_grad():
        torch.testing.assert_close(again, model.decode(z, return_dict=False)[0])


@pytest.mark.parametrize("name", MAKES)
def test_large_images_are_decoded_in_tiles(name: str, tmp_path: Path) -> None:
    found = load(saved(MAKES[name](), tmp_path))
    z = torch.randn(1, 4, 24, 24)
    whole, tiled = found.decode(z), found.decode(z, tile=16)
    assert tiled.shape == whole.shape == (1, 3, 48, 48)
    assert not torch.equal(tiled, whole)
    assert torch.equal(found.decode(z), whole)  # as a whole again
    assert (tiled - whole).abs().mean() < whole.std()
    small = torch.randn(1, 4, 4, 4)
    assert torch.equal(found.decode(small, tile=16), found.decode(small))
    for wrong in (0, 10):
        with pytest.raises(ValueError, match=f"tile must be a multiple of 8, got {wrong}"):
            found.decode(z, tile=wrong)


def test_a_latent_is_a_function_of_seed_step_and_row() -> None:
    mean, log_variance = torch.randn(6, 4, 2, 2), torch.full((6, 4, 2, 2), -200.0)
    key = NoiseKey(3, 5)
    assert torch.equal(sampled(mean, log_variance, key), mean)
    wide = torch.zeros(6, 4, 2, 2)
    z = sampled(mean, wide, key) - mean
    assert 0.5 < z.std() < 1.5
    part = sampled(mean[2:].half(), wide[2:].half(), key, first_sample=2)
    torch.testing.assert_close(part - mean[2:].half().float(), z[2:], atol=2e-6, rtol=0)
    assert not torch.equal(sampled(mean, wide, NoiseKey(3, 6)), sampled(mean, wide, key))


def test_what_is_no_autoencoder_of_these_images_is_refused(tmp_path: Path) -> None:
    found = load(saved(kl(), tmp_path / "pipeline" / "vae").parent)  # of a pipeline
    refused: list[tuple[str, Any]] = [
        ("multiples of 2, got .3, 7, 8.", lambda: found.latent_shape((3, 7, 8))),
        ("of 3 channels", lambda: found.moments(torch.zeros(1, 1, 8, 8))),
        ("decodes latents of 4 channels", lambda: found.decode(torch.zeros(1, 3, 8, 8))),
        ("scale: .* -> ", lambda: found.check({**found.record, "scale": [9.0] * 4})),
    ]
    for match, call in refused:
        with pytest.raises(ValueError, match=match):
            call()
    found.check(found.record)
    found.check(None)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load(tmp_path)
    other = saved(kl(), tmp_path / "other", _class_name="UNet2DModel")
    with pytest.raises(ValueError, match="holds UNet2DModel, and latents of images are made by"):
        load(other)
    silent = saved(kl(), tmp_path / "silent", scaling_factor=None)
    with pytest.raises(ValueError, match="has no scaling_factor: give scaling="):
        load(silent)
    assert load(silent, scaling=2.0).record["scale"] == [2.0] * 4
