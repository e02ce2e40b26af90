"""Images to features, references out of files, and the comparison of both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastcm.evaluation import Gaussian, Reference, compare, image_features
from fastcm.evaluation.gaussians import frechet_estimate
from fastcm.evaluation.manifolds import precision_recall


class Means(nn.Module):
    """The mean of each channel and that of all, in 0..255."""

    width = 4
    distance = "FD"

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        assert not self.training and not torch.backends.cudnn.allow_tf32
        self.seen.append(x)
        channels = x.double().mean((2, 3))
        return self.dropout(torch.cat([channels, channels.mean(1, keepdim=True)], 1))


def images(n: int, size: int = 4) -> Tensor:
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8)


def folder(path: Path, x: Tensor) -> Path:
    path.mkdir()
    for i, image in enumerate(x):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path / f"{i:03d}.png")
    return path


def test_images_come_from_tensors_batches_files_and_folders_alike(tmp_path: Path) -> None:
    x, net = images(7), Means()
    expected = image_features(net, x)
    assert expected.shape == (7, 4) and expected.dtype == torch.float32 and net.training
    assert torch.backends.cudnn.allow_tf32  # as before
    assert torch.equal(expected[:, :3], x.double().mean((2, 3)).float())
    np.save(tmp_path / "x.npy", x.numpy())
    np.savez(tmp_path / "adm.npz", arr_0=x.permute(0, 2, 3, 1).numpy(), arr_1=np.arange(7))
    sources = (
        x.float() / 127.5 - 1,
        iter(x.split(4)),
        tmp_path / "x.npy",
        str(tmp_path / "adm.npz"),
        folder(tmp_path / "images", x),
    )
    for source in sources:
        net.seen.clear()
        assert torch.equal(image_features(net, source, batch_size=3), expected)
        assert max(map(len, net.seen)) <= 3 and torch.equal(torch.cat(net.seen), x)


def test_grey_images_have_three_channels() -> None:
    x = images(3)[:, :1]
    found = image_features(Means(), x)
    assert torch.equal(found, found[:, :1].expand(3, 4))


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    net = Means()
    for x in (torch.zeros(5, 2), torch.zeros(5, 2, 4, 4), torch.zeros(5, 4, 4)):
        with pytest.raises(ValueError, match="features are of images"):
            image_features(net, x)
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "empty", []):
        with pytest.raises(ValueError, match="features need at least one"):
            image_features(net, nothing)
    path = folder(tmp_path / "mixed", images(3))
    folder(tmp_path / "mixed" / "wide", images(1, size=5))
    with pytest.raises(ValueError, match=r"images differ in size: .*000\.png is 4 x 4 and .*5 x 5"):
        image_features(net, path)
    (tmp_path / "mixed" / "000.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"000\.png is not a readable image"):
        image_features(net, path)
    np.savez(tmp_path / "other.npz", mu=np.zeros(4))
    with pytest.raises(ValueError, match="must hold images arr_0 or x, got mu"):
        image_features(net, tmp_path / "other.npz")
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        image_features(net, images(2), batch_size=0)


def test_a_comparison_is_of_the_three_distances() -> None:
    x, y = (image_features(Means(), images(n)) for n in (60, 50))
    found = compare(x, Reference.of(y))
    assert found.frechet == frechet_estimate(x, Gaussian.of(y))
    assert (found.precision, found.recall) == precision_recall(x, y)
    alone = compare(x, Reference(Gaussian.of(y)))
    assert alone.frechet == found.frechet and (alone.precision, alone.recall) == (None, None)
    with pytest.raises(ValueError, match=r"must be \[N, 4\] as the reference's"):
        compare(x[:, :3], Reference.of(y))


def test_a_reference_is_written_as_edm_reads_it_and_read_again(tmp_path: Path) -> None:
    net = Means()
    y = image_features(net, images(50))
    file = Reference.of(y).save(tmp_path / "ref.npz")
    with np.load(file) as arrays:
        assert np.allclose(arrays["mu"], y.double().numpy().mean(0))
        assert np.allclose(arrays["sigma"], np.cov(y.double().numpy(), rowvar=False))
        np.savez(tmp_path / "adm.npz", ref_mu=arrays["mu"], ref_sigma=arrays["sigma"])
    x = image_features(net, images(60))
    wanted = compare(x, Reference.of(y)).frechet
    for name in ("ref.npz", "adm.npz"):
        again = Reference.read(tmp_path / name, net)
        assert again.features is None
        assert compare(x, again).frechet.value == pytest.approx(wanted.value, rel=1e-6)
    with pytest.raises(ValueError, match=r"must end in \.npz, got .*ref\.pt"):
        Reference.of(y).save(tmp_path / "ref.pt")


def test_adms_batches_have_statistics_of_all_and_images_of_some(tmp_path: Path) -> None:
    net, some = Means(), images(30)
    whole = image_features(net, images(500))
    mu, sigma = whole.double().mean(0).numpy(), whole.double().T.cov().numpy()
    stored = some.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "adm.npz", arr_0=stored, mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma)
    found = Reference.read(tmp_path / "adm.npz", net)
    assert torch.equal(found.gaussian.mean, torch.from_numpy(mu)) and found.features is not None
    assert torch.equal(found.features, image_features(net, some))
    np.savez(tmp_path / "images.npz", arr_0=stored)
    for source in (tmp_path / "images.npz", folder(tmp_path / "images", some)):
        of_some = Reference.read(source, net)
        assert of_some.features is not None and torch.equal(of_some.features, found.features)
        assert torch.equal(of_some.gaussian.mean, Gaussian.of(found.features).mean)


def test_references_of_something_else_are_named(tmp_path: Path) -> None:
    net = Means()
    mean, cov = np.zeros(4), np.eye(4)
    skew = cov + np.eye(4, k=1)
    for arrays, said in (
        ({"mu": np.zeros(2048), "sigma": np.eye(2048)}, r"\[2048\] and .*, and Means has 4"),
        ({"mu": mean, "sigma": np.eye(3)}, r"\[4\] and \[3, 3\], and Means has 4 features"),
        ({"mu": mean * np.nan, "sigma": cov}, "not finite"),
        ({"mu": mean, "sigma": -cov}, "no covariance"),
        ({"mu": mean, "sigma": skew}, "no covariance"),
        ({"mu": mean}, "must hold mu and sigma, or images arr_0, got mu"),
    ):
        np.savez(tmp_path / "ref.npz", **arrays)
        with pytest.raises(ValueError, match=said):
            Reference.read(tmp_path / "ref.npz", net)
    with pytest.raises(ValueError, match=r"img512\.pkl is a pickle, which can run any code"):
        Reference.read(tmp_path / "img512.pkl", net)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        Reference.read(tmp_path / "nowhere.npz", net)


def test_a_covariance_without_full_rank_is_warned_of() -> None:
    y = image_features(Means(), images(50))
    few = image_features(Means(), images(4))
    with pytest.warns(UserWarning, match="4 samples have a covariance of rank 3 at most in 4"):
        compare(few, Reference(Gaussian.of(y)))
    with pytest.warns(UserWarning, match="4 reference images have a covariance of rank 3"):
        Reference.of(few)
