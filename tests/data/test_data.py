"""Data sets, their readers, and the sources of batches."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fastcm import rng
from fastcm.data import (
    Dataset,
    DeviceData,
    Source,
    array_file,
    as_source,
    digits,
    image_folder,
    load,
    photographs,
    to_unit,
)
from fastcm.data.sources import IterableData


def numbered(n: int, labels: bool = False) -> Dataset:
    """Row i holds the number i, and has the label i % 3."""
    x = torch.arange(n, dtype=torch.float32)[:, None]
    return Dataset(x, torch.arange(n) % 3 if labels else None)


def rows(batch: tuple[Tensor, Tensor | None]) -> list[int]:
    return [int(i) for i in batch[0][:, 0]]


# Dataset


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_empty_data_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="empty data"):
        Dataset(torch.zeros(shape))


def test_data_of_rank_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank >= 2, got \[5\]"):
        Dataset(torch.zeros(5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
def test_data_that_is_not_finite_in_float32_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        Dataset(torch.tensor([[0.0], [bad]], dtype=torch.float64))


def test_dtype_is_uint8_or_becomes_float32() -> None:
    assert Dataset(torch.zeros(2, 3, dtype=torch.uint8)).x.dtype == torch.uint8
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float32):
        assert Dataset(torch.zeros(2, 3, dtype=dtype)).x.dtype == torch.float32
    with pytest.raises(ValueError, match=r"uint8 or floating, got torch\.int32"):
        Dataset(torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        Dataset([[1.0]])


def test_labels_are_counted_and_checked() -> None:
    x = torch.zeros(3, 2)
    data = Dataset(x, torch.tensor([0, 4, 1], dtype=torch.int32))
    assert data.num_classes == 5
    assert data.labels is not None and data.labels.dtype == torch.int64
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.3, got 0\.\.4"):
        Dataset(x, torch.tensor([0, 4, 1]), 4)
    with pytest.raises(ValueError, match=r"integers of shape \[3\]"):
        Dataset(x, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="integers"):
        Dataset(x, torch.zeros(3))
    with pytest.raises(ValueError, match="without labels"):
        Dataset(x, num_classes=10)


def test_split_is_deterministic_and_loses_nothing() -> None:
    data = numbered(50, labels=True)
    train, held = data.split(0.2, seed=3)
    assert (len(train), len(held)) == (40, 10)
    assert sorted(rows((train.x, None)) + rows((held.x, None))) == list(range(50))
    for part in (train, held):
        assert part.labels is not None
        assert torch.equal(part.labels, part.x[:, 0].long() % 3)
        assert part.num_classes == 3
    again, _ = data.split(0.2, seed=3)
    other, _ = data.split(0.2, seed=4)
    assert torch.equal(again.x, train.x)
    assert not torch.equal(other.x, train.x)


def test_split_never_leaves_a_part_empty() -> None:
    assert [len(part) for part in numbered(2).split(0.01)] == [1, 1]
    with pytest.raises(ValueError, match="two samples"):
        numbered(1).split(0.5)
    with pytest.raises(ValueError, match="0 < fraction < 1"):
        numbered(9).split(1.0)


def test_bytes_map_to_the_unit_range() -> None:
    unit = to_unit(torch.tensor([0, 255], dtype=torch.uint8))
    assert torch.equal(unit, torch.tensor([-1.0, 1.0]))
    x = torch.tensor([3.0])
    assert to_unit(x) is x


# Readers


def test_digits_use_the_whole_byte_range() -> None:
    data = digits()
    assert data.x.shape == (1797, 1, 8, 8) and data.x.dtype == torch.uint8
    assert (int(data.x.min()), int(data.x.max())) == (0, 255)
    assert data.shape == (1, 8, 8) and data.num_classes == 10
    assert data.labels is not None and data.labels[:5].tolist() == [0, 1, 2, 3, 4]


def test_import_needs_neither_scikit_learn_nor_pillow() -> None:
    code = """
import sys
sys.modules["sklearn"] = sys.modules["sklearn.datasets"] = sys.modules["PIL"] = None
from fastcm import data
for read in (data.digits, lambda: data.image_folder(".")):
    try:
        read()
    except ImportError as error:
        assert 'pip install "fastcm[demo]"' in str(error), error
    else:
        raise SystemExit("no ImportError")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def save_image(path: Path, width: int, height: int, value: int = 7, mode: str = "RGB") -> None:
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new(mode, (width, height), value if mode == "L" else (value, 0, 0)).save(path)


def test_image_folder_reads_in_sorted_order_without_labels(tmp_path: Path) -> None:
    save_image(tmp_path / "b.png", 6, 4, 20)
    save_image(tmp_path / "a" / "z.PNG", 6, 4, 10)
    save_image(tmp_path / "c.bmp", 6, 4, 30)
    (tmp_path / "notes.txt").write_text("no image")
    data = image_folder(tmp_path)
    assert data.x.shape == (3, 3, 4, 6)
    assert data.x[:, 0, 0, 0].tolist() == [10, 20, 30]
    assert data.labels is None and data.num_classes is None


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    save_image(tmp_path / "dog" / "deep" / "0.png", 4, 4)
    save_image(tmp_path / "cat" / "1.png", 4, 4)
    save_image(tmp_path / "dog" / "2.png", 4, 4)
    data = image_folder(tmp_path)
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 1]
    assert data.num_classes == 2


def test_channels_convert_the_image(tmp_path: Path) -> None:
    save_image(tmp_path / "0.png", 4, 4, 90, "L")
    for channels, pixel in ((1, [90]), (3, [90, 90, 90]), (4, [90, 90, 90, 255])):
        assert image_folder(tmp_path, channels=channels).x[0, :, 0, 0].tolist() == pixel
    with pytest.raises(ValueError, match=r"channels must be one of \[1, 3, 4\], got 2"):
        image_folder(tmp_path, channels=2)


def test_mixed_image_sizes_are_refused_by_name(tmp_path: Path) -> None:
    save_image(tmp_path / "0.png", 6, 4)
    save_image(tmp_path / "1.png", 5, 4)
    with pytest.raises(ValueError, match=r"0\.png is 6 x 4 and .*1\.png is 5 x 4; pass size"):
        image_folder(tmp_path)


def test_size_keeps_the_aspect_and_crops_the_centre(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 200  # the central square; the rest must not show
    image.fromarray(pixels).save(tmp_path / "0.png")
    save_image(tmp_path / "1.png", 3, 5)
    data = image_folder(tmp_path, size=4)
    assert data.x.shape == (2, 3, 4, 4)
    assert (data.x[0] > 180).all()


def test_resize_is_antialiased(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    board = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)
    image.fromarray(board).save(tmp_path / "0.png")
    x = image_folder(tmp_path, size=8, channels=1).x.float()
    assert (x - 127.5).abs().max() < 30


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_truncated_image_is_skipped_and_named(tmp_path: Path) -> None:
    for i in range(3):
        save_image(tmp_path / f"{i}.png", 32, 32, i)
    truncate(tmp_path / "1.png", 60)
    with pytest.warns(UserWarning, match=r"skipped 1 unreadable of 3 image files: .*1\.png \(.+\)"):
        data = image_folder(tmp_path)
    assert data.x[:, 0, 0, 0].tolist() == [0, 2]


def test_warning_names_the_first_five_and_counts_all(tmp_path: Path) -> None:
    save_image(tmp_path / "good.png", 4, 4)
    for i in range(7):
        (tmp_path / f"bad{i}.jpg").write_bytes(b"not a jpeg")
    with pytest.warns(UserWarning, match="skipped 7 unreadable of 8") as caught:
        image_folder(tmp_path)
    message = str(caught[0].message)
    assert [f"bad{i}.jpg" in message for i in range(7)] == [True] * 5 + [False] * 2


def test_on_skip_replaces_the_warning(tmp_path: Path) -> None:
    save_image(tmp_path / "0.png", 4, 4)
    (tmp_path / "1.webp").write_bytes(b"")
    seen: list[tuple[str, str]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image_folder(tmp_path, on_skip=lambda file, reason: seen.append((file.name, reason)))
    assert [name for name, _ in seen] == ["1.webp"] and seen[0][1]


def test_folder_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no readable image in .*0 unreadable of 0"):
        image_folder(tmp_path)
    (tmp_path / "0.png").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"1 unreadable of 1 image files: .*0\.png"):
        image_folder(tmp_path)


def test_sixteen_bit_image_is_not_clipped_to_eight(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.full((4, 4), 1000, np.uint16)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match="more than 8 bits per channel"):
        image_folder(tmp_path)


def test_decompression_bomb_counts_as_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pytest.importorskip("PIL.Image")
    save_image(tmp_path / "0.png", 40, 40)
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="DecompressionBombError"):
        image_folder(tmp_path)


@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        ((5, 7), (7,)),
        ((5, 6, 7), (1, 6, 7)),
        ((5, 3, 8, 8), (3, 8, 8)),
        ((5, 6, 8, 3), (3, 6, 8)),
        ((5, 1, 8, 4), (1, 8, 4)),
        ((5, 9, 8, 8), (9, 8, 8)),
    ],
)
def test_array_layouts(tmp_path: Path, shape: tuple[int, ...], kept: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    np.save(tmp_path / "a.npy", array)
    data = array_file(tmp_path / "a.npy")
    assert data.shape == kept and data.labels is None
    expected = array.transpose(0, 3, 1, 2) if kept == (3, 6, 8) else array
    assert np.array_equal(data.x.numpy().ravel(), expected.ravel())


def test_npz_holds_samples_and_labels(tmp_path: Path) -> None:
    x, y = np.eye(4, dtype=">f8"), np.array([0, 1, 2, 1], np.uint8)
    np.savez(tmp_path / "a.npz", x=x, labels=y, other=y)
    np.savez(tmp_path / "b.npz", images=x, y=y)
    for file in ("a.npz", "b.npz"):
        data = array_file(tmp_path / file)
        assert torch.equal(data.x, torch.eye(4))
        assert data.labels is not None and data.labels.tolist() == [0, 1, 2, 1]
        assert data.num_classes == 3
    np.savez(tmp_path / "c.npz", a=x, b=x)
    with pytest.raises(ValueError, match=r"c\.npz must hold an array x .* got \['a', 'b'\]"):
        array_file(tmp_path / "c.npz")


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    objects = np.array([{}, 1], dtype=object)
    np.save(tmp_path / "o.npy", objects)
    np.savez(tmp_path / "o.npz", x=objects)
    for file in ("o.npy", "o.npz"):
        with pytest.raises(ValueError, match=rf"{file}: arrays of objects are not read"):
            array_file(tmp_path / file)


@pytest.mark.parametrize("file", ["a.npy", "a.npz"])
def test_corrupt_array_file_is_refused_by_name(tmp_path: Path, file: str) -> None:
    path = tmp_path / file
    (np.save if file == "a.npy" else np.savez)(path, np.zeros((20, 20)))
    truncate(path, 300)
    with pytest.raises(ValueError, match=rf"{file} is not a readable"):
        array_file(path)
    path.write_bytes(b"junk junk junk")
    with pytest.raises(ValueError, match=rf"{file} is not a readable"):
        array_file(path)


@pytest.mark.parametrize("array", [np.zeros((3, 2), np.int64), np.zeros((0, 2)), np.array(["a"])])
def test_array_that_is_no_data_is_refused_by_name(tmp_path: Path, array: object) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=r"a\.npy: "):
        array_file(tmp_path / "a.npy")


def test_load_finds_the_reader(tmp_path: Path) -> None:
    assert len(load("digits")) == 1797
    np.save(tmp_path / "a.npy", np.zeros((3, 2), np.float32))
    assert load(str(tmp_path / "a.npy")).shape == (2,)
    save_image(tmp_path / "0.png", 4, 6)
    assert load(tmp_path, size=2, channels=1).shape == (1, 2, 2)


def test_load_says_what_it_accepts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1,2")
    accepted = (
        r'expected "digits", "photographs", a folder of images or shards, or a \.npy or \.npz file'
    )
    with pytest.raises(ValueError, match=accepted):
        load(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError, match=accepted):
        load("mnist")
    with pytest.raises(FileNotFoundError, match=r"none\.npy"):
        load(tmp_path / "none.npy")
    with pytest.raises(ValueError, match="size applies to a folder"):
        load("digits", size=8)


# DeviceData


@pytest.mark.parametrize("n", [1, 7, 100])
def test_permutation_covers_each_epoch_exactly_once(n: int) -> None:
    data = DeviceData(numbered(n), 5, "cpu")
    for epoch in range(3):
        assert sorted(data.permutation(epoch).tolist()) == list(range(n))
        assert sorted(rows(data.batch(epoch * n, n))) == list(range(n))


def test_permutation_depends_on_seed_and_epoch_alone() -> None:
    data = DeviceData(numbered(64), 5, "cpu")
    orders = [data.permutation(epoch) for epoch in (0, 1, 2, 3)]
    assert len({tuple(order.tolist()) for order in orders}) == 4
    for epoch in (2, 0, 3, 1):
        assert torch.equal(data.permutation(epoch), orders[epoch])
        assert torch.equal(DeviceData(numbered(64), 5, "cpu").permutation(epoch), orders[epoch])
    assert not torch.equal(DeviceData(numbered(64), 6, "cpu").permutation(0), orders[0])


def test_a_permutation_is_the_same_from_one_kernel(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DeviceData(numbered(70), 2**40, "cpu")
    expected = data.permutation(3)
    request.getfixturevalue("kernels")
    monkeypatch.setattr(rng, "words", lambda *_, **__: pytest.fail("a launch for each operation"))
    assert torch.equal(data.permutation(3), expected)


def test_permutation_is_pinned() -> None:
    assert DeviceData(numbered(8), 0, "cpu").permutation(0).tolist() == [5, 7, 2, 0, 4, 1, 3, 6]


def test_every_row_comes_first_about_equally_often() -> None:
    data = DeviceData(numbered(4), 0, "cpu")
    firsts = torch.stack([data.permutation(epoch)[0] for epoch in range(400)])
    assert firsts.bincount(minlength=4).min() > 60  # 100 expected, standard deviation 9


def test_batch_continues_into_the_next_epoch() -> None:
    data = DeviceData(numbered(10), 0, "cpu")
    expected = torch.cat([data.permutation(0)[7:], data.permutation(1)[:4]]).tolist()
    assert rows(data.batch(7, 7)) == expected


def test_batch_may_exceed_the_data() -> None:
    data = DeviceData(numbered(3), 0, "cpu")
    batch = rows(data.batch(2, 10))
    assert len(batch) == 10
    assert sorted(batch[1:4]) == sorted(batch[4:7]) == sorted(batch[7:10]) == [0, 1, 2]


def test_batch_is_independent_of_how_it_is_split() -> None:
    data = DeviceData(numbered(10), 0, "cpu")
    whole = rows(data.batch(3, 24))
    for sizes in ((12, 12), (5, 19), (1,) * 24):
        position, parts = 3, []
        for size in sizes:
            parts += rows(data.batch(position, size))
            position += size
        assert parts == whole


def test_photographs_are_crops_at_places_of_the_seed() -> None:
    pytest.importorskip("PIL")
    whole = pytest.importorskip("sklearn.datasets").load_sample_images().images
    data = photographs(20, size=32)
    assert data.x.shape == (20, 3, 32, 32) and data.x.dtype == torch.uint8
    assert data.labels is not None and data.labels.bincount().tolist() == [10, 10]
    for crop, label in zip(data.x[:3], data.labels[:3]):
        pixels = torch.from_numpy(whole[int(label)]).permute(2, 0, 1)
        corners = (pixels[:, :396, :609] == crop[:, :1, :1]).all(0).nonzero().tolist()
        assert any(torch.equal(pixels[:, i : i + 32, j : j + 32], crop) for i, j in corners)
    assert torch.equal(photographs(20, size=32).x, data.x)
    assert not torch.equal(photographs(20, size=32, seed=1).x, data.x)
    assert len(load("photographs")) == 4096
    with pytest.raises(ValueError, match=r"size in 1..427, got 20, 428"):
        photographs(20, size=428)


def test_data_that_moves_is_not_checked_again() -> None:
    """On the meta device whatever reads a content raises, as it would wait for a GPU."""
    data = numbered(10, labels=True)
    moved = data.to("meta")
    assert moved.x.is_meta and moved.labels is not None and moved.labels.is_meta
    assert (len(moved), moved.shape, moved.num_classes) == (10, data.shape, data.num_classes)
    assert moved.without_labels().num_classes is None


def test_draw_reads_consecutive_positions_with_their_labels() -> None:
    data = DeviceData(numbered(10, labels=True), 0, "cpu")
    x, labels = data.draw(3, 4)
    assert rows((x, None)) == rows(data.batch(12, 4))
    assert labels is not None and torch.equal(labels, x[:, 0].long() % 3)
    with pytest.raises(ValueError, match="position >= 0 and count >= 1, got 0, 0"):
        data.draw(0, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_draws_the_same_rows_without_waiting_for_the_host() -> None:
    cpu, gpu = (DeviceData(numbered(1000), 9, device) for device in ("cpu", "cuda"))
    gpu.draw(0, 300)
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = [gpu.draw(step, 300)[0] for step in range(8)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step, x in enumerate(drawn):
        assert torch.equal(x.cpu(), cpu.draw(step, 300)[0])


# IterableData


def batches(*sizes: int) -> list[Tensor]:
    """Batches that count up: rows 0, 1, 2, ..."""
    return list(torch.arange(sum(sizes), dtype=torch.float32)[:, None].split(sizes))


def test_iterable_starts_again_and_drops_the_short_last_batch() -> None:
    source = IterableData(batches(2, 2, 1), "cpu")
    assert [rows(source.draw(step, 2)) for step in range(4)] == [[0, 1], [2, 3], [0, 1], [2, 3]]


def test_step_ahead_is_reached_by_reading_on() -> None:
    expected = [rows(IterableData(batches(2, 2, 2), "cpu").draw(step, 2)) for step in range(8)]
    source = IterableData(batches(2, 2, 2), "cpu")
    for step in (1, 4, 5, 7):
        assert rows(source.draw(step, 2)) == expected[step]
    with pytest.raises(ValueError, match="step 3 lies behind: the next one of this iterable is 8"):
        source.draw(3, 2)


def test_short_batch_in_the_middle_is_refused() -> None:
    source = IterableData(batches(2, 1, 2), "cpu")
    source.draw(0, 2)
    with pytest.raises(ValueError, match="must have 2 samples, got 1"):
        source.draw(1, 2)


def test_larger_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="must have 2 samples, got 3"):
        IterableData(batches(3), "cpu").draw(0, 2)


@pytest.mark.parametrize("given", [[], batches(1)])
def test_iterable_without_a_full_batch_is_refused(given: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="yields no batch of 2 samples"):
        IterableData(given, "cpu").draw(0, 2)


def test_generator_that_ends_is_refused() -> None:
    def generate() -> Iterator[Tensor]:
        yield from batches(2, 2)

    source = IterableData(generate(), "cpu")
    source.draw(1, 2)
    with pytest.raises(ValueError, match="ended after 2 batches and cannot start again"):
        source.draw(2, 2)


@pytest.mark.parametrize(
    "second",
    [torch.zeros(2, 1, 1), torch.zeros(2, 1, dtype=torch.uint8), (torch.zeros(2, 1), [0, 1])],
)
def test_batch_unlike_the_first_is_refused(second: object) -> None:
    source = IterableData([torch.zeros(2, 1), second], "cpu")
    source.draw(0, 2)
    with pytest.raises(ValueError, match="every batch must be as the first"):
        source.draw(1, 2)


@pytest.mark.parametrize("item", [{"x": 1}, "text", torch.zeros(2), (None, 1), [batches(2)[0]] * 3])
def test_item_that_is_no_batch_is_refused(item: object) -> None:
    with pytest.raises(ValueError, match=r"a batch must be x \[B, \.\.\.\] or \(x, cond\)"):
        IterableData([item], "cpu").draw(0, 2)


def test_condition_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="cond must have one row per sample, 2"):
        IterableData([(torch.zeros(2, 1), torch.zeros(3))], "cpu").draw(0, 2)


def test_arrays_become_tensors_of_the_house_dtypes() -> None:
    item = (np.zeros((2, 3)), np.array([1, 2], np.int32))
    x, cond = IterableData([item], "cpu").draw(0, 2)
    assert x.dtype == torch.float32
    assert cond is not None and cond.dtype == torch.int64
    embedded = IterableData([(torch.zeros(2, 3), torch.zeros(2, 5))], "cpu").draw(0, 2)[1]
    assert embedded is not None and embedded.dtype == torch.float32


# as_source


def test_data_of_each_kind_becomes_a_source(tmp_path: Path) -> None:
    x, labels = torch.rand(6, 2), torch.arange(6)
    np.save(tmp_path / "a.npy", x.numpy())
    resident = [x, x.numpy(), (x, labels), Dataset(x), tmp_path / "a.npy", str(tmp_path / "a.npy")]
    expected = DeviceData(Dataset(x), 3, "cpu").draw(1, 4)[0]
    for data in resident:
        source = as_source(data, seed=3, device="cpu")
        drawn, cond = source.draw(1, 4)
        assert torch.equal(drawn, expected)
        assert (cond is not None) == isinstance(data, tuple)
        assert as_source(source, seed=0, device="cpu") is source


def test_data_loader_becomes_a_source() -> None:
    x, labels = torch.rand(6, 2), torch.arange(6)
    source = as_source(DataLoader(TensorDataset(x, labels), 4), seed=0, device="cpu")
    for step, rows in enumerate(([0, 1, 2, 3], [4, 5, 0, 1])):
        drawn, cond = source.draw(step, 4)
        assert torch.equal(drawn, x[rows])
        assert cond is not None and torch.equal(cond, labels[rows])


def test_other_data_is_refused() -> None:
    with pytest.raises(TypeError, match="got int"):
        as_source(3, seed=0, device="cpu")


def test_description_tells_data_sets_apart() -> None:
    sources: list[Source] = [
        DeviceData(numbered(6), 0, "cpu"),
        DeviceData(numbered(7), 0, "cpu"),
        DeviceData(numbered(7, labels=True), 0, "cpu"),
        IterableData([], "cpu"),
    ]
    descriptions = [source.describe() for source in sources]
    assert all(descriptions.count(d) == 1 for d in descriptions)
    assert DeviceData(numbered(6), 1, "cpu").describe() == descriptions[0]
