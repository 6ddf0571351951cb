"""Local disk cache of remote files: bounded, shared by the processes of a node, robust against kills.

A file is ``<key>.data`` once it is complete and verified. During the download it is ``<key>.<bytes>.part``,
locked (flock) by the downloading process. If that process dies, its lock is released and the next one
resumes the part. A process that finds the lock taken waits, and then finds the file. Eviction never breaks a
reader: an open file stays readable after it is unlinked.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from roadwork_dist.common.errors import ConfigError, DataError
from roadwork_dist.common.files import sha256_of_file, write_atomic
from roadwork_dist.common.flock import give_back
from roadwork_dist.storage.remote.download import RemoteFile, download, read_range
from roadwork_dist.storage.remote.locks import locked, open_locked
from roadwork_dist.storage.remote.retry import Patience, ServerDownError, Stop

GIB = 1 << 30
RANGE_SHARE = 1 / 16
"""A file is read by range requests until more than this share was requested; then it is fetched whole."""
COOL_DOWN_S = 30.0
"""For this long a file (or server) that was given up fails at once, instead of being retried by each row."""
_MOST_GIVEN_UP = 3
"""Consecutive files of one server given up after which the server counts as down."""
_TOUCH_S = 5.0
_ABANDONED_S = 3600.0


class RemoteCache:
    """Reads remote files through a local folder of bounded size.

    Several processes may use one folder at once, even with different bounds; each enforces its own.

    Args:
        folder: folder of the cache, on a local disk; created when needed.
        max_bytes: largest total size of the files; the least recently read ones are evicted.
        patience: when a server is given up; None = the default.
        read_ahead: number of files to prefetch when rows are read in a known order.
    """

    def __init__(
        self, folder: Path, max_bytes: int, patience: Patience | None = None, read_ahead: int = 2
    ) -> None:
        self.folder, self.max_bytes, self.read_ahead = folder, max_bytes, read_ahead
        self.patience = patience or Patience()
        self._made = time.time()  # failures from before are ignored
        self._by_range: dict[str, int] = {}  # bytes of a file requested by range in this process
        self._without_ranges: set[str] = set()  # hosts

    def read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``; fewer at the end of the file.

        Raises:
            DataError: the server was given up.
            ConfigError: the cache is too small for the file.
        """
        if self._reads_by_range(file, length):
            with self._recording_failure(file):
                data = read_range(file.url, offset, length, self.patience)
            if data is not None:
                return data
            self._without_ranges.add(urlsplit(file.url).netloc)
        while True:
            try:
                return self._read_whole_file(self.fetch(file), offset, length)
            except FileNotFoundError:  # evicted between fetch and open
                continue

    def has(self, file: RemoteFile) -> bool:
        """Whether the complete file is in the cache."""
        return self._path(file).exists()

    def fetch(self, file: RemoteFile) -> Path:
        """Path of the complete file on the local disk, fetched if absent.

        Raises:
            DataError: the server was given up.
            ConfigError: the cache is too small for the file.
            StoppedError: never, since nothing stops it.
        """
        path = self._fetch(file, Stop(), wait=True)
        assert path is not None  # with wait
        return path

    def fetch_unless_busy(self, file: RemoteFile, stop: Stop) -> bool:
        """Fetch in the background; false at once if another process or thread is fetching the file.

        Raises:
            StoppedError: it was stopped.
        """
        return self._fetch(file, stop, wait=False) is not None

    def discard_if_damaged(self, file: RemoteFile) -> bool:
        """Verify the checksum of a cached file and remove the file if it differs.

        Returns:
            Whether reading again may give other bytes: the file is not cached, or was damaged.
        """
        path = self._path(file)
        try:
            damaged = file.sha256 is None or sha256_of_file(path) != file.sha256
        except FileNotFoundError:
            self._by_range[self._key(file)] = file.bytes or 0  # was read by range: now fetch and verify all
            return True
        if damaged:
            path.unlink(missing_ok=True)
        return damaged

    def _fetch(self, file: RemoteFile, stop: Stop, *, wait: bool) -> Path | None:
        path = self._path(file)
        if path.exists():
            return path
        with self._part(file, path, wait=wait) as (part, descriptor):
            if descriptor is None:
                return None
            if path.exists():  # completed by the previous holder of the lock
                part.unlink(missing_ok=True)
                return path
            self._make_room(file)
            with self._recording_failure(file, is_waited_for=wait):
                download(file, descriptor, self.patience, stop)
            file.keep(part, path)
        return path

    @contextmanager
    def _part(self, file: RemoteFile, path: Path, *, wait: bool) -> Iterator[tuple[Path, int | None]]:
        """The partial file, opened and locked; descriptor None if it is locked by another process."""
        part = path.with_suffix(f".{file.bytes or 0}.part")
        descriptor = open_locked(part, wait=wait)
        try:
            yield part, descriptor
        finally:
            if descriptor is not None:
                give_back(descriptor)

    def _read_whole_file(self, path: Path, offset: int, length: int) -> bytes:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if time.time() - os.fstat(descriptor).st_mtime > _TOUCH_S:
                with suppress(OSError):  # owned by another user; the time only guides eviction
                    os.utime(descriptor)
            data = os.pread(descriptor, length, offset)
            while len(data) < length and (
                more := os.pread(descriptor, length - len(data), offset + len(data))
            ):
                data += more
            return data
        finally:
            os.close(descriptor)

    def _reads_by_range(self, file: RemoteFile, length: int) -> bool:
        """Whether so little of a file was requested that range requests are cheaper."""
        if not file.is_read_by_range or urlsplit(file.url).netloc in self._without_ranges or self.has(file):
            return False
        assert file.bytes is not None
        if self._path(file).with_suffix(f".{file.bytes}.part").exists():  # being downloaded
            return False
        key = self._key(file)
        self._by_range[key] = self._by_range.get(key, 0) + length
        return self._by_range[key] <= file.bytes * RANGE_SHARE

    def _make_room(self, file: RemoteFile) -> None:
        """Evict the least recently read files until ``file`` fits; its part already counts with full size."""
        if (file.bytes or 0) > self.max_bytes:
            raise ConfigError(
                f"data.remote.cache_gb is {self.max_bytes / GIB:.3g}, expected room for a shard of "
                f"{(file.bytes or 0) / GIB:.3g} GiB ({file.url}): raise it"
            )
        with locked(self.folder / "room.lock"):
            used, old = 0, []
            for path in self.folder.iterdir():
                with suppress(FileNotFoundError):
                    stat = path.stat()
                    coming = int(path.suffixes[0][1:]) if path.suffix == ".part" else 0
                    used += max(stat.st_size, coming)
                    is_left_over = path.suffix == ".unpacking" and time.time() - stat.st_mtime > _ABANDONED_S
                    if path.suffix in (".data", ".part") or is_left_over:
                        old.append((stat.st_mtime, max(stat.st_size, coming), path))
            for _, size, path in sorted(old):
                if used <= self.max_bytes:
                    return
                if _remove(path):
                    used -= size

    def _raise_known_failure(self, file: RemoteFile) -> None:
        """Fail at once with a recent failure of the same file, or of a server that is down."""
        for note, most in self._notes(file):
            failure = _load_failure(note)
            is_news = failure.time > max(self._made, time.time() - COOL_DOWN_S)
            if is_news and failure.times >= most:
                raise (ServerDownError if failure.is_down else DataError)(failure.text)

    @contextmanager
    def _recording_failure(self, file: RemoteFile, *, is_waited_for: bool = True) -> Iterator[None]:
        """Record a failure, except of a prefetch: the server may be back when the file is read."""
        self._raise_known_failure(file)
        try:
            yield
        except DataError as error:
            if not is_waited_for:
                raise
            own, host = (note for note, _ in self._notes(file))
            is_down = isinstance(error, ServerDownError)
            for note in (own, host) if is_down else (own,):
                before = _load_failure(note)
                times = before.times + 1 if before.time > self._made else 1
                content = json.dumps([time.time(), times, str(error), is_down])
                with suppress(OSError):  # a full disk must not hide the server's error
                    self.folder.mkdir(parents=True, exist_ok=True)
                    write_atomic(note, content.encode())
            raise
        for note, _ in self._notes(file):
            note.unlink(missing_ok=True)

    def _notes(self, file: RemoteFile) -> tuple[tuple[Path, int], tuple[Path, int]]:
        """Failure records of the file and of its server, each with the number of failures that counts."""
        return (self._note(file.url), 1), (self._note(urlsplit(file.url).netloc), _MOST_GIVEN_UP)

    def _key(self, file: RemoteFile) -> str:
        return hashlib.sha256(
            f"{file.url}\n{file.sha256}\n{file.start}\n{file.version}".encode()
        ).hexdigest()[:32]

    def _path(self, file: RemoteFile) -> Path:
        return self.folder / f"{self._key(file)}.data"

    def _note(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.failed"


class _Failure(NamedTuple):
    time: float = 0.0
    times: int = 0
    text: str = ""
    is_down: bool = False


def _load_failure(note: Path) -> _Failure:
    try:
        return _Failure(*json.loads(note.read_bytes()))
    except (OSError, ValueError, TypeError):
        return _Failure()


def _remove(path: Path) -> bool:
    """Remove a file, unless it is a part that is being fetched."""
    if path.suffix != ".part":
        path.unlink(missing_ok=True)
        return True
    descriptor = open_locked(path, wait=False)
    if descriptor is None:
        return False
    path.unlink(missing_ok=True)
    give_back(descriptor)
    return True
