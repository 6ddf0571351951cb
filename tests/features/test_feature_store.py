"""The store itself: what is put is got, by any process, after any mishap."""

import dataclasses
import errno
import json
import os
import pickle
import signal
import subprocess
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.disks import make_read_only, small_file_system
from support.ranks import spawn
from torch import Tensor

from roadwork_dist.common import flock
from roadwork_dist.common.errors import ConfigError, DataError
from roadwork_dist.config.experiment import AugmentConfig
from roadwork_dist.features.store import FeatureSpace, FeatureStore, checking
from roadwork_dist.features.store import feature_store as store_module
from roadwork_dist.features.store.index import Entries, concatenate, empty_entries, read_index, write_index
from roadwork_dist.features.store.locks import FileLock, is_locked
from roadwork_dist.features.store.part import PartFiles, parts_in
from roadwork_dist.features.store.upkeep import Removal, plan_pruning, remove, summary_of
from roadwork_dist.photos.augment import Augmenter
from roadwork_dist.photos.views import ViewGeometry

SIDE = 48
WIDTH = 8
SPACE = FeatureSpace(ViewGeometry(SIDE).identity(), None, "tiny conv", "fp32")


def features_of(number: int) -> Tensor:
    """Twelve views, or one of every third photo."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(1 if number % 3 == 2 else 12, WIDTH, generator=generator)


def filled(root: Path, numbers: range = range(20)) -> FeatureStore:
    with FeatureStore(root, SPACE) as store:
        for number in numbers:
            store.put(f"c{number}", f"s{number}", None, features_of(number))
    return store


def assert_holds(store: FeatureStore, numbers: range = range(20)) -> None:
    names = [f"c{number}" for number in numbers]
    values, counts = store.read(names, [f"s{number}" for number in numbers], None)
    assert counts.tolist() == [len(features_of(number)) for number in numbers]
    assert torch.equal(values, torch.cat([features_of(number) for number in numbers]))


def only_part(store: FeatureStore) -> PartFiles:
    (part,) = parts_in(store.folder / "parts")
    return part


@pytest.mark.parametrize(
    "change", ["size", "grid", "policy", "augment", "seed", "strength", "backbone", "dtype"]
)
def test_every_field_of_the_identity_changes_the_key(change: str) -> None:
    base = dataclasses.replace(SPACE, augment=Augmenter(AugmentConfig(), 1).identity())
    changed = {
        "size": {"views": ViewGeometry(49).identity()},
        "grid": {"views": ViewGeometry(SIDE, grid=4).identity()},
        "policy": {"views": ViewGeometry(SIDE, policy="all").identity()},
        "augment": {"augment": None},
        "seed": {"augment": Augmenter(AugmentConfig(), 2).identity()},
        "strength": {"augment": Augmenter(AugmentConfig(strength=0.5), 1).identity()},
        "backbone": {"backbone": "tiny conv, other weights"},
        "dtype": {"dtype": "bf16"},
    }[change]
    assert dataclasses.replace(base, **changed).key != base.key  # type: ignore[arg-type]
    assert dataclasses.replace(base).key == base.key


def test_features_of_another_kind_are_refused_by_the_field(tmp_path: Path) -> None:
    folder = filled(tmp_path).folder
    renamed = folder.rename(tmp_path / "given to me")
    assert_holds(FeatureStore(renamed, SPACE))  # the folder of one space is a store as well
    for other, told in [
        ({"views": ViewGeometry(64).identity()}, r"views\.size is 48, expected 64: use the settings"),
        ({"backbone": "large"}, r'backbone is "tiny conv", expected "large"'),
        ({"dtype": "bf16"}, r'dtype is "fp32", expected "bf16"'),
        ({"augment": {"seed": 1}}, r'augment is null, expected \{"seed": 1\}'),
    ]:
        with pytest.raises(ConfigError, match=told):
            FeatureStore(renamed, dataclasses.replace(SPACE, **other))  # type: ignore[arg-type]


def test_a_new_kind_of_features_says_what_differs_from_the_old_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path)
    with caplog.at_level("INFO"):
        FeatureStore(tmp_path, dataclasses.replace(SPACE, dtype="bf16"))
    assert 'dtype is "fp32", expected "bf16"' in caplog.text


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0.0), ("bf16", 2**-8)])
def test_what_is_put_is_got(tmp_path: Path, dtype: Any, tolerance: float) -> None:
    store = FeatureStore(tmp_path, dataclasses.replace(SPACE, dtype=dtype))
    features = torch.randn(WIDTH, 12).T  # not contiguous
    assert not store.has("aabb", "s", None)
    store.put("aabb", "s", None, features)
    assert store.has("aabb", "s", None)
    assert store.get("aabb", "s", None).dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    torch.testing.assert_close(store.get("aabb", "s", None).float(), features, rtol=tolerance, atol=0)
    assert store.has("aabb", "another id", None), "plain features belong to the content"
    store.put("none", "s", None, torch.empty(0, WIDTH))
    assert store.get("none", "s", None).shape == (0, WIDTH)
    with pytest.raises(DataError, match="'s': its features are of width 5, expected 8"):
        store.put("wide", "s", None, torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"expected \[V, D\]"):
        store.put("flat", "s", None, torch.zeros(WIDTH))


def test_what_is_put_does_not_change_with_the_tensor_it_came_from(tmp_path: Path) -> None:
    store, buffer = FeatureStore(tmp_path, SPACE), torch.ones(2, WIDTH)
    store.put("a", "s", None, buffer)
    buffer.zero_()
    assert store.get("a", "s", None).sum() == 2 * WIDTH


def test_augmented_features_belong_to_content_sample_and_copy(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, dataclasses.replace(SPACE, augment={"seed": 1}))
    store.put("aabb", "s", 0, torch.zeros(1, WIDTH))
    assert store.has("aabb", "s", 0)
    for other in [("aabb", "s", 1), ("aabb", "t", 0), ("aabc", "s", 0)]:
        assert not store.has(*other)
    with pytest.raises(ValueError, match="copy is None"):
        store.has("aabb", "s", None)


def test_one_part_is_gone_on_with_and_order_of_reading_is_free(tmp_path: Path) -> None:
    filled(tmp_path, range(10))
    store = filled(tmp_path, range(10, 20))
    only_part(store)
    again = FeatureStore(tmp_path, SPACE)
    assert_holds(again)
    rows = np.random.default_rng(0).permutation(20).tolist()
    values, _ = again.read([f"c{row}" for row in rows], [""] * 20, None)
    assert torch.equal(values, torch.cat([features_of(row) for row in rows]))
    assert torch.equal(pickle.loads(pickle.dumps(again)).get("c3", "s3", None), features_of(3))
    assert again.present(["c1", "x", "c2"], ["", "", ""], None).tolist() == [True, False, True]
    assert again.views_of(["c1", "x", "c2"], ["", "", ""], None).tolist() == [12, 0, 1]


def test_entries_are_known_to_others_when_they_are_flushed(tmp_path: Path) -> None:
    writer, reader = FeatureStore(tmp_path, SPACE), FeatureStore(tmp_path, SPACE)
    writer.put("c0", "s0", None, features_of(0))
    with pytest.raises(DataError, match=r"sample 's0': its stored features .* start the same command again"):
        reader.get("c0", "s0", None)
    writer.flush()
    assert torch.equal(reader.get("c0", "s0", None), features_of(0))
    writer.put("c1", "s1", None, features_of(1))
    writer.close()
    assert torch.equal(reader.get("c1", "s1", None), features_of(1)), "the part has grown behind the map"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[PartFiles], object], int]] = {
    "flipped bit": (lambda part: flip(part.values, 12 * WIDTH * 4 + 5), 1),
    "truncated": (lambda part: os.truncate(part.values, part.values.stat().st_size - 1), 1),
    "torn in the middle": (lambda part: os.truncate(part.values, 12 * WIDTH * 4), 19),
    "empty": (lambda part: part.values.write_bytes(b""), 20),
    "missing": (lambda part: part.values.unlink(), 20),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entries_count_as_absent_and_can_be_put_again(tmp_path: Path, damage: str) -> None:
    part = only_part(filled(tmp_path))
    inflict, count = DAMAGES[damage]
    inflict(part)
    store = FeatureStore(tmp_path, SPACE)
    with pytest.warns(RuntimeWarning, match=rf"is damaged \({count} of 20 entries.*computed again"):
        store.check()
    absent = [k for k in range(20) if not store.has(f"c{k}", f"s{k}", None)]
    assert len(absent) == count
    for number in absent:
        store.put(f"c{number}", f"s{number}", None, features_of(number))
    store.close()
    again = FeatureStore(tmp_path, SPACE)
    again.check()  # quietly
    assert_holds(again)


def test_a_damaged_entry_that_is_met_while_reading_is_told_and_forgotten(tmp_path: Path) -> None:
    part = only_part(filled(tmp_path))
    store = FeatureStore(tmp_path, SPACE)
    stat = part.values.stat()
    flip(part.values, 3)
    os.utime(part.values, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # a disk that rots changes no times
    store.check()
    assert store.has("c0", "s0", None)
    with pytest.raises(DataError, match=r"sample 's0'.*at byte 0\) are damaged: start the same command"):
        store.read(["c1", "c0"], ["s1", "s0"], None)
    assert FeatureStore(tmp_path, SPACE).present(["c0", "c1"], ["s0", "s1"], None).tolist() == [False, True]


@pytest.mark.parametrize("loss", ["all", "json", "file", "torn", "text"])
def test_an_index_that_is_lost_is_built_again_from_the_logs(tmp_path: Path, loss: str) -> None:
    folder = filled(tmp_path).folder
    (index,) = folder.glob("index-*.bin")
    if loss in ("all", "json"):
        (folder / "index.json").unlink()
    if loss in ("all", "file"):
        index.unlink()
    if loss == "torn":
        os.truncate(index, 100)
    if loss == "text":
        (folder / "index.json").write_text("{")
    is_noticed = loss in ("file", "torn", "text")
    with pytest.warns(RuntimeWarning, match="the index is built again") if is_noticed else nullcontext():
        store = FeatureStore(tmp_path, SPACE)
        assert_holds(store)
        store.catalogue.merge()
    assert_holds(FeatureStore(tmp_path, SPACE))


def test_an_index_that_is_replaced_while_it_is_opened_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path)
    memmap = np.memmap

    def replaced(*args: Any, **options: Any) -> Any:
        monkeypatch.undo()
        filled(tmp_path, range(20, 30))
        return memmap(*args, **options)

    monkeypatch.setattr(np, "memmap", replaced)
    assert_holds(FeatureStore(tmp_path, SPACE), range(30))


def test_files_that_vanish_while_a_space_is_looked_at_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = filled(tmp_path).folder
    size = summary_of(folder).size
    stat = Path.stat

    def vanishing(path: Path, **options: Any) -> os.stat_result:
        """As if a process that writes there had replaced the file behind the first look at it."""
        state = stat(path, **options)
        if path.suffix == ".tmp":
            path.unlink()
        return state

    monkeypatch.setattr(Path, "stat", vanishing)
    for name in ("index-1.tmp", ".manifest.json.1.tmp", "parts/0001.tmp"):
        (folder / name).touch()
    assert summary_of(folder).size == size
    (folder / "index-1.tmp").touch()
    assert [removal.size for removal in plan_pruning(tmp_path, older_than=0.0)] == [size]
    (folder / "index-1.bin").symlink_to("gone")
    monkeypatch.setattr(flock, "HAS_FLOCK", False)
    assert "has changed" in str(remove(Removal(folder, size, "")))


def test_a_flipped_bit_in_a_log_costs_its_entry_only(tmp_path: Path) -> None:
    store = filled(tmp_path)
    flip(only_part(store).log, 64 + 40 * 7 + 17)  # in its offset
    (store.folder / "index.json").unlink()
    store = FeatureStore(tmp_path, SPACE)
    assert [k for k in range(20) if not store.has(f"c{k}", "", None)] == [7]
    store.put("c7", "s7", None, features_of(7))
    store.close()
    assert_holds(FeatureStore(tmp_path, SPACE))


def test_the_newer_of_two_entries_counts(tmp_path: Path) -> None:
    one, two = FeatureStore(tmp_path, SPACE), FeatureStore(tmp_path, SPACE)
    for number in range(20):  # two runs compute the same at once
        one.put(f"c{number}", f"s{number}", None, features_of(number))
        two.put(f"c{number}", f"s{number}", None, features_of(number))
        if number % 5 == 4:
            one.flush()
            two.flush()
    two.close()
    one.close()
    store = FeatureStore(tmp_path, SPACE)
    assert_holds(store)
    assert len(parts_in(store.folder / "parts")) == 2
    assert len(store.catalogue.merged) == 20


def put_and_die(root: Path, flushed: int) -> None:
    store = FeatureStore(root, SPACE)
    for number in range(flushed):
        store.put(f"c{number}", f"s{number}", None, features_of(number))
    store.flush()
    writer = store._writer
    assert writer is not None
    writer._lock.write_at = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    store.put("late", "late", None, features_of(0))
    store.flush()  # its values are on the disk, its record is not


def test_a_kill_loses_the_unflushed_tail_only(tmp_path: Path) -> None:
    (killed,) = spawn(put_and_die, tmp_path, 12)
    assert killed.code == -signal.SIGKILL, killed.error
    store = FeatureStore(tmp_path, SPACE)
    part = only_part(store)
    store.check()
    assert_holds(store, range(12))
    assert not store.has("late", "late", None)
    size = part.values.stat().st_size
    store.put("c12", "s12", None, features_of(12))
    store.close()
    assert part.values.stat().st_size == size, "the tail was overwritten"
    assert_holds(FeatureStore(tmp_path, SPACE), range(13))
    only_part(store)


def test_a_torn_record_does_not_count(tmp_path: Path) -> None:
    store = filled(tmp_path)
    part = only_part(store)
    (store.folder / "index.json").unlink()
    os.truncate(part.log, part.log.stat().st_size - 7)
    store = FeatureStore(tmp_path, SPACE)
    assert_holds(store, range(19))
    assert not store.has("c19", "s19", None)


def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(tmp_path)
    write = os.write

    def half(handle: int, content: Any) -> int:
        monkeypatch.setattr(os, "write", full)
        return write(handle, content[: len(content) // 2])

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    store.put("c20", "s20", None, features_of(20))
    monkeypatch.setattr(os, "write", half)
    with pytest.raises(ConfigError, match=r"disk of the feature store .* is full: make room, or set"):
        store.flush()
    monkeypatch.undo()
    for number in range(20, 30):
        store.put(f"c{number}", f"s{number}", None, features_of(number))
    store.close()
    assert_holds(FeatureStore(tmp_path, SPACE), range(30))


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written .*set features\.dir"):
        FeatureStore(tmp_path / "file" / "store", SPACE)


def test_a_log_that_was_cut_is_not_gone_on_with(tmp_path: Path) -> None:
    part = only_part(filled(tmp_path))
    os.truncate(part.log, 64 + 40 * 5)  # its records are in the index all the same
    filled(tmp_path, range(20, 30))
    assert len(parts_in(part.folder)) == 2
    assert_holds(FeatureStore(tmp_path, SPACE), range(30))


def test_a_store_that_may_only_be_read_can_be_read(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "disk", "1m") as root:
        part = only_part(filled(root))
        os.utime(part.values)
        for name in ("in-use.lock", "check.lock"):
            (part.folder.parent / name).unlink(missing_ok=True)
        make_read_only(root)
        store = FeatureStore(root, SPACE)
        store.check()
        assert_holds(store)
        store.put("new", "", None, features_of(0))
        with pytest.raises(ConfigError, match=r"cannot be written \(Read-only file system\)"):
            store.flush()


def test_parts_that_were_closed_in_order_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = only_part(filled(tmp_path))
    read: list[str] = []
    real = checking.damaged_entries
    monkeypatch.setattr(checking, "damaged_entries", lambda p, *rest: read.append(p.name) or real(p, *rest))
    FeatureStore(tmp_path, SPACE).check()
    assert read == []
    os.utime(part.values)  # as a copy of the folder would
    FeatureStore(tmp_path, SPACE).check()
    FeatureStore(tmp_path, SPACE).check()
    assert read == [part.name]


def test_a_part_that_is_full_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roadwork_dist.features.store.part.PART_BYTES", 2000)
    monkeypatch.setattr(store_module, "PART_BYTES", 2000)
    monkeypatch.setattr(store_module, "FLUSH_BYTES", 1000)
    store = filled(tmp_path)
    assert 3 <= len(parts_in(store.folder / "parts")) <= 10
    assert_holds(FeatureStore(tmp_path, SPACE))


def some_entries(numbers: "np.ndarray[Any, Any]", part: int = 0) -> Entries:
    """Entries with spread keys; views are the number mod 13."""
    spread = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    low, offset = numbers.astype(np.uint64), numbers.astype(np.uint64) * np.uint64(8)
    columns = [np.full(len(numbers), part), numbers % 13, numbers % 7]
    return Entries(spread, low, offset, *(column.astype("<u4") for column in columns))


def test_merged_indexes_are_those_of_one_sort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roadwork_dist.features.store.index.CHUNK", 97)
    numbers = np.random.default_rng(0).permutation(2000)
    old, new = some_entries(numbers[:1500]).in_order(), some_entries(numbers[1000:], part=1)
    count = write_index(tmp_path / "index", old, new, dropped=[(0, int(numbers[3]) * 8)])
    index = read_index(tmp_path / "index")
    assert index is not None
    assert count == len(index) == 1999
    expected = concatenate([old, new]).in_order()
    expected = expected.take(expected.low != numbers[3])
    for got, wanted in zip(index.columns(), expected.columns(), strict=True):
        assert np.array_equal(got, wanted)
    asked = some_entries(np.arange(3000))
    rows = index.find(asked.high, asked.low)
    assert (rows >= 0).sum() == 1999
    assert np.array_equal(index.low[rows[rows >= 0]], np.flatnonzero(rows >= 0))


def test_keys_that_share_their_first_half_are_told_apart() -> None:
    high = np.array([1, 5, 5, 5, 9], dtype="<u8")
    low = np.array([0, 1, 2, 3, 0], dtype="<u8")
    rest = np.zeros(5, dtype="<u4")
    entries = Entries(high, low, low, rest, rest, rest).in_order()
    asked = np.array([5, 5, 5, 5, 5, 0, 9, 10], dtype="<u8")
    found = entries.find(asked, np.array([3, 1, 2, 0, 4, 0, 0, 0], dtype="<u8"))
    assert found.tolist() == [3, 1, 2, -1, -1, -1, 4, -1]
    assert empty_entries().find(asked, asked).tolist() == [-1] * 8


def test_a_large_store_opens_at_once_and_is_read_in_place(tmp_path: Path) -> None:
    """A million entries over parts of more than 4 GiB, simulated with sparse files."""
    store = filled(tmp_path, range(1))
    header = only_part(store).log.read_bytes()[:64]
    count, per_part = 1_000_000, 500_000
    spread = np.uint64(10_000)  # bytes between entries
    parts = []
    everything = []
    for number in range(2):
        files = PartFiles(store.folder / "parts", f"0000-{number}")
        files.log.write_bytes(header)
        files.values.touch()
        os.truncate(files.values, per_part * int(spread))
        entries = some_entries(np.arange(number * per_part, (number + 1) * per_part), part=number)
        offset = np.arange(per_part, dtype="<u8") * spread
        views = np.full(per_part, 1, dtype="<u4")
        everything.append(dataclasses.replace(entries, offset=offset, views=views))
        parts.append([files.name, 0, *files.state()])
    target = everything[1].take(np.array([per_part - 1]))
    value = np.arange(WIDTH, dtype="<f4")
    with (store.folder / "parts" / "0000-1.values").open("r+b") as file:
        file.seek(int(target.offset[0]))
        file.write(value.tobytes())
    everything[1].crc[-1] = zlib.crc32(value.tobytes())
    write_index(store.folder / "index-large.bin", empty_entries(), concatenate(everything))
    content = {"version": 1, "index": "index-large.bin", "parts": parts}
    (store.folder / "index.json").write_text(json.dumps(content))
    large = FeatureStore(tmp_path, SPACE)
    assert len(large.catalogue) == count + 1
    assert len(large.catalogue.recent) == 1, "only what is not merged is in memory"
    assert not any(column.flags.owndata for column in large.catalogue.merged.columns())
    large._entry_keys = lambda *_: (target.high, target.low)  # type: ignore[method-assign]
    assert large.get("x", "x", None).tolist() == [value.tolist()]


def test_a_long_write_is_flushed_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "FLUSH_SECONDS", 0.01)
    store = FeatureStore(tmp_path, SPACE)
    store.put("c0", "s0", None, features_of(0))
    time.sleep(0.02)
    store.put("c1", "s1", None, features_of(1))
    assert_holds(FeatureStore(tmp_path, SPACE), range(2))


def test_a_lock_does_not_stay_with_processes_started_meanwhile(tmp_path: Path) -> None:
    held = FileLock(tmp_path / "file", shared=False)
    child = subprocess.Popen(["sleep", "60"], pass_fds=[held._handle])
    try:
        assert is_locked(held.path)
        held.release()
        assert not is_locked(held.path)
    finally:
        child.kill()
        child.wait()
