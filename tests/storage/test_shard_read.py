import hashlib
import os
import pickle
import shutil
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.shards import load, write_photos, write_set

from roadwork_dist.common.errors import DataError
from roadwork_dist.datasets.dataset import RoadworkDataset
from roadwork_dist.features.content_hashes import content_hashes
from roadwork_dist.features.masks import mask_targets
from roadwork_dist.photos.check import check_images
from roadwork_dist.photos.images import ImageSource
from roadwork_dist.photos.mask_images import PngMask
from roadwork_dist.photos.photo import PhotoViews
from roadwork_dist.photos.views import ViewGeometry
from roadwork_dist.storage.shards import descriptors, index
from roadwork_dist.storage.shards.descriptors import MOST_OPEN, Descriptors, open_files
from roadwork_dist.storage.shards.image import ShardImage
from roadwork_dist.storage.shards.index import ShardFile
from roadwork_dist.trainer.feed.sampler import Sampler


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def shards(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sets") / "train"
    write_set(table, out)
    return out


@pytest.fixture
def own(shards: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(shards, tmp_path / "own")


# Shards are to training what loose files are


def test_a_set_holds_what_its_source_holds(table: Path, shards: Path) -> None:
    loose, sharded = load(table), load(shards)
    for own, other in zip(loose, sharded, strict=True):
        assert replace(other, image=own.image, mask=own.mask) == own
        assert other.image.read() == own.image.read()
        assert isinstance(other.image, ImageSource)
        assert (own.mask is None) == (other.mask is None)
        if own.mask is not None and other.mask is not None:
            assert np.array_equal(other.mask.bits(), own.mask.bits())


def test_rows_of_training_are_the_same_in_any_order(table: Path, shards: Path) -> None:
    """Weighted draws, resumed in the middle of an epoch, read the same pixels and masks from both."""
    views = PhotoViews(ViewGeometry(32))
    sets = [
        RoadworkDataset(m, views=views, masks=mask_targets([sample.mask for sample in m]))
        for m in (load(table), load(shards))
    ]
    sampler = Sampler(length=12, batch_size=2, seed=5, weights=[1 + row for row in range(12)])
    drawn = [row for step in sampler.steps(epoch=1, start=2) for micro in step for row in micro.indices]
    assert len(drawn) == 8
    for row in drawn:
        loose, sharded = (dataset[row] for dataset in sets)
        assert loose.keys() == sharded.keys()
        for name, value in loose.items():
            assert torch.equal(value, sharded[name]) if torch.is_tensor(value) else value == sharded[name]


def test_hashes_of_contents_come_from_the_index(
    table: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = content_hashes([sample.image for sample in load(table)])
    monkeypatch.setattr(ShardImage, "read", lambda self: pytest.fail("a photo was read for its hash"))
    assert content_hashes([sample.image for sample in load(shards)]) == expected


def test_a_picture_pickles_as_its_place(shards: Path) -> None:
    image = load(shards)[0].image
    packed = pickle.dumps(image)
    assert len(packed) < 400
    assert pickle.loads(packed) == image
    assert pickle.loads(packed).read() == image.read()


# Faults


def damage(own: Path, fault: str) -> None:
    tar = own / "shard-000001.tar"
    if fault == "flipped bit":
        first = next(s.image for s in load(own) if "shard-000001" in s.image.name)
        assert isinstance(first, ShardImage)
        data = bytearray(tar.read_bytes())
        data[first.offset + first.length // 2] ^= 4
        tar.write_bytes(data)
    elif fault == "truncated":
        os.truncate(tar, 3000)
    elif fault == "missing":
        tar.unlink()
    elif fault == "no file":
        tar.unlink()
        tar.mkdir()


@pytest.mark.parametrize(
    ("fault", "says", "lost"),
    [
        ("flipped bit", "checksum differs from the index", 1),
        ("truncated", "bytes before the image does", 2),
        ("missing", "there is no such tar", 2),
        ("no file", r"the tar cannot be read \(Is a directory\)", 2),
    ],
)
def test_damage_is_counted_as_unreadable_photos(own: Path, fault: str, says: str, lost: int) -> None:
    damage(own, fault)
    manifest = load(own)
    with pytest.raises(DataError, match=f"{says}.*expected.*: .*copy|mount") as caught:
        manifest[4].image.read()
    assert str(own / "shard-000001.tar: 000000004.png") in str(caught.value)
    report = check_images(manifest, max_share=0.2)
    assert [name for name, _ in report.unreadable] == ["id/4", "id/5"][:lost]
    assert len(report.readable) == 12 - lost
    with pytest.raises(DataError, match=rf"{lost} of 12 photos .* are unreadable"):
        check_images(manifest, max_share=0.01)


def test_a_tar_that_was_mended_is_read_at_once(own: Path) -> None:
    """Processes that run for days hold the damaged file open."""
    tar, image = own / "shard-000001.tar", load(own)[4].image
    whole = tar.read_bytes()
    damage(own, "truncated")
    with pytest.raises(DataError, match="bytes before the image does"):
        image.read()
    (own / "copied").write_bytes(whole)
    (own / "copied").replace(tar)
    image.read()


def test_a_damaged_mask_names_the_tar(own: Path) -> None:
    mask = load(own)[0].mask
    assert isinstance(mask, PngMask)
    assert isinstance(mask.image, ShardImage)
    data = bytearray((own / "shard-000000.tar").read_bytes())
    data[mask.image.offset + 40] ^= 1
    (own / "shard-000000.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"shard-000000\.tar: 000000000\.mask\.png: checksum differs"):
        mask.bits()


def edit(name: str, old: bytes, new: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes().replace(old, new))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "shards.json").write_text("{"), "shards.json: cannot be read"),
        (lambda folder: (folder / "shards.json").write_text("[]"), "shards.json: cannot be read"),
        (edit("shards.json", b'"format": 1', b'"format": 2'), "has format 2, expected at most 1"),
        (edit("shards.json", b'"kind"', b'"sort"'), "shards.json: cannot be read"),
        (lambda folder: (folder / "index.parquet").unlink(), "index.parquet: cannot be read"),
        (edit("index.parquet", b"PAR1", b"PAR2"), "index.parquet: checksum differs"),
    ],
)
def test_a_damaged_set_is_told(own: Path, change: Callable[[Path], object], says: str) -> None:
    change(own)
    with pytest.raises(DataError, match=says):
        load(own)


def test_an_index_that_does_not_fit_its_set(own: Path) -> None:
    shards = index.read_set(own)
    rows = index.read_index(own, shards).to_pylist()

    def rewrite(rows: list[dict[str, Any]]) -> None:
        kept = {name: getattr(shards, name) for name in ("name", "kind", "source", "shards", "settings")}
        index.write_set(own, rows, **kept)

    rewrite([{**row, "shard": 9} for row in rows])
    with pytest.raises(DataError, match="names tar 9, but the set has only 5"):
        load(own)
    rewrite([*rows, rows[0]])
    with pytest.raises(DataError, match="has an id twice"):
        load(own)
    rewrite([])
    with pytest.raises(DataError, match="has no samples"):
        load(own)


# Descriptors


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def write_sparse_set(folder: Path, count: int, size: int, length: int) -> list[bytes]:
    """A set of empty tars of ``size`` bytes with one picture in each, at a random offset."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    offsets = generator.integers(0, size - length, count).tolist()
    pictures = [generator.bytes(length) for _ in range(count)]
    rows = []
    for number, (offset, data) in enumerate(zip(offsets, pictures, strict=True)):
        with (folder / f"shard-{number:06d}.tar").open("wb") as file:
            file.truncate(size)
            os.pwrite(file.fileno(), data, offset)
        row = {"key": f"{number:09d}", "shard": number, "extension": "jpg", "offset": offset}
        row |= {"length": length, "crc32": zlib.crc32(data), "sha256": hashlib.sha256(data).hexdigest()}
        rows.append(row | {"width": 64, "height": 64, "id": str(number), "label": number % 2})
    names = [f"shard-{number:06d}.tar" for number in range(count)]
    tars = tuple(ShardFile(name, size, "0" * 64, 1) for name in names)
    index.write_set(folder, rows, name="shard", kind="original", source="-", shards=tars, settings={})
    return pictures


def test_ten_thousand_shards_of_a_gigabyte_cost_no_more_than_a_few(tmp_path: Path) -> None:
    count, size = 10_000, 1_000_000_000
    pictures = write_sparse_set(tmp_path / "set", count, size, length=300)
    before = open_descriptors()
    manifest = load(tmp_path / "set")
    assert len(manifest) == count
    assert open_descriptors() == before  # no tar is opened for the manifest
    order = np.random.default_rng(1).permutation(count)[:4000].tolist()
    most = 0
    tracemalloc.start()
    for done, row in enumerate(order):
        assert manifest[row].image.read() == pictures[row]
        if done % 500 == 0:
            most = max(most, open_descriptors())
        if done == 200:  # the cache of descriptors is full
            grown = tracemalloc.get_traced_memory()[0]
    grown = tracemalloc.get_traced_memory()[0] - grown
    tracemalloc.stop()
    assert most <= before + MOST_OPEN
    assert grown < 50_000
    shutil.rmtree(tmp_path / "set")


def numbered_files(folder: Path, count: int) -> list[str]:
    for number in range(count):
        (folder / str(number)).write_bytes(bytes([number]) * 5000)
    return [str(folder / str(number)) for number in range(count)]


def test_threads_share_the_descriptors(tmp_path: Path) -> None:
    """Files are closed for others while they are being read, and never under a reader."""
    paths = numbered_files(tmp_path, 40)
    files = Descriptors(most=3)
    before = open_descriptors()

    def read(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, 40, 400).tolist():
            assert files.read(paths[number], 1000, 3000) == bytes([number]) * 3000

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    assert len(files) == 3
    assert open_descriptors() == before + 3


def test_a_file_is_closed_by_its_last_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = numbered_files(tmp_path, 3)
    files = Descriptors(most=1)
    reading, may_go_on = threading.Event(), threading.Event()
    pread = os.pread

    def slow(descriptor: int, length: int, offset: int) -> bytes:
        if threading.current_thread() is not threading.main_thread():
            reading.set()
            assert may_go_on.wait(10)
        return pread(descriptor, length, offset)

    monkeypatch.setattr(descriptors.os, "pread", slow)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(files.read, paths[0], 0, 10)
        assert reading.wait(10)
        for path in paths[1:]:  # each puts the one before out of the cache
            files.read(path, 0, 10)
        may_go_on.set()
        assert waiting.result(10) == bytes(10)


def test_short_reads_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = numbered_files(tmp_path, 1)
    pread = os.pread
    monkeypatch.setattr(descriptors.os, "pread", lambda fd, length, offset: pread(fd, min(length, 7), offset))
    files = Descriptors()
    assert files.read(path, 0, 100) == bytes(100)
    assert files.read(path, 4990, 100) == bytes(10)


def read_in_child(images: list[ImageSource], pipe: Any) -> None:
    pipe.send([image.read() for image in images])
    pipe.send(len(open_files))


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # Python 3.12: threads are about
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_processes_read_the_same(table: Path, shards: Path, method: str) -> None:
    images = [sample.image for sample in load(shards)]
    expected = [image.read() for image in images]
    context = get_context(method)
    stop = threading.Event()
    # While another thread holds the lock now and then: a fork must not inherit it locked.

    def read_on() -> None:
        while not stop.is_set():
            images[0].read()

    thread = threading.Thread(target=read_on)
    thread.start()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=read_in_child, args=(images, theirs))
    process.start()
    theirs.close()
    assert ours.poll(60)
    assert ours.recv() == expected
    assert ours.recv() >= 1
    process.join(10)
    assert process.exitcode == 0
    stop.set()
    thread.join()
    assert [image.read() for image in images] == expected


def test_a_file_is_opened_again_after_it_was_forgotten(tmp_path: Path) -> None:
    (path,) = numbered_files(tmp_path, 1)
    files = Descriptors()
    assert files.read(path, 0, 2) == bytes(2)
    Path(path).with_suffix(".new").write_bytes(b"ab")
    Path(path).with_suffix(".new").replace(path)
    assert files.read(path, 0, 2) == bytes(2)  # the open file is what its index describes
    files.forget(path)
    assert files.read(path, 0, 2) == b"ab"
