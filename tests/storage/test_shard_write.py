import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from support.ranks import spawn
from support.shards import contents, load, picture, write_photos, write_set

from roadwork_dist.common.errors import ConfigError, DataError, RunLockedError
from roadwork_dist.photos.images import FileImage
from roadwork_dist.photos.manifest import Manifest, Sample
from roadwork_dist.storage.shards import folder as folder_module
from roadwork_dist.storage.shards import parts, write
from roadwork_dist.storage.shards.image import ShardImage
from roadwork_dist.storage.shards.index import ShardSet, read_set
from roadwork_dist.storage.shards.plan import ShardOptions, plan_shards
from roadwork_dist.storage.shards.tar import TarWriter


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def undisturbed(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set that one process wrote in one go."""
    out = tmp_path_factory.mktemp("sets") / "undisturbed"
    done = write_set(table, out)
    assert (done.written, done.kept) == (len(done.shards.shards), 0)
    assert len(done.shards.shards) > 3
    return out


# What is written


def read_with_webdataset(folder: Path, *decoders: str) -> list[dict[str, Any]]:
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves files to the garbage collector
        return list(webdataset.WebDataset(tars, shardshuffle=False).decode(*decoders))


def test_the_webdataset_library_reads_the_same_samples(table: Path, undisturbed: Path) -> None:
    manifest = load(table)
    read = read_with_webdataset(undisturbed)
    assert [sample["__key__"] for sample in read] == [f"{row:09d}" for row in range(len(manifest))]
    for sample, own in zip(read, manifest, strict=True):
        known = sample["json"]
        assert known["id"] == own.id
        assert known["label"] == own.label
        assert known.get("latitude") == own.latitude
        assert known.get("description") == own.description
        assert (known["width"], known["height"]) == (96, 72)
        assert sample["png" if "png" in sample else "jpg"] == own.image.read()
        assert ("mask.png" in sample) == (own.mask is not None)


def test_the_webdataset_library_decodes_photos_and_masks(table: Path, undisturbed: Path) -> None:
    first = read_with_webdataset(undisturbed, "pil")[0]
    assert first["jpg"].size == (96, 72)
    own = load(table)[0].mask
    assert own is not None
    assert np.array_equal(np.asarray(first["mask.png"].convert("L")), own.bits())


def test_unknown_fields_are_absent(undisturbed: Path) -> None:
    first = read_with_webdataset(undisturbed)[0]["json"]
    assert set(first) == {"id", "label", "group", "width", "height"}


def test_bytes_do_not_depend_on_the_number_of_processes(
    table: Path, undisturbed: Path, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    write.write_shards(
        load(table),
        tmp_path / "two",
        ShardOptions(size=30_000),
        workers=2,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert contents(tmp_path / "two") == contents(undisturbed)
    assert seen[-1] == (12, 12)


def test_shards_keep_to_their_size(table: Path, undisturbed: Path) -> None:
    shards = read_set(undisturbed)
    assert max(shard.bytes for shard in shards.shards) <= 30_000
    assert all((undisturbed / shard.name).stat().st_size == shard.bytes for shard in shards.shards)
    assert shards.samples == 12
    # What was planned from file sizes is what was written.
    jobs = plan_shards(load(table), ShardOptions(size=30_000))
    assert [job.expected_bytes for job in jobs] == [shard.bytes for shard in shards.shards]


def test_a_photo_larger_than_a_shard_has_one_of_its_own(table: Path) -> None:
    jobs = plan_shards(load(table), ShardOptions(size=10_240))
    large = [job for job in jobs if job.expected_bytes > 10_240]
    assert large
    assert all(len(job.samples) == 1 for job in large)


def test_shuffled_shards_hold_the_same_photos_in_another_order(table: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        write_set(table, tmp_path / out, shuffle=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    ids = load(tmp_path / "a").ids
    assert sorted(ids) == sorted(load(table).ids)
    assert ids != load(table).ids


def test_masks_that_are_no_file_become_pngs(tmp_path: Path) -> None:
    class Drawn:
        name = "drawn"

        def content(self) -> bytes:
            return b"drawn"

        def bits(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
            return np.full((72, 96), 5, np.uint8)

    (tmp_path / "a.jpg").write_bytes(picture(1))
    manifest = Manifest("one", (Sample("a", FileImage(tmp_path / "a.jpg"), mask=Drawn()),))
    write.write_shards(manifest, tmp_path / "out", ShardOptions())
    mask = load(tmp_path / "out")[0].mask
    assert mask is not None
    assert np.array_equal(mask.bits(), Drawn().bits())


# What goes wrong


def test_unreadable_photos_are_left_out_and_told(table: Path, tmp_path: Path) -> None:
    copy = write_photos(tmp_path / "photos")
    (copy.parent / "photo-3.jpg").write_bytes(picture(3)[:500])
    (copy.parent / "mask-6.png").write_bytes(b"no picture")
    (copy.parent / "photo-8.jpg").unlink()
    done = write_set(copy, tmp_path / "out", max_share=0.25)
    assert [id_ for id_, _ in done.shards.unreadable] == ["id/3", "id/6", "id/8"]
    assert "photo-3.jpg" in done.shards.unreadable[0][1]
    assert read_set(tmp_path / "out") == done.shards
    manifest = load(tmp_path / "out")
    assert len(manifest) == 9
    keys = [sample["__key__"] for sample in read_with_webdataset(tmp_path / "out")]
    assert keys == [f"{row:09d}" for row in range(12) if row not in (3, 6, 8)]


@pytest.mark.parametrize("workers", [1, 2])
def test_too_many_unreadable_photos_stop_it(tmp_path: Path, workers: int) -> None:
    table = write_photos(tmp_path / "photos")
    for number in (0, 1):
        (table.parent / f"photo-{number}.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"2 of 12 photos \(16\.7%\) are unreadable"):
        write_set(table, tmp_path / "out", max_share=0.1, workers=workers)
    assert not (tmp_path / "out" / "shards.json").exists()
    with pytest.raises(DataError, match="start that command again"):
        load(tmp_path / "out")


def test_a_mended_photo_is_written_and_other_shards_are_kept(tmp_path: Path) -> None:
    table = write_photos(tmp_path / "photos")
    whole = (table.parent / "photo-3.jpg").read_bytes()
    (table.parent / "photo-3.jpg").write_bytes(b"x" * len(whole))
    first = write_set(table, tmp_path / "out", max_share=0.5)
    assert first.shards.samples == 11
    assert write_set(table, tmp_path / "out", max_share=0.5).written == 0
    (table.parent / "photo-3.jpg").write_bytes(whole)
    second = write_set(table, tmp_path / "out")
    assert (second.written, second.kept) == (1, len(first.shards.shards) - 1)
    assert second.shards.samples == 12
    assert second.shards.unreadable == ()


def test_a_full_disk_leaves_finished_shards_and_nothing_half(
    table: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, room = TarWriter.__init__, 30_000

    class FullDisk(io.BufferedWriter):
        def write(self, data: Any) -> int:
            nonlocal room
            room -= len(data)
            if room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    def begin_on_it(self: TarWriter, path: Path) -> None:
        begin(self, path)
        self._file = FullDisk(self._file.detach())

    with monkeypatch.context() as patch:
        patch.setattr(TarWriter, "__init__", begin_on_it)
        with pytest.raises(OSError, match=r"No space left on device: '.*shard-000001\.tar'"):
            write_set(table, tmp_path / "out")
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert "shard-000000.tar" in left
    assert not [name for name in left if name.endswith(".tmp")]
    assert write_set(table, tmp_path / "out").kept >= 1
    assert contents(tmp_path / "out") == contents(undisturbed)


def test_a_disk_without_room_is_told_before_anything_is_written(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(DataError, match="GB are free: make room"):
        write_set(table, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_folder_of_something_else_is_left_alone(table: Path, undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        write_set(table, tmp_path)
    with pytest.raises(ConfigError, match="holds shards with size 30000, now it is 40000"):
        write_set(table, undisturbed, size=40_000)


def test_shards_are_not_made_of_compact_shards(undisturbed: Path) -> None:
    first = load(undisturbed)[0]
    assert isinstance(first.image, ShardImage)
    reduced = replace(first, image=replace(first.image, original_size=(4032, 3024)))
    with pytest.raises(DataError, match="set of compact shards"):
        plan_shards(Manifest("compact", (reduced,)), ShardOptions())


def test_two_writers_of_one_folder(table: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with folder_module.locked(tmp_path / "out"), pytest.raises(RunLockedError, match="another process"):
        write_set(table, tmp_path / "out")
    write_set(table, tmp_path / "out")


# Resume


def die_at(table: Path, out: Path, moment: str) -> None:
    """Write a set in this process, and be killed in the middle."""

    def kill(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_at_call(number: int, real: Callable[..., Any]) -> Callable[..., Any]:
        calls = iter(range(1, 1000))
        return lambda *args, **kwargs: kill() if next(calls) == number else real(*args, **kwargs)

    if moment == "in a tar":
        TarWriter.add = kill_at_call(16, TarWriter.add)  # type: ignore[method-assign]
    elif moment == "before the record":
        parts.Part.save = kill_at_call(3, parts.Part.save)  # type: ignore[method-assign]
    elif moment == "before shards.json":
        ShardSet.to_json = kill  # type: ignore[method-assign]
    else:
        write.remove_parts = kill
    write_set(table, out)


@pytest.mark.parametrize("moment", ["in a tar", "before the record", "before shards.json", "before tidying"])
def test_a_killed_writer_goes_on_where_it_was(
    table: Path, undisturbed: Path, tmp_path: Path, moment: str
) -> None:
    out = tmp_path / "out"
    assert spawn(die_at, table, out, moment)[0].code == -signal.SIGKILL
    assert (out / "shards.json").exists() == (moment == "before tidying")
    before = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    assert before
    done = write_set(table, out)
    total = len(done.shards.shards)
    recorded = {"in a tar": 2, "before the record": 2}.get(moment, total)
    assert (done.written, done.kept) == (total - recorded, recorded)
    assert contents(out) == contents(undisturbed)
    after = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    assert sum(after[name] == inode for name, inode in before.items()) == recorded


def test_a_finished_shard_that_was_damaged_is_written_again(
    table: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_set(table, out)
    tar = out / "shard-000001.tar"
    data = bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.write_bytes(data)
    (out / "shard-000002.tar").unlink()
    done = write_set(table, out)
    assert (done.written, done.kept) == (2, len(done.shards.shards) - 2)
    assert contents(out) == contents(undisturbed)


def test_killing_a_writer_with_processes_leaves_none_behind(tmp_path: Path) -> None:
    """SIGKILL from outside, at whatever moment, with two real writing processes."""
    table = write_photos(tmp_path / "photos", count=60, size=(640, 480))
    out = tmp_path / "killed"
    words = [str(table), str(out), "--size", "100KB", "--workers", "2"]
    command = [sys.executable, "-m", "roadwork_dist.cli.main", "shard", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as writer:
        while writer.poll() is None and len(list(out.glob("*.tar"))) < 3:
            time.sleep(0.002)
        writer.kill()
    deadline = time.monotonic() + 20
    while members_of_session(writer.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not members_of_session(writer.pid)
    assert not (out / "shards.json").exists()
    finished = {path.name for path in out.glob(".*.part.json")}
    done = write_set(table, out, size=100_000)
    assert done.kept == len(finished) >= 1
    write_set(table, tmp_path / "undisturbed", size=100_000)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_a_writing_process_whose_command_is_dead_already_ends_at_once() -> None:
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    home = "roadwork_dist.common.worker"
    begin = f"from {home} import end_with_parent; end_with_parent({dead.pid}); print('on')"
    ended = subprocess.run([sys.executable, "-c", begin], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "")


def members_of_session(session: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_records_of_the_plan_are_gone_at_the_end(undisturbed: Path) -> None:
    names = {path.name for path in undisturbed.iterdir()}
    assert names == {"index.parquet", "shards.json", *(f"shard-{n:06d}.tar" for n in range(len(names) - 2))}
    assert json.loads((undisturbed / "shards.json").read_text())["format"] == 1
