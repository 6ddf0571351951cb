"""Files of a server through the cache: faults, bounds, several processes, kills."""

import errno
import hashlib
import os
import random
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import ranks
from support.file_server import FileServer, serve

from roadwork_dist.common import flock
from roadwork_dist.common.errors import ConfigError, DataError, MissingDependencyError
from roadwork_dist.storage.remote import download, transport
from roadwork_dist.storage.remote.cache import RemoteCache
from roadwork_dist.storage.remote.download import RemoteFile, read_whole, size_of
from roadwork_dist.storage.remote.read_ahead import fetch_alongside, read_ahead
from roadwork_dist.storage.remote.retry import Patience, Stop, StoppedError

QUICK = Patience(attempts=4, timeout=10.0, first_pause=0.01)
HASTY = Patience(attempts=4, timeout=0.5, first_pause=0.01)
"""For faults that are noticed by the clock only."""
BY_CLOCK = ("stall", "dribble")
MIB = 1 << 20


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    folder = tmp_path / "served"
    folder.mkdir()
    with serve(folder) as running:
        yield running


def put(server: FileServer, name: str, size: int = 3 * MIB) -> tuple[RemoteFile, bytes]:
    content = random.Random(name).randbytes(size)
    (server.folder / name).write_bytes(content)
    return RemoteFile(f"{server.url}/{name}", size, hashlib.sha256(content).hexdigest()), content


def cache_of(tmp_path: Path, mib: float = 100, patience: Patience = QUICK) -> RemoteCache:
    return RemoteCache(tmp_path / "cache", int(mib * MIB), patience)


def left_over(tmp_path: Path) -> list[str]:
    return sorted(path.suffix for path in (tmp_path / "cache").iterdir())


def wait_for_threads() -> None:
    """Until those that read ahead have ended, as they do by themselves."""
    deadline = time.monotonic() + 20
    while running := [thread for thread in threading.enumerate() if thread.name == "read-ahead"]:
        assert time.monotonic() < deadline, running
        time.sleep(0.01)


@pytest.mark.parametrize("fault", ["500", "503", "429", "short", "reset", "stall", "dribble", "flip"])
def test_a_fault_that_passes_is_not_noticed(server: FileServer, tmp_path: Path, fault: str) -> None:
    file, content = put(server, "a.tar")
    server.fault = lambda number, name: fault if number <= 2 else ""
    cache = cache_of(tmp_path, patience=HASTY if fault in BY_CLOCK else QUICK)
    assert cache.fetch(file).read_bytes() == content
    assert server.count == 3 or fault in BY_CLOCK
    assert left_over(tmp_path) == [".data", ".lock"]


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [("7", 7, 7), ("", 0, 0.01), ("soon", 0, 0.01), ("9999", 60, 60), ("date", 15, 21)],
)
def test_a_server_that_asks_for_a_pause_gets_it(
    server: FileServer, header: str, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    (server.folder / "a").write_bytes(b"content")
    server.retry_after = (
        format_datetime(datetime.now(UTC) + timedelta(seconds=20)) if header == "date" else header
    )
    server.fault = lambda number, name: "429" if number == 1 else ""
    pauses: list[float] = []
    monkeypatch.setattr(Stop, "sleep", lambda self, seconds: pauses.append(seconds))
    assert read_whole(f"{server.url}/a", QUICK) == b"content"
    assert len(pauses) == 1
    assert least <= pauses[0] <= most


def test_pauses_double_and_are_of_random_length(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.fault = lambda number, name: "500"
    pauses: list[float] = []
    monkeypatch.setattr(Stop, "sleep", lambda self, seconds: pauses.append(seconds))
    with pytest.raises(DataError):
        read_whole(f"{server.url}/a", Patience(attempts=12, first_pause=0.5))
    longest = [min(30.0, 0.5 * 2**number) for number in range(11)]
    assert all(top / 2 <= pause <= top for top, pause in zip(longest, pauses, strict=True))
    assert len({pause / top for top, pause in zip(longest, pauses, strict=True)}) == 11


def test_a_half_body_is_gone_on_with_not_read_again(server: FileServer, tmp_path: Path) -> None:
    file, content = put(server, "a.tar", 8 * MIB)
    server.fault = lambda number, name: "short" if number <= 3 else ""
    assert cache_of(tmp_path).fetch(file).read_bytes() == content
    assert [start for _, start, _ in server.asked] == [0, 4 * MIB, 6 * MIB, 7 * MIB]
    assert server.sent() == len(content)


def test_progress_counts_as_patience_a_server_that_gives_nothing_does_not(
    server: FileServer, tmp_path: Path
) -> None:
    file, content = put(server, "a.tar", 64 * MIB)
    server.fault = lambda number, name: "short" if number <= 5 else ""  # more than 4, each brings a MiB on
    assert cache_of(tmp_path).fetch(file).read_bytes() == content


def test_a_server_without_ranges_gives_all_again(server: FileServer, tmp_path: Path) -> None:
    file, content = put(server, "a.tar")
    server.knows_ranges = False
    server.fault = lambda number, name: "short" if number == 1 else ""
    cache = cache_of(tmp_path)
    assert cache.read(file, 1000, 50) == content[1000:1050]
    assert cache.fetch(file).read_bytes() == content


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("500", "the server answered 500 .*; tried 4 times"),
        ("429", "the server answered 429 .*; tried 4 times"),
        ("404", "the server answered 404 .*; tried once"),
        ("short", "the response ended after .* of 100,000 bytes; tried 4 times"),
        ("reset", "; tried 4 times"),
        ("stall", "the server did not answer in time; tried 4 times"),
        ("dribble", "bytes/s; tried 4 times|the server did not answer in time; tried 4 times"),
        ("flip", "its checksum differs from what shards.json says; tried 3 times"),
    ],
)
def test_a_fault_that_stays_is_told_and_rows_behind_it_fail_at_once(
    server: FileServer, tmp_path: Path, fault: str, told: str
) -> None:
    file, _ = put(server, "a.tar", 100_000)
    # Half a short body of a short body …: what is left must not shrink to nothing.
    server.fault = lambda number, name: fault
    server.knows_ranges = fault != "short"
    cache = cache_of(tmp_path, patience=HASTY if fault in BY_CLOCK else QUICK)
    with pytest.raises(DataError, match=f"{file.url}: cannot be fetched .*{told}"):
        cache.fetch(file)
    count = server.count
    for _ in range(20):
        with pytest.raises(DataError, match="cannot be fetched"):
            cache.read(file, 0, 100)
    assert server.count == count
    assert not list(cache.folder.glob("*.data"))
    server.fault = lambda number, name: ""
    assert cache_of(tmp_path).fetch(file)  # a run that is started again asks again


def test_a_server_that_is_gone_is_told(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{ranks.free_port()}/a.tar"
    with pytest.raises(DataError, match=f"{url}: cannot be fetched .*refused; tried 4 times"):
        read_whole(url, QUICK)


def test_a_dead_server_is_not_asked_for_file_after_file(server: FileServer, tmp_path: Path) -> None:
    files = [put(server, f"{number}.tar", 1000)[0] for number in range(50)]
    server.fault = lambda number, name: "500"
    cache = cache_of(tmp_path)
    for file in files:
        with pytest.raises(DataError, match="the server answered 500"):
            cache.fetch(file)
    assert server.count == 3 * 4


def test_another_file_than_shards_json_tells_is_refused(server: FileServer, tmp_path: Path) -> None:
    file, _ = put(server, "a.tar", 1000)
    (server.folder / "a.tar").write_bytes(b"x" * 900)
    with pytest.raises(DataError, match=r"file has 900 bytes, shards.json says 1,000; tried once"):
        cache_of(tmp_path).fetch(file)


def test_few_rows_of_a_file_are_read_by_ranges_many_fetch_it(server: FileServer, tmp_path: Path) -> None:
    file, content = put(server, "a.tar", 16 * MIB)
    cache = cache_of(tmp_path)
    for place in range(0, 10 * MIB, MIB):
        assert cache.read(file, place, 100_000) == content[place : place + 100_000]
    assert [size for _, _, size in server.asked] == [100_000] * 10
    assert cache.read(file, 5, 100_000) == content[5:100_005]
    assert server.asked[-1] == ("a.tar", 0, 16 * MIB)
    assert cache.read(file, 9, 7 * MIB) == content[9 : 9 + 7 * MIB]
    assert len(server.asked) == 11
    assert cache.read(file, 16 * MIB - 5, 100) == content[-5:]


def test_the_cache_keeps_to_its_bound_and_to_what_was_read_last(server: FileServer, tmp_path: Path) -> None:
    files = [put(server, f"{number}.tar", MIB)[0] for number in range(6)]
    cache = cache_of(tmp_path, mib=3.5)
    for number, file in enumerate(files):
        path = cache.fetch(file)
        os.utime(path, (number - 1000, number - 1000))
        if number >= 2:
            assert cache.has(files[0])
        cache.read(files[0], 0, 10)  # touches it
        assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= 3.5 * MIB
    assert [cache.has(file) for file in files] == [True, False, False, False, True, True]
    with pytest.raises(ConfigError, match=r"data.remote.cache_gb is 0.00342, expected room for a shard"):
        cache.fetch(put(server, "large.tar", 4 * MIB)[0])


def test_a_file_of_another_user_is_read(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, content = put(server, "a.tar")
    os.utime(cache_of(tmp_path).fetch(file), (0, 0))
    touched: list[object] = []

    def refuse(handle: object) -> None:
        touched.append(handle)
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    assert cache_of(tmp_path).read(file, 10, 20) == content[10:30]
    assert touched


def test_a_reader_keeps_the_file_that_makes_way(server: FileServer, tmp_path: Path) -> None:
    first, content = put(server, "first.tar", MIB)
    cache = cache_of(tmp_path, mib=1.5)
    with cache.fetch(first).open("rb") as reading:
        cache.fetch(put(server, "second.tar", MIB)[0])
        assert not cache.has(first)
        assert reading.read() == content


def test_a_file_that_rots_in_the_cache_is_fetched_again(server: FileServer, tmp_path: Path) -> None:
    file, content = put(server, "a.tar")
    cache = cache_of(tmp_path)
    path = cache.fetch(file)
    assert not cache.discard_if_damaged(file)
    path.write_bytes(b"\0" * len(content))
    assert cache.discard_if_damaged(file)
    assert cache.fetch(file).read_bytes() == content


def test_a_folder_that_cannot_be_used_is_told(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = put(server, "a.tar", 1000)
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ConfigError, match=r"taken: cannot be written to .*data.remote.cache_dir"):
        RemoteCache(tmp_path / "taken", MIB, QUICK).fetch(file)
    monkeypatch.setattr(flock, "HAS_FLOCK", False)
    with pytest.raises(
        ConfigError, match=r"cache: files there cannot be locked .this system or file .*data.remote.cache_dir"
    ):
        cache_of(tmp_path).fetch(file)


def test_a_full_disk_is_told(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, content = put(server, "a.tar", 1000)
    cache = cache_of(tmp_path)

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(ConfigError, match=r"cannot be stored .No space left on device., expected space"):
            cache.fetch(file)
    assert cache.fetch(file).read_bytes() == content


def _fetch_in_process(file: RemoteFile, folder: Path, die_at: int | None) -> str:
    cache = RemoteCache(folder, 100 * MIB, QUICK)
    if die_at is not None:
        write = download._write

        def killed(file: RemoteFile, descriptor: int, data: bytes, offset: int) -> None:
            write(file, descriptor, data, offset)
            if offset + len(data) >= die_at:
                os.kill(os.getpid(), 9)

        download._write = killed
    return hashlib.sha256(cache.fetch(file).read_bytes()).hexdigest()


def test_processes_share_one_download(server: FileServer, tmp_path: Path) -> None:
    file, _ = put(server, "a.tar", 4 * MIB)
    server.rate = 8 * MIB
    ends = ranks.spawn(_fetch_in_process, file, tmp_path / "cache", None, world_size=3)
    assert [end.value for end in ends] == [file.sha256] * 3
    assert server.sent() == 4 * MIB


def test_a_killed_process_leaves_no_lock_and_no_file_that_counts(server: FileServer, tmp_path: Path) -> None:
    file, content = put(server, "a.tar", 4 * MIB)
    server.rate = 32 * MIB
    end = ranks.spawn(_fetch_in_process, file, tmp_path / "cache", 2 * MIB)[0]
    assert end.code == -9
    cache = cache_of(tmp_path)
    assert not cache.has(file)
    assert cache.fetch(file).read_bytes() == content
    assert server.asked[-1][1] >= 2 * MIB  # goes on where the other one died
    assert left_over(tmp_path) == [".data", ".lock"]


def test_what_waits_for_a_failing_download_fails_with_it(server: FileServer, tmp_path: Path) -> None:
    file, _ = put(server, "a.tar", 1000)
    server.fault = lambda number, name: "500"
    cache = cache_of(tmp_path)
    told: list[str] = []

    def fetch() -> None:
        try:
            cache.fetch(file)
        except DataError as error:
            told.append(str(error))

    threads = [threading.Thread(target=fetch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 8
    assert server.count == 4


def test_what_failed_ahead_of_reading_is_tried_again_by_reading(server: FileServer, tmp_path: Path) -> None:
    file, content = put(server, "a.tar", 1000)
    server.fault = lambda number, name: "500"
    cache = cache_of(tmp_path)
    with pytest.raises(DataError):
        cache.fetch_unless_busy(file, Stop())
    server.fault = lambda number, name: ""
    assert cache.fetch(file).read_bytes() == content


def test_stopping_ends_a_download_that_waits_for_the_server(server: FileServer, tmp_path: Path) -> None:
    file, content = put(server, "a.tar", 8 * MIB)
    server.rate = MIB
    cache, stop = cache_of(tmp_path, patience=Patience(timeout=60)), Stop()
    ended = threading.Event()

    def fetch() -> None:
        with pytest.raises(StoppedError):
            cache.fetch_unless_busy(file, stop)
        ended.set()

    threading.Thread(target=fetch, daemon=True).start()
    while not server.asked:
        time.sleep(0.01)
    assert not cache.fetch_unless_busy(file, Stop())  # somebody is at it
    stop.set()
    assert ended.wait(5)
    server.rate = 0
    assert cache.fetch(file).read_bytes() == content


def test_reading_ahead_fetches_so_many_files_and_passes_rows_on(server: FileServer, tmp_path: Path) -> None:
    files = [put(server, f"{number}.tar", 1000)[0] for number in range(6)]
    cache = cache_of(tmp_path)
    batches = [[2 * number, 2 * number + 1] for number in range(30)]  # 10 rows a file
    ahead = read_ahead(iter(batches), lambda row: files[row // 10], cache, 2)
    passed = [next(ahead)]
    deadline = time.monotonic() + 10
    while not cache.has(files[1]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [cache.has(file) for file in files] == [True, True, False, False, False, False]
    passed += list(ahead)
    assert passed == batches
    assert sum(size for *_, size in server.asked) <= 6000  # none twice
    wait_for_threads()


def test_files_are_fetched_alongside_what_is_made_of_them(server: FileServer, tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    files = [put(server, f"{number}.tar", 1000)[0] for number in range(4)]
    pictures = [SimpleNamespace(file=file, cache=cache) for file in files for _ in range(5)]
    made = [(number, copy) for number in range(20) for copy in range(3)]
    items = fetch_alongside(pictures, made)  # type: ignore[type-var]
    passed = [next(items) for _ in range(3)]
    deadline = time.monotonic() + 10
    while not cache.has(files[1]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [cache.has(file) for file in files] == [True, True, False, False]
    assert passed + list(items) == made
    wait_for_threads()


def test_a_loader_that_asks_for_all_batches_at_once_gets_all_files(
    server: FileServer, tmp_path: Path
) -> None:
    files = [put(server, f"{number}.tar", 1000)[0] for number in range(3)]
    cache = cache_of(tmp_path)
    assert list(read_ahead([[0], [1], [2]], files.__getitem__, cache, 2)) == [[0], [1], [2]]
    wait_for_threads()
    assert all(cache.has(file) for file in files)


def test_what_a_killed_process_left_of_a_file_of_unknown_size_is_read_anew(
    server: FileServer, tmp_path: Path
) -> None:
    known, content = put(server, "index.parquet", 5000)
    file = RemoteFile(known.url, sha256=known.sha256)
    cache = cache_of(tmp_path)
    path = cache.fetch(file)
    path.rename(path.with_suffix(".0.part"))  # as if killed before it was renamed
    assert cache.fetch(file).read_bytes() == content


def test_reading_ahead_survives_a_dead_server_and_ends_with_its_reader(
    server: FileServer, tmp_path: Path
) -> None:
    files = [put(server, f"{number}.tar", 1000)[0] for number in range(3)]
    server.fault = lambda number, name: "500"
    ahead = read_ahead([[0], [1], [2]], files.__getitem__, cache_of(tmp_path), 2)
    assert next(ahead) == [0]
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_other_kinds_of_url_go_through_fsspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setattr(transport, "BLOCK", MIB // 3)
    content = random.Random(1).randbytes(3 * MIB)
    with fsspec.open("memory://shards/a.tar", "wb") as file:
        file.write(content)
    known = RemoteFile("memory://shards/a.tar", len(content), hashlib.sha256(content).hexdigest())
    cache = cache_of(tmp_path)
    assert cache.read(known, 1000, 100) == content[1000:1100]
    assert cache.fetch(known).read_bytes() == content
    assert read_whole("memory://shards/a.tar", QUICK) == content
    assert size_of("memory://shards/a.tar", QUICK) == len(content)
    with pytest.raises(DataError, match=r"memory://shards/b.tar: cannot be fetched .there is no such file"):
        read_whole("memory://shards/b.tar", QUICK)


@pytest.mark.parametrize(
    ("url", "told"), [("s3://bucket/a", r"roadwork-dist\[s3\]"), ("gs://bucket/a", r"roadwork-dist\[gcs\]")]
)
def test_a_missing_package_is_named(url: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for module in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=f"{url}: .*{told}"):
        read_whole(url, QUICK)
