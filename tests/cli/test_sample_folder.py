"""Many samples on the disk: what is in the files, who may write them, and what survives a kill."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastcm
from fastcm.cli import filled
from fastcm.cli.sample_folder import SETTINGS, sample_folder
from fastcm.evaluation.pictures import to_uint8
from fastcm.networks import MLP
from fastcm.runs.files import WRITING, create_file
from fastcm.sampling import Sampler
from fastcm.training.processes import Processes

IMAGE, CLASSES = (3, 4, 5), 3


def network(shape: tuple[int, ...] = IMAGE, classes: int | None = CLASSES) -> MLP:
    """One that says something: the last layer of a new network is zero."""
    net = MLP(shape=shape, width=8, depth=1, num_classes=classes)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.5)
    return net


def sampler_of(
    shape: tuple[int, ...] = IMAGE, classes: int | None = CLASSES, batch_size: int = 8, **more: Any
) -> Sampler:
    net = network(shape, classes)
    return Sampler(net, fastcm.Linear(), shape=shape, batch_size=batch_size, **more)


def pixels(path: Path) -> torch.Tensor:
    """A PNG as [C, H, W]."""
    from PIL import Image

    array = np.asarray(Image.open(path))
    return torch.from_numpy(array.copy()).reshape(*array.shape[:2], -1).permute(2, 0, 1)


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but the settings; nothing may be left of writing."""
    found = {p.name: p.read_bytes() for p in folder.iterdir()}
    del found[SETTINGS]
    assert not [name for name in found if name.startswith(".")]
    return found


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_png_is_the_sample_of_its_index(tmp_path: Path, channels: int) -> None:
    sampler = sampler_of((channels, 4, 5))
    done = sample_folder(sampler, tmp_path / "new" / "folder", 19, first=5, seed=3)
    assert (done.drawn, done.present, done.interrupted) == (19, 0, None)
    names = sorted(files(tmp_path / "new" / "folder"))
    assert names == [f"{i:06d}.png" for i in range(5, 24)]
    x = to_uint8(sampler(24, seed=3, cond=torch.arange(24) % CLASSES))
    for i in range(5, 24):
        assert torch.equal(pixels(tmp_path / "new" / "folder" / names[i - 5]), x[i])


def test_shards_hold_what_fid_tools_read(tmp_path: Path) -> None:
    sampler = sampler_of()
    assert sample_folder(sampler, tmp_path, 19, first=5, format="npz").drawn == 19
    parts = [(5, 8), (8, 16), (16, 24)]
    assert sorted(files(tmp_path)) == [f"{a:06d}-{b - 1:06d}.npz" for a, b in parts]
    labels = torch.arange(24) % CLASSES
    x = to_uint8(sampler(24, cond=labels)).permute(0, 2, 3, 1).numpy()
    for a, b in parts:
        with np.load(tmp_path / f"{a:06d}-{b - 1:06d}.npz") as shard:
            assert shard.files == ["arr_0", "arr_1"]
            assert shard["arr_0"].dtype == np.uint8 and shard["arr_0"].shape == (b - a, 4, 5, 3)
            assert np.array_equal(shard["arr_0"], x[a:b])
            assert shard["arr_1"].dtype == np.int64
            assert np.array_equal(shard["arr_1"], labels[a:b])


def test_samples_that_are_no_images_stay_floats(tmp_path: Path) -> None:
    sampler = sampler_of((2,), None)
    sample_folder(sampler, tmp_path, 10)
    assert sorted(files(tmp_path)) == ["000000-000007.npz", "000008-000009.npz"]
    with np.load(tmp_path / "000008-000009.npz") as shard:
        assert shard.files == ["arr_0"] and shard["arr_0"].dtype == np.float32
        np.testing.assert_allclose(shard["arr_0"], sampler(10)[8:], rtol=0, atol=1e-5)


def test_one_label_for_all(tmp_path: Path) -> None:
    sampler = sampler_of()
    sample_folder(sampler, tmp_path, 8, label=2, format="npz")
    with np.load(tmp_path / "000000-000007.npz") as shard:
        assert shard["arr_1"].tolist() == [2] * 8
        x = to_uint8(sampler(8, cond=torch.full((8,), 2))).permute(0, 2, 3, 1)
        assert np.array_equal(shard["arr_0"], x.numpy())


def test_high_indices_have_longer_names_and_the_last_there_is(tmp_path: Path) -> None:
    sampler = sampler_of(batch_size=5)  # 2**32 is no multiple
    first = 2**32 - 3
    assert sample_folder(sampler, tmp_path, 3, first=first).drawn == 3
    assert sorted(files(tmp_path)) == [f"{first + i}.png" for i in range(3)]


@pytest.mark.parametrize("format", ["png", "npz"])
@pytest.mark.parametrize("cuts", [[0, 20, 40], [0, 3, 11, 30, 40]])
def test_samples_do_not_depend_on_the_ranges(tmp_path: Path, format: str, cuts: list[int]) -> None:
    sampler = sampler_of(batch_size=8)
    for i in reversed(range(len(cuts) - 1)):
        n = cuts[i + 1] - cuts[i]
        done = sample_folder(sampler, tmp_path / "cut", n, first=cuts[i], format=format)
        assert done.drawn == n
    assert sample_folder(sampler, tmp_path / "cut", 40, format=format).present == 40
    sample_folder(sampler, tmp_path / "whole", 40, format=format)
    if format == "png":
        assert files(tmp_path / "cut") == files(tmp_path / "whole")
        return
    joined = [
        np.concatenate([np.load(io.BytesIO(data))["arr_0"] for _, data in sorted(f.items())])
        for f in (files(tmp_path / "cut"), files(tmp_path / "whole"))
    ]
    assert np.array_equal(*joined)


def test_shards_are_filled_in_around_what_is_there(tmp_path: Path) -> None:
    sampler = sampler_of((2,), None)
    assert sample_folder(sampler, tmp_path, 2, first=3).drawn == 2
    assert sample_folder(sampler, tmp_path, 8).drawn == 6
    names = sorted(files(tmp_path))
    assert names == ["000000-000002.npz", "000003-000004.npz", "000005-000007.npz"]
    x = np.concatenate([np.load(tmp_path / name)["arr_0"] for name in names])
    assert np.array_equal(x, sampler(8))


@pytest.mark.parametrize("format", ["png", "npz"])
def test_only_what_is_missing_is_computed(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = sampler_of(batch_size=8)
    sample_folder(sampler, tmp_path, 24, format=format)
    before = files(tmp_path)
    gone = "000010.png" if format == "png" else "000008-000015.npz"
    (tmp_path / gone).unlink()
    stamps = {name: (tmp_path / name).stat().st_mtime_ns for name in before if name != gone}
    asked: list[tuple[int, int]] = []
    draw = Sampler.__call__

    def spy(self: Sampler, n: int, **options: Any) -> torch.Tensor:
        asked.append((options["first_sample"], n))
        return draw(self, n, **options)

    monkeypatch.setattr(Sampler, "__call__", spy)
    done = sample_folder(sampler, tmp_path, 30, format=format)
    assert asked == [(8, 8), (24, 8)]
    assert done.drawn == (7 if format == "png" else 14) and done.drawn + done.present == 30
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    assert stamps == {name: (tmp_path / name).stat().st_mtime_ns for name in stamps}


def test_another_setting_is_refused_by_name(tmp_path: Path) -> None:
    sampler = sampler_of()
    sample_folder(sampler, tmp_path, 3, source={"step": 10})
    before = files(tmp_path)
    twin = Sampler(sampler.net, fastcm.Linear(), shape=IMAGE, batch_size=4, steps=2)
    for other, options, said in [
        (sampler, {"seed": 1}, "samples of another setting: seed: 0 -> 1; choose another folder"),
        (sampler, {"label": 1, "format": "npz"}, "label: None -> 1; format: 'png' -> 'npz'"),
        (sampler, {"source": {"step": 20}}, "step: 10 -> 20"),
        (twin, {}, r"times: \[1.0\] -> \[1.0, 0.5\]; batch_size: 8 -> 4"),
        (sampler_of(), {}, "weights: '[0-9a-f]{16}' -> '[0-9a-f]{16}'"),
    ]:
        with pytest.raises(ValueError, match=said):
            sample_folder(other, tmp_path, 9, **{"source": {"step": 10}, **options})
    assert files(tmp_path) == before


@pytest.mark.parametrize("moment", ["draws", "records"])
def test_a_setting_that_another_process_was_faster_with_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Both see no folder; the other one has its samples there while this one draws or records."""
    slow, fast = sampler_of(), sampler_of()
    draw = Sampler.__call__

    def drawing(self: Sampler, *args: Any, **options: Any) -> torch.Tensor:
        if self is slow and moment == "draws":
            sample_folder(fast, tmp_path, 2)
        return draw(self, *args, **options)

    def recording(path: Path, data: bytes) -> None:
        monkeypatch.setattr(filled, "create_file", create_file)
        if moment == "records":
            sample_folder(fast, tmp_path, 2)
        create_file(path, data)

    monkeypatch.setattr(Sampler, "__call__", drawing)
    monkeypatch.setattr(filled, "create_file", recording)
    with pytest.raises(ValueError, match="samples of another setting: weights"):
        sample_folder(slow, tmp_path, 5)
    assert sorted(files(tmp_path)) == ["000000.png", "000001.png"]
    assert sample_folder(fast, tmp_path, 3).present == 2


def test_a_file_is_created_by_the_first_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_file(tmp_path / "x", b"first")
    create_file(tmp_path / "x", b"second")

    def link(source: Path, target: Path) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", link)
    create_file(tmp_path / "x", b"third")
    create_file(tmp_path / "y", b"first")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"x": b"first", "y": b"first"}


@pytest.mark.parametrize("foreign", ["cat.png", "data.npz"])
def test_samples_are_not_mixed_with_foreign_files(tmp_path: Path, foreign: str) -> None:
    (tmp_path / foreign).touch()
    with pytest.raises(ValueError, match=rf"{foreign} and no samples.json: .* an empty folder"):
        sample_folder(sampler_of(), tmp_path, 3)
    (tmp_path / foreign).rename(tmp_path / "notes.txt")
    assert sample_folder(sampler_of(), tmp_path, 3).drawn == 3


def test_shards_that_overlap_are_named(tmp_path: Path) -> None:
    sampler = sampler_of()
    sample_folder(sampler, tmp_path, 8, format="npz")
    whole = tmp_path / "000000-000007.npz"
    (tmp_path / "000004-000005.npz").write_bytes(whole.read_bytes())
    said = f"{whole.name} and 000004-000005.npz in {tmp_path} hold the same samples"
    with pytest.raises(ValueError, match=re.escape(said)):
        sample_folder(sampler, tmp_path, 16, format="npz")


@pytest.mark.parametrize(
    ("n", "options", "said"),
    [
        (-1, {}, "n must be >= 0, got -1"),
        (3, {"first": -1}, "first must be >= 0 .* got first=-1, n=3"),
        (4, {"first": 2**32 - 3}, r"at most 2\*\*32, got first=4294967293, n=4"),
        (3, {"seed": -1}, "seed must be in"),
        (3, {"format": "jpg"}, "format must be one of png, npz, pairs, got 'jpg'"),
        (3, {"label": CLASSES}, r"label must be in \[0, 3\), got 3"),
        (3, {"guidance": 2.0}, "null_condition"),
    ],
)
def test_what_makes_no_sense_leaves_no_folder(
    tmp_path: Path, n: int, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        sample_folder(sampler_of(), tmp_path / "x", n, **options)
    assert sample_folder(sampler_of(), tmp_path / "x", 0).drawn == 0
    assert not (tmp_path / "x").exists()


def test_a_sampler_or_folder_that_cannot_serve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"png holds images .* samples are \[2\]: use npz"):
        sample_folder(sampler_of((2,)), tmp_path, 3, format="png")
    with pytest.raises(ValueError, match="shape of a sample"):
        sample_folder(Sampler(network(), fastcm.Linear()), tmp_path, 3)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file, not a folder"):
        sample_folder(sampler_of(), tmp_path / "file", 3)


@pytest.mark.skipif(os.name != "posix", reason="processes are told apart by POSIX signals")
def test_only_what_killed_processes_left_of_the_range_is_removed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    dead, alive = ended.pid, os.getppid()
    gone = [f"000003.png-{dead}", f"{SETTINGS}-{dead}", f"000002-000005.npz-{os.getpid()}"]
    kept = [f"000003.png-{alive}", f"000012.png-{dead}", f"notes-{dead}"]
    for name in (*gone, *kept):
        (tmp_path / f"{WRITING}{name}").touch()
    sample_folder(sampler_of(), tmp_path, 12)
    left = {p.name.removeprefix(WRITING) for p in tmp_path.glob(f"{WRITING}*")}
    assert left == set(kept)


@pytest.mark.usefixtures("default_handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_the_batch(tmp_path: Path, number: signal.Signals) -> None:
    class Stopped(Sampler):
        def __call__(self, *args: Any, **options: Any) -> torch.Tensor:
            if options["first_sample"] == 8:
                signal.raise_signal(number)
            return super().__call__(*args, **options)

    sampler = Stopped(network(), fastcm.Linear(), shape=IMAGE, batch_size=8)
    done = sample_folder(sampler, tmp_path, 30)
    assert (done.drawn, done.interrupted) == (16, number) and len(files(tmp_path)) == 16
    (tmp_path / "000012.png").unlink()
    done = sample_folder(sampler, tmp_path, 16)  # complete all the same
    assert (done.drawn, done.present, done.interrupted) == (1, 15, None)


class Other(Processes):
    """This process and another one, whose batches and signals are given."""

    def __init__(self, batches: list[tuple[bool, signal.Signals | None]]) -> None:
        super().__init__(0, 2, object())
        self.batches, self.at = batches, -1

    def exchange(self, mine: Any = None, error: Exception | None = None) -> list[Any]:
        self.at += 1
        theirs = len(self.batches) if self.at == 0 else self.batches[self.at - 1]
        return [mine, theirs]


@pytest.mark.parametrize("n", [0, 8, 12])
def test_each_computes_as_many_batches_as_the_other(tmp_path: Path, n: int) -> None:
    sampler, calls = sampler_of(), []
    real = type(sampler).__call__

    class Counted(Sampler):
        def __call__(self, n: Any, **options: Any) -> torch.Tensor:
            calls.append(n)
            return real(self, n, **options)

    sampler.__class__ = Counted
    theirs = [(True, None), (False, None), (True, None)]
    done = sample_folder(sampler, tmp_path, n, together=Other(theirs))
    assert done.drawn == n and done.interrupted is None
    mine = -(-n // 8)
    assert calls == [8] * mine + [1] * sum(busy for busy, _ in theirs[mine:])


def test_a_signal_to_the_other_ends_both_after_the_same_batch(tmp_path: Path) -> None:
    theirs = [(True, None), (True, signal.SIGTERM), (True, None)]
    done = sample_folder(sampler_of(), tmp_path, 24, together=Other(theirs))
    assert done.drawn == 8 and done.interrupted is signal.SIGTERM
