"""DINOv2 against transformers' own, with the same random weights in either package's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_features import dinov2_weights, picture
from torch import Tensor, nn

from fastcm.evaluation import DINOv2


def saved(path: Path, **options: Any) -> Path:
    torch.save(dinov2_weights(**options), path)
    return path


def theirs(**options: Any) -> nn.Module:
    """A Dinov2Model whose every weight is random, so that each is seen to be used."""
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, **options
    )
    model: nn.Module = transformers.Dinov2Model(config).eval().requires_grad_(False)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
def test_it_is_the_network_of_transformers_read_from_its_folder(
    gated: bool, tmp_path: Path
) -> None:
    model = theirs(image_size=224, use_swiglu_ffn=gated)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    net = DINOv2(tmp_path)
    assert net.width == 128 and net.distance == "FD-DINOv2 (128 features)"
    x = torch.randint(256, (2, 3, 50, 70), dtype=torch.uint8)
    expected = model(net.pixels(x)).last_hidden_state
    torch.testing.assert_close(net.tokens(net.pixels(x)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net(x), expected[:, 0], rtol=1e-4, atol=1e-4)
    torch.save(net.state_dict(), tmp_path / "own.pth")  # by DINOv2's own names
    assert torch.equal(DINOv2(tmp_path / "own.pth")(x), net(x))


@torch.no_grad()
def test_places_are_resized_as_theirs_but_for_the_offset(tmp_path: Path) -> None:
    model = theirs(image_size=70)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    net = DINOv2(tmp_path)
    expected = model.embeddings.interpolate_pos_encoding(torch.empty(1, 257, 128), 224, 224)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(net.positions(16, offset=0.0), expected)
    assert (net.positions(16) - expected).abs().max() > 1e-3
    assert net.positions(5) is net.pos_embed


@torch.no_grad()
def test_places_are_scaled_by_a_tenth_of_a_patch_more(tmp_path: Path) -> None:
    """Cubics nearly keep a ramp: place i lies at (i + 1/2) side / (grid + 0.1) - 1/2."""
    net = DINOv2(saved(tmp_path / "d.pth", side=37))
    ramp = torch.arange(37.0)
    net.pos_embed[0, 1:] = ramp.repeat(37)[:, None]  # along a row
    along = net.positions(16)[0, 1:, 0].view(16, 16)
    expected = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    # torch's cubics keep it to a twentieth; without the offset the last is off by a fifth
    assert (along - expected)[:, 1:-1].abs().max() < 0.06
    assert torch.equal(net.positions(16)[:, :1], net.pos_embed[:, :1])


def test_pixels_are_those_of_pillow_before_they_are_normalised(tmp_path: Path) -> None:
    """dgm-eval resizes by Pillow, which rounds in between; EDM2 and we in float32."""
    net = DINOv2(saved(tmp_path / "d.pth"))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for size in ((64, 64), (300, 260)):
        x = picture(*size)
        image = Image.fromarray(x[0].permute(1, 2, 0).numpy()).resize((224, 224), 3)
        wanted = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()
        found = (net.pixels(x)[0] * std.view(3, 1, 1) + mean.view(3, 1, 1)) * 255
        assert found.shape == (3, 224, 224)
        assert (found.clamp(0, 255) - wanted).abs().max() < 1.6
        assert (found.clamp(0, 255) - wanted).abs().mean() < 0.5


def test_the_distance_of_the_large_network_has_the_published_name(tmp_path: Path) -> None:
    for width, name in ((1024, "FD-DINOv2"), (384, "FD-DINOv2 (ViT-S/14)")):
        assert DINOv2(saved(tmp_path / "d.pth", width=width)).distance == name


def test_other_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"DINOv2 weights: .*nowhere\.pth"):
        DINOv2(tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file of DINOv2 weights in"):
        DINOv2(tmp_path)
    weights = dinov2_weights(depth=2)
    lacking = {name: x for name, x in weights.items() if name != "blocks.1.attn.qkv.bias"}
    no_mlp = {name: x for name, x in weights.items() if "1.mlp" not in name}
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({"conv1.weight": torch.zeros(2)}, "has no 'cls_token': give dinov2_vitl14"),
        ({**weights, "register_tokens": torch.zeros(1, 4, 64)}, "is a DINOv2 with registers"),
        ({**weights, "embeddings.register_tokens": torch.zeros(1, 4, 64)}, "with registers"),
        ({**weights, "head.weight": torch.zeros(2)}, "has besides 'head.weight': give"),
        (lacking, "lacks 'blocks.1.attn.qkv.bias': give"),
        (no_mlp, "lacks 'blocks.1.mlp.fc1.bias'"),
        ({**weights, "cls_token": torch.zeros(1, 1, 65)}, "'cls_token' in .* has 65 features"),
        ({**weights, "norm.bias": torch.zeros(3)}, r"'norm.bias' in .* must be \[64\], got \[3\]"),
    ]
    for given, said in cases:
        save_file(given, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=said):
            DINOv2(tmp_path / "other.safetensors")
