"""FID's Inception against what torch-fidelity and torchvision compute with the same weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_features import inception_shapes, inception_weights, picture
from torch import Tensor

from fastcm.evaluation import Inception, image_features
from fastcm.evaluation.inception import resize_tensorflow

LAYOUT = "bd04e829988dd22dd0bbf9e499a87af311ed57c1b4309a9d20a907d8ed4123d4"
"""SHA-256 of a line of name and shape for every weight of torchvision 0.28's ``inception_v3``, of
1,008 classes and without auxiliary ones and counters."""


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return inception_weights()


@pytest.fixture(scope="module")
def file(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(weights, path)
    return path


def test_names_and_shapes_are_those_of_the_published_files(file: Path) -> None:
    text = "\n".join(f"{n} {list(s)}" for n, s in sorted(inception_shapes(1008).items()))
    assert hashlib.sha256(text.encode()).hexdigest() == LAYOUT
    assert sum(p.numel() for p in Inception(file).parameters()) == 23_850_960


@torch.no_grad()
def test_features_are_those_of_torch_fidelity(file: Path) -> None:
    """Computed by version 0.4.0 with these weights, of which ours had the same bits."""
    net = Inception(file)
    assert net.distance == "FID"
    for size, some, mean, std in (
        ((40, 52), [3.505954, 2.736237, 0.056035, 0.00784], 1.0220456, 1.4167740),
        ((320, 350), [5.345892, 4.286819, 0.156481, 6.6e-05], 1.6596787, 2.2907622),
    ):
        found = net(picture(*size))
        assert found.shape == (1, 2048) and found.dtype == torch.float32
        assert found[0, [0, 700, 1400, 2047]].tolist() == pytest.approx(some, rel=1e-3, abs=1e-4)
        assert (found.mean().item(), found.std().item()) == pytest.approx((mean, std), rel=1e-4)


@torch.no_grad()
def test_with_torchvisions_weights_it_is_torchvisions_network(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    """Computed by torchvision 0.28 of the picture in -1..1, resized with half pixels."""
    head = {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    more = {"AuxLogits.fc.bias": torch.zeros(1000), "Mixed_5b.branch1x1.bn.num_batches_tracked": 0}
    save = {name: torch.as_tensor(x) for name, x in {**weights, **head, **more}.items()}
    save_file(save, tmp_path / "torchvision.safetensors")
    net = Inception(tmp_path / "torchvision.safetensors")
    assert net.distance == "FD (torchvision Inception)"
    found = net(picture(40, 52))
    some = [3.413255, 2.687203, 0.062907, 0.001618]
    assert found[0, [0, 700, 1400, 2047]].tolist() == pytest.approx(some, rel=1e-3, abs=1e-4)
    assert found.std().item() == pytest.approx(1.3009700, rel=1e-4)


@torch.no_grad()
def test_it_is_torch_fidelitys_network(file: Path, weights: dict[str, Tensor]) -> None:
    """Where that is installed: every bit."""
    theirs: Any = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    net = theirs.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file)
    )
    for size in ((299, 299), (17, 400)):
        x = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
        assert torch.equal(Inception(file)(x), net(x)[0])


@pytest.mark.gpu
def test_a_gpu_computes_the_same_features(file: Path) -> None:
    x = torch.cat([picture(40, 52), 255 - picture(40, 52)])
    net = Inception(file)
    expected = image_features(net, x)
    found = image_features(net.cuda(), x)
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_pixels_are_resized_from_their_corners() -> None:
    """Of four pixels to six: at 0, 2/3, 4/3, 2, 8/3 and 10/3, beyond the last one that."""
    line = torch.tensor([0.0, 3.0, 6.0, 30.0])
    expected = torch.tensor([0.0, 2.0, 4.0, 6.0, 22.0, 30.0])
    columns = resize_tensorflow(line.expand(1, 2, 4, 4), 6)
    assert columns.shape == (1, 2, 6, 6)
    torch.testing.assert_close(columns[0, 1], expected.expand(6, 6))
    rows = resize_tensorflow(line[:, None].expand(1, 1, 4, 3), 6)
    torch.testing.assert_close(rows[0, 0], expected[:, None].expand(6, 6))
    # nothing is smoothed: half the size is every second pixel
    x = torch.rand(1, 1, 8, 8)
    assert torch.equal(resize_tensorflow(x, 4), x[:, :, ::2, ::2])


def test_its_weights_are_frozen_and_features_do_not_depend_on_the_batch(file: Path) -> None:
    net = Inception(file)
    assert not any(p.requires_grad for p in net.parameters()) and not net.training
    x = torch.cat([picture(20, 20), 255 - picture(20, 20)])
    one, both = (image_features(net, x, batch_size=size) for size in (1, 2))
    torch.testing.assert_close(one, both, rtol=1e-4, atol=1e-4)
    assert (one[0] - one[1]).abs().max() > 0.1


def test_other_weights_are_named(weights: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Inception weights: .*nowhere\.pth"):
        Inception(tmp_path / "nowhere.pth")
    head = {name: x for name, x in weights.items() if name.startswith("fc.")}
    name = "Mixed_5b.branch1x1.conv.weight"
    for given, said in (
        ({"conv1.weight": torch.zeros(2)}, "lacks 'Conv2d_1a_3x3.bn.bias'.* and 469 more: give pt"),
        ({**weights, "more": torch.zeros(2)}, "has besides 'more': give pt"),
        (
            {**weights, name: torch.zeros(2)},
            rf"'{name}' in .* must be \[64, 192, 1, 1\], got \[2\]",
        ),
        ({**head, "fc.bias": torch.zeros(10)}, "'fc.bias' in .* has 10 classes"),
    ):
        torch.save(given, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=said):
            Inception(tmp_path / "other.pth")
