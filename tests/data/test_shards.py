"""Shards: how they are written, in which order they are read, and what is refused."""

from __future__ import annotations

import json
import shutil
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import fastcm
from fastcm import FlowMatching, Sampler, Trainer, data, rng
from fastcm.data import Dataset, DeviceData, Shards, as_source, shard_files, shards, write_shards
from fastcm.data.drawing import PARSING
from fastcm.data.shard_data import ShardData
from fastcm.data.sources import draw_rows
from fastcm.networks import MLP, GaussianMixture

N = 50


def numbered(n: int = N) -> tuple[Tensor, Tensor]:
    """Row i holds the number i, and has the label i % 3."""
    x = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 4, 4).contiguous()
    return x, torch.arange(n) % 3


def written(folder: Path, *, rows: int = 8, format: Any = "npz", n: int = N) -> Path:
    x, labels = numbered(n)
    write_shards(folder, zip(x.split(13), labels.split(13)), rows=rows, format=format)
    return folder


def source(given: Any, seed: int = 3) -> ShardData:
    made = as_source(given, seed=seed, device="cpu")
    assert isinstance(made, ShardData)
    return made


def numbers(source: Any, steps: Any, batch_size: int = 4) -> list[list[int]]:
    return [[int(x.flatten()[0]) for x in source.draw(s, batch_size)[0]] for s in steps]


@pytest.mark.parametrize("format", ["npz", "safetensors", "tar"])
def test_what_is_written_is_read(tmp_path: Path, format: Any) -> None:
    if format == "tar":
        pytest.importorskip("PIL")
    folder = written(tmp_path / "s", format=format)
    assert sorted(f.name for f in folder.iterdir())[:2] == [
        f"shard_00000{i}.{format}" for i in range(2)
    ]
    x, labels = numbered()
    found = shards(folder)
    assert (found.rows, found.shape, found.num_classes) == ((8,) * 6 + (2,), (3, 4, 4), 3)
    whole = found.to_memory()
    assert torch.equal(whole.x, x) and whole.labels is not None
    assert torch.equal(whole.labels, labels)
    (folder / "shards.json").unlink()  # folders of others have none
    assert torch.equal(data.load(folder).to_memory(20).x, x[:20])  # type: ignore[union-attr]
    for drawn in (source(folder), source(str(folder))):
        pixels, cond = drawn.draw(5, 9)
        assert pixels.dtype == torch.uint8 and cond.dtype == torch.int64
        assert torch.equal(cond, pixels[:, 0, 0, 0].long() % 3)


def test_all_in_one_window_is_the_permutation_of_data_in_memory(tmp_path: Path) -> None:
    folder = written(tmp_path / "s")
    drawn = source(shards(folder, window=7, threads=2))
    memory = DeviceData(Dataset(*numbered()), 3, "cpu")
    for step in (0, 1, 9, 10, 3, 40):
        for a, b in zip(drawn.draw(step, 11), memory.draw(step, 11)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_every_row_comes_once_an_epoch_in_an_order_of_the_seed(tmp_path: Path, window: int) -> None:
    found = shards(written(tmp_path / "s"), window=window)
    orders = []
    for epoch in range(3):
        (order,) = numbers(source(found), [epoch], N)
        assert sorted(order) == list(range(N))
        orders.append(tuple(order))
    assert len({*orders}) == 3
    assert numbers(source(found, seed=4), [0], N) != [list(orders[0])]
    # a window mixes its shards and no others
    first = {i // 8 for i in orders[0][: 8 * window - 6]}
    assert len(first) <= window
    if window > 1:
        assert len({i // 8 for i in orders[0][:4]}) > 1


def test_the_order_is_pinned(tmp_path: Path) -> None:
    found = shards(written(tmp_path / "s", rows=3, n=8), window=2)
    assert numbers(source(found, seed=0), [0, 1, 2], 8) == [
        [5, 7, 4, 3, 6, 2, 0, 1],
        [3, 6, 7, 4, 5, 0, 2, 1],
        [5, 3, 1, 0, 4, 2, 6, 7],
    ]


def test_any_step_and_any_cut_give_the_same_rows(tmp_path: Path) -> None:
    found = shards(written(tmp_path / "s"), window=2)
    straight = [i for batch in numbers(source(found), range(40)) for i in batch]
    for steps in ([7, 8], [3], [39], [12, 13]):
        assert numbers(source(found), steps) == [straight[4 * s : 4 * s + 4] for s in steps]
    again = source(found)
    assert numbers(again, [30, 2, 31]) == [straight[4 * s : 4 * s + 4] for s in (30, 2, 31)]
    assert numbers(again, [0], 130) == [straight[:130]]
    assert numbers(again, range(3), 40) == [straight[40 * s : 40 * s + 40] for s in range(3)]


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_each_batch(tmp_path: Path, count: int) -> None:
    found = shards(written(tmp_path / "s"), window=2)
    whole = numbers(source(found), range(20), 6)
    size = 6 // count
    mine = [source(found) for _ in range(count)]
    for step in range(20):
        rows: list[int] = []
        for rank, each in enumerate(mine):
            x, cond = draw_rows(each, step, 6, range(rank * size, (rank + 1) * size))
            assert torch.equal(cond, x[:, 0, 0, 0].long() % 3)
            rows += x[:, 0, 0, 0].tolist()
        assert rows == whole[step]


def test_two_windows_of_rows_are_held_at_most(tmp_path: Path) -> None:
    drawn = source(shards(written(tmp_path / "s"), window=2))
    for step in range(30):
        drawn.draw(step, 4)
        held = sum(len(read.arrays()["x"]) for read in drawn._held.values())
        assert held <= 2 * 2 * 8
    mine = source(drawn.data)
    for step in range(30):
        draw_rows(mine, step, 4, range(2))
        assert sum(len(read.arrays()["x"]) for read in mine._held.values()) <= 2 * 8 + 2


def test_shards_are_read_by_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    real = Shards.opened

    def opened(self: Shards, i: int) -> Any:
        names.add(threading.current_thread().name)
        return real(self, i)

    monkeypatch.setattr(Shards, "opened", opened)
    source(shards(written(tmp_path / "s"))).draw(0, 8)
    assert names and all(name.startswith("shards") for name in names)


def test_latents_keep_their_dtype_on_the_disk(tmp_path: Path) -> None:
    x = torch.randn(20, 4, 2, 2).to(torch.bfloat16)
    emb, mask = torch.randn(20, 5, 3).half(), torch.rand(20, 5) > 0.5
    batch = {"x": x, "emb": emb, "mask": mask}
    with pytest.raises(ValueError, match='BFloat16: format="safetensors" holds every dtype'):
        write_shards(tmp_path / "n", [batch])
    found = write_shards(tmp_path / "s", [batch], rows=6, format="safetensors")
    assert str(found.fields["x"]) == "bfloat16 [4, 2, 2]" and found.num_classes is None
    y, cond = source(shards(tmp_path / "s", window=9)).draw(0, 20)
    order = DeviceData(Dataset(x.float()), 3, "cpu").permutation(0)
    assert y.dtype == torch.float32 and torch.equal(y, x[order].float())
    assert cond["emb"].dtype == torch.float16 and torch.equal(cond["emb"], emb[order])
    assert torch.equal(cond["mask"], mask[order])
    assert torch.equal(
        source(shards(tmp_path / "s", keys=("x", "emb"))).draw(0, 3)[1], emb[order[:3]]
    )
    assert source(shards(tmp_path / "s", keys="x")).draw(0, 3)[1] is None
    with pytest.raises(ValueError, match="only labels go into a Dataset, got emb, mask"):
        found.to_memory()


def test_npz_of_any_layout_is_read(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((9, 2, 3)).astype(np.float32)
    kinds = {"plain": x, "big": x.astype(">f4"), "fortran": np.asfortranarray(x)}
    for name, array in kinds.items():
        np.savez(tmp_path / f"{name}.npz", x=array)
    np.savez_compressed(tmp_path / "small.npz", x=x)
    for file in tmp_path.iterdir():
        found = shards([file])
        assert torch.equal(found.read(0, ["x"], [1, 4, 8])["x"], torch.from_numpy(x[[1, 4, 8]]))
    four = shards(sorted(tmp_path.iterdir()))
    assert len(four) == 36 and four.fields["x"].dtype == torch.float32


def test_archives_as_others_write_them(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for row, (label, size) in enumerate([(4, 6), (2, 8), (0, 6)]):
        folder = tmp_path / "raw" / "a"
        folder.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (size, 6), (row, 0, 9)).save(folder / f"{row}.PNG")
        (folder / f"{row}.json").write_text(json.dumps({"label": label, "url": "?"}))
        (folder / f"{row}.txt").write_text("a caption")
        np.save(folder / f"{row}.emb.npy", np.full((2, 3), row, np.float16))
    with pytest.raises(ValueError, match=r"not a readable shard: row \d holds"):
        shards([unsorted(tmp_path)])
    archive_of(tmp_path / "1.tar", tmp_path / "raw")
    found = shards([tmp_path / "1.tar"], size=6)
    assert {n: str(f) for n, f in found.fields.items()} == {
        "x": "uint8 [3, 6, 6]", "labels": "int64 []", "emb": "float16 [2, 3]",
    }  # fmt: skip
    x, cond = source(found).draw(0, 3)
    assert x[:, 0, 0, 0].tolist() == cond["emb"][:, 0, 0].tolist()
    assert cond["labels"].tolist() == [[4, 2, 0][i] for i in x[:, 0, 0, 0]]
    with pytest.raises(
        ValueError, match=r"1\.tar: x of row 1 is .*\[3, 6, 8\], those before .*size="
    ):
        source(shards([tmp_path / "1.tar"])).draw(0, 3)


def archive_of(path: Path, folder: Path) -> Path:
    """The files below a folder by their names."""
    with tarfile.open(path, "w") as archive:
        for file in sorted(f for f in folder.rglob("*") if f.is_file()):
            archive.add(file, str(file.relative_to(folder)))
    return path


def unsorted(folder: Path) -> Path:
    """An archive in which a row lacks its label."""
    other = folder / "other"
    shutil.copytree(folder / "raw", other)
    (other / "a" / "2.json").unlink()
    return archive_of(folder / "2.tar", other)


def test_pairs_are_read_as_from_memory(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    from fastcm.cli.sample_folder import sample_folder

    net = GaussianMixture(torch.tensor([[0.5, -0.5], [-1.0, 0.2]]), 0.3)
    sampler = Sampler(net, fastcm.Linear(), steps=2, method="ode", shape=(2,), batch_size=16)
    sample_folder(sampler, tmp_path, 40, format="pairs", seed=7, first=3)
    memory = DeviceData(data.pairs(tmp_path), 3, "cpu")
    drawn = source(shards(tmp_path))
    assert drawn.paired and drawn.data.shape == (2,)
    for step in range(4):
        a, b = drawn.draw(step, 12)[0], memory.draw(step, 12)[0]
        assert torch.equal(a, b) and a[:, 0].is_contiguous() and a[:, 1].is_contiguous()
    trainer = Trainer(
        MLP(shape=(2,), width=8, depth=1), fastcm.PairDistillation(), data=drawn.data,
        batch_size=8, compile=False, progress=False,
    )  # fmt: skip
    assert trainer.fit(2).metadata["shape"] == [2]


def test_shards_split_as_a_whole(tmp_path: Path) -> None:
    train, held = shards(written(tmp_path / "s")).split(0.2)
    assert len(train.files) == 6 and len(held) == 2 and train.num_classes == held.num_classes == 3
    assert held.to_memory().x[:, 0, 0, 0].tolist() == [48, 49]
    assert train.without_labels().to_memory(3).labels is None
    with pytest.raises(ValueError, match=r"two shards, got 0\.2 and 1"):
        held.split(0.2)


# what is refused


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = written(tmp_path / "s")
    (folder / "shard_000003.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks shard_000003\.npz, which shards\.json nam"):
        shards(folder)
    (folder / "shards.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no shard of the numbers \[3\].*list of its files"
    ):
        shards(folder)
    assert len(shards(sorted(folder.iterdir()))) == N - 8
    with pytest.raises(FileNotFoundError, match="no such folder of shards"):
        shards(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"no such shard: .*none\.npz"):
        shards([tmp_path / "none.npz"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no shard in .*empty"):
        shards(tmp_path / "empty")


@pytest.mark.parametrize("format", ["npz", "safetensors", "tar"])
@pytest.mark.parametrize("index", [True, False])
def test_a_damaged_shard_is_named(tmp_path: Path, format: Any, index: bool) -> None:
    pytest.importorskip("PIL")
    folder = written(tmp_path / "s", format=format)
    file = folder / f"shard_000004.{format}"
    kept = file.read_bytes()
    if not index:
        (folder / "shards.json").unlink()
    for damaged in (kept[: len(kept) // 2], b"junk" * 99, b""):
        file.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=rf"{file.name} (is not a readable shard|holds \d row)"
        ):
            numbers(source(shards(folder)), range(20))


def test_shards_that_differ_are_refused(tmp_path: Path) -> None:
    for i, array in enumerate((np.zeros((4, 3), np.uint8), np.zeros((4, 2), np.uint8))):
        np.savez(tmp_path / f"a{i}.npz", x=array)
    message = r"a1\.npz holds x uint8 \[2\], and .*a0\.npz x uint8 \[3\]: all shards must be alike"
    with pytest.raises(ValueError, match=message):
        shards(tmp_path)
    np.savez(tmp_path / "a1.npz", x=np.zeros((4, 3), np.uint8), labels=np.zeros(4, int))
    with pytest.raises(ValueError, match=r"a1\.npz holds labels int64 \[\], x uint8 \[3\], and"):
        shards(tmp_path)
    np.savez(tmp_path / "a1.npz", x=np.zeros((4, 3), np.uint8), labels=np.zeros(3, int))
    with pytest.raises(ValueError, match=r"a1\.npz is not .*same number of rows, got {'x': 4, 'la"):
        shards(tmp_path)
    np.savez(tmp_path / "a1.npz", x=np.array([{}], object))
    with pytest.raises(ValueError, match=r"a1\.npz is not a readable shard: x\.npy is no array of"):
        shards(tmp_path)


def test_a_shard_that_changed_after_the_index_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "s")
    np.savez(folder / "shard_000001.npz", x=numbered(4)[0].numpy(), labels=np.zeros(4, int))
    with pytest.raises(ValueError, match=r"shard_000001\.npz holds 4 rows, 8 were expected"):
        numbers(source(shards(folder)), range(20))


def test_arguments_out_of_range_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "s")
    for options in ({"window": 0}, {"threads": 0}):
        with pytest.raises(ValueError, match="window and threads must be >= 1"):
            shards(folder, **options)
    with pytest.raises(
        ValueError, match=r"has no 'image': there are 'x', 'labels', and keys= says"
    ):
        shards(folder, keys=("image", "labels"))
    with pytest.raises(ValueError, match=r"samples must be uint8 or floating.*holds int64"):
        shards(folder, keys=("labels", "x"))
    with pytest.raises(ValueError, match=r"shards end in \.npz.*got a\.csv"):
        shards(["a.csv"])
    with pytest.raises(FileExistsError, match="holds shards already"):
        write_shards(folder, [torch.zeros(1, 2)])
    for batches, message in (
        ([], "no rows to write"),
        ([{"y": torch.zeros(2)}], "a batch must hold x"),
        ([(torch.zeros(2, 1), torch.zeros(3))], r"as many rows of others, got rows {'x': 2, 'lab"),
        ([torch.zeros(2, 1), torch.zeros(2, 2)], "batches that are not alike"),
        ([torch.zeros(2, 1), (torch.zeros(2, 1), torch.zeros(2))], r"holds \['x', 'labels'\], th"),
    ):
        with pytest.raises(ValueError, match=message):
            write_shards(tmp_path / "w", batches)
    with pytest.raises(ValueError, match="format must be one of npz, safetensors, tar, got 'zip'"):
        write_shards(tmp_path / "w", [], format="zip")  # type: ignore[arg-type]


def test_a_folder_of_images_may_hold_other_arrays(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "a").mkdir()
    image.new("L", (2, 2), 7).save(tmp_path / "a" / "0.png")
    np.savez(tmp_path / "statistics.npz", x=np.zeros((3, 2)))
    assert isinstance(data.load(tmp_path, channels=1), Dataset)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gets_the_same_batches(tmp_path: Path) -> None:
    rows = data.Rows(TensorDataset(*numbered()), num_workers=1)
    for given in (shards(written(tmp_path / "s"), window=2), rows):
        cpu, gpu = (as_source(given, seed=3, device=device) for device in ("cpu", "cuda"))
        for step in range(20):
            for a, b in zip(cpu.draw(step, 7), gpu.draw(step, 7)):
                assert b is not None and b.is_cuda and torch.equal(a, b.cpu())


# training


def test_a_run_on_shards_resumes_in_the_same_bits(tmp_path: Path) -> None:
    folder = written(tmp_path / "s")

    def trainer(directory: Path | None = None, **options: Any) -> Trainer:
        torch.manual_seed(0)
        return Trainer(
            MLP(shape=(3, 4, 4), width=8, depth=1, num_classes=3), FlowMatching(),
            data=shards(folder, **options), batch_size=8, directory=directory, compile=False,
            progress=False,
        )  # fmt: skip

    straight = trainer().fit(17)
    trainer(tmp_path / "run").fit(9)
    resumed = trainer(tmp_path / "run").load().fit(8)
    for a, b in zip(straight.net.parameters(), resumed.net.parameters()):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"data\.window: 4 -> 2"):
        trainer(tmp_path / "run", window=2).load()
    (folder / "shard_000006.npz").unlink()
    written(tmp_path / "other", rows=10)
    with pytest.raises(ValueError, match=r"data\.files"):
        folder = tmp_path / "other"
        trainer(tmp_path / "run").load()


def test_a_stream_of_shards_is_one_of_its_own() -> None:
    streams = [
        v for k, v in vars(rng).items() if k.isupper() and k not in ("NUM_STREAMS", "MASK32")
    ]
    assert len(streams) == len({*streams})


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_headers_are_parsed_by_one_thread_at_a_time(
    save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ast` of Python 3.11 fails now and then where several threads parse."""
    x = np.asfortranarray(np.arange(24, dtype=">f4").reshape(6, 4))
    save(tmp_path / "a.npz", x=x)
    held: list[bool] = []

    def guarded(parse: Any) -> Any:
        def wrapper(member: Any) -> Any:
            held.append(PARSING.locked())
            return parse(member)

        return wrapper

    headers = {version: guarded(parse) for version, parse in shard_files._HEADERS.items()}
    monkeypatch.setattr(shard_files, "_HEADERS", headers)
    shard = shard_files.open_shard(tmp_path / "a.npz")
    out, index = torch.zeros(3, 4), np.array([0, 2, 5])
    memory = out.view(3, -1).view(torch.uint8).numpy()
    shard.read(index, {"x": (memory, np.arange(3))})
    assert torch.equal(out, torch.from_numpy(x.astype("f4"))[index])
    assert len(held) == 2 and all(held)  # opened, and unpacked
