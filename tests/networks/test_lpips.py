"""The perceptual distance against a computation by hand, with weights of this test's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fastcm
from fastcm.cli.recipes import Recipe
from fastcm.networks import LPIPS, UNet
from fastcm.objectives import Batch
from fastcm.rng import NoiseKey

WIDTHS = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]
"""VGG16 as its paper lists it, configuration D."""
ENDS = (3, 8, 15, 22, 29)


def vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for width in WIDTHS:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def vgg() -> nn.Sequential:
    torch.manual_seed(3)
    return vgg16().requires_grad_(False)


@pytest.fixture(scope="module")
def weights(vgg: nn.Sequential) -> dict[str, Tensor]:
    """As torchvision and lpips name them, with what else their files hold."""
    torch.manual_seed(4)
    found = {f"features.{name}": value for name, value in vgg.state_dict().items()}
    found["classifier.0.weight"] = torch.zeros(3, 3)
    for i, channels in enumerate((64, 128, 256, 512, 512)):
        found[f"lin{i}.model.1.weight"] = torch.rand(1, channels, 1, 1)
    return found


@pytest.fixture(scope="module")
def file(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(weights, path)
    return path


def images(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.rand(shape) * 2 - 1, torch.rand(shape) * 2 - 1


def by_hand(vgg: nn.Sequential, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> float:
    """Of one pair of images, in float64 and pixel by pixel."""
    total = 0.0
    features = []
    for image in (x, y):
        channels = [
            (image[c] - shift) / scale
            for c, shift, scale in ((0, -0.030, 0.458), (1, -0.088, 0.448), (2, -0.188, 0.450))
        ]
        h, found = torch.stack(channels)[None].double(), []
        for i, layer in enumerate(vgg):
            h = layer.double()(h)
            if i in ENDS:
                found.append(h[0])
        features.append(found)
    for block, (one, other) in enumerate(zip(*features)):
        w = weights[f"lin{block}.model.1.weight"].double().flatten()
        _, height, width = one.shape
        for i in range(height):
            for j in range(width):
                u, v = (f[:, i, j] / (f[:, i, j].norm() + 1e-10) for f in (one, other))
                total += (w * (u - v) ** 2).sum().item() / (height * width)
    return total


def test_the_distance_is_its_formula(
    vgg: nn.Sequential, weights: dict[str, Tensor], file: Path
) -> None:
    x, y = images(2, 3, 18, 16)
    found = LPIPS(file)(x, y)
    assert found.shape == (2,) and found.dtype == torch.float32
    expected = [by_hand(vgg, weights, x[i], y[i]) for i in range(2)]
    vgg.float()
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert LPIPS(file)(x, x).tolist() == [0.0, 0.0]


def test_a_grey_image_is_one_of_three_equal_channels(file: Path) -> None:
    metric, (x, y) = LPIPS(file), images(2, 1, 16, 16)
    assert torch.equal(metric(x, y), metric(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1)))


def test_weights_come_from_one_file_or_two_by_the_names_of_either_package(
    weights: dict[str, Tensor], file: Path, tmp_path: Path
) -> None:
    heads = {k: v for k, v in weights.items() if k.startswith("lin")}
    torch.save({k: v for k, v in weights.items() if k not in heads}, tmp_path / "vgg16.pth")
    torch.save(heads, tmp_path / "heads.pth")
    theirs = {
        f"net.slice{1 + sum(int(k.split('.')[1]) > end for end in ENDS)}.{k[9:]}": v
        for k, v in weights.items()
        if k.startswith("features")
    }
    torch.save({**theirs, **heads}, tmp_path / "package.pth")
    x, y = images(2, 3, 16, 16)
    expected = LPIPS(file)(x, y)
    assert torch.equal(LPIPS([tmp_path / "vgg16.pth", tmp_path / "heads.pth"])(x, y), expected)
    assert torch.equal(LPIPS(str(tmp_path / "package.pth"))(x, y), expected)


class Malicious:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_wrong_files_are_named(
    weights: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FileNotFoundError, match=r"LPIPS weights: .*nowhere\.pth"):
        LPIPS(tmp_path / "nowhere.pth")
    for name, content in (("a.pth", b"x"), ("a.safetensors", b"x" * 100)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is not a readable file of weights"):
            LPIPS(tmp_path / name)
    torch.save({"features.0.weight": Malicious()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth is not a readable file"):
        LPIPS(tmp_path / "bad.pth")
    assert "executed" not in capsys.readouterr().out
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"must hold a dictionary of tensors, got list"):
        LPIPS(tmp_path / "list.pth")
    few = {k: v for k, v in weights.items() if k != "lin3.model.1.weight"}
    save_file(few, tmp_path / "few.safetensors")
    with pytest.raises(ValueError, match=r"no 'lin3.model.1.weight' in .*few\.safetensors"):
        LPIPS(tmp_path / "few.safetensors")
    save_file({**weights, "features.5.bias": torch.zeros(3)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"'features.5.bias' in .* must be \[128\], got \[3\]"):
        LPIPS(tmp_path / "odd.safetensors")


def test_images_that_it_cannot_take_are_refused(file: Path) -> None:
    metric = LPIPS(file)
    for shape in ((2, 3), (2, 2, 16, 16), (2, 3, 15, 16)):
        with pytest.raises(ValueError, match=r"1 or 3 channels and at least 16 x 16"):
            metric(*images(*shape))
    with pytest.raises(ValueError, match="two images of one shape"):
        metric(torch.zeros(1, 3, 16, 16), torch.zeros(1, 1, 16, 16))


def test_distance_and_gradient_are_0_where_there_are_no_features(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    """With bias below every sum the first block is 0, and nothing follows but biases."""
    dead = {**weights, "features.0.bias": torch.full((64,), -1e4)}
    dead |= {"features.2.bias": torch.full((64,), -1e4)}
    save_file(dead, tmp_path / "dead.safetensors")
    x, y = images(1, 3, 16, 16)
    distance = LPIPS(tmp_path / "dead.safetensors")(x.requires_grad_(), y)
    (gradient,) = torch.autograd.grad(distance.sum(), x)
    assert distance.tolist() == [0.0] and (gradient == 0).all()


def test_consistency_training_takes_a_step_under_it(file: Path) -> None:
    metric = LPIPS(file)
    torch.manual_seed(0)
    net = UNet(3, 16, (1, 2), num_res_blocks=1)
    objective = fastcm.ConsistencyTraining(metric=metric, discretization=2)
    data = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    before = [p.detach().clone() for p in (*net.parameters(), *metric.parameters())]
    t = fastcm.Trainer(net, objective, data=data, batch_size=2, compile=False, progress=False)
    t.fit(2)
    after = [p.detach() for p in (*t.net.parameters(), *metric.parameters())]
    moved = [not torch.equal(a, b) for a, b in zip(before, after)]
    assert any(moved) and not any(moved[-len(list(metric.parameters())) :])
    batch = Batch(data.float() / 127.5 - 1, NoiseKey(1))
    loss = objective.loss(lambda x, t, cond: 0 * x, batch, lambda x, t, cond: 0 * x)
    assert loss.per_sample.shape == (4,) and (loss.per_sample > 0).all()


def test_the_command_line_reads_its_weights(file: Path, tmp_path: Path) -> None:
    recipe = Recipe(metric="lpips", lpips_weights=str(file))
    assert isinstance(recipe.objective(recipe.datasets()[0], None).metric, LPIPS)  # type: ignore
    for options in ({"metric": "lpips"}, {"lpips_weights": str(file)}):
        with pytest.raises(ValueError, match="--metric lpips and --lpips-weights"):
            Recipe(**options)
