"""Files of a server on the local disk: bounded, shared by the processes of a node, robust against kills.

A file is ``<key>.data`` once it is whole and checked. While it comes it is ``<key>.<bytes>.part``, locked
(flock) by who fetches it. The lock dies with its process, the part is gone on with by the next one, and
who finds the lock taken waits and finds the file. Nothing is ever removed under a reader: an open file stays
readable when its name goes.
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
"""A file of which no more than this share was asked for is read by ranges; then it is fetched whole."""
COOL_DOWN_S = 30.0
"""So long a file (or server) that was given up fails at once instead of being tried by row after row."""
_MOST_GIVEN_UP = 3
"""Files of one server given up in a row after which the server counts as down."""
_TOUCH_S = 5.0
_ABANDONED_S = 3600.0


class RemoteCache:
    """Reads files of servers through a folder of bounded size.

    Several processes may use one folder at once, also with different bounds; each keeps to its own.

    Args:
        folder: of the cache, on a local disk; made when it is needed.
        max_bytes: room for files; the least recently read ones make way for new ones.
        patience: when a server is given up; None = the default.
        read_ahead: files that whoever reads rows in a known order fetches beforehand.
    """

    def __init__(
        self, folder: Path, max_bytes: int, patience: Patience | None = None, read_ahead: int = 2
    ) -> None:
        self.folder, self.max_bytes, self.read_ahead = folder, max_bytes, read_ahead
        self.patience = patience or Patience()
        self._made = time.time()  # what was given up before is tried anew
        self._by_range: dict[str, int] = {}  # bytes of a file asked for by range, in this process
        self._without_ranges: set[str] = set()  # hosts

    def read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``; fewer where the file ends before.

        Raises:
            DataError: the server was given up.
            ConfigError: the cache is too small for the file.
        """
        if self._reads_by_range(file, length):
            with self._noting_failure(file):
                data = read_range(file.url, offset, length, self.patience)
            if data is not None:
                return data
            self._without_ranges.add(urlsplit(file.url).netloc)
        while True:
            try:
                return self._read_whole_file(self.fetch(file), offset, length)
            except FileNotFoundError:  # made way for another one just now
                continue

    def has(self, file: RemoteFile) -> bool:
        """Whether the file lies here, whole."""
        return self._path(file).exists()

    def fetch(self, file: RemoteFile) -> Path:
        """The whole file on the local disk, fetched if it is not there.

        Raises:
            DataError: the server was given up.
            ConfigError: the cache is too small for the file.
            StoppedError: never, without a stop.
        """
        path = self._fetch(file, Stop(), wait=True)
        assert path is not None  # with wait
        return path

    def fetch_unless_busy(self, file: RemoteFile, stop: Stop) -> bool:
        """The same for a helper in the background: false, at once, where somebody else is fetching it.

        Raises:
            StoppedError: it was stopped.
        """
        return self._fetch(file, stop, wait=False) is not None

    def discard_if_damaged(self, file: RemoteFile) -> bool:
        """Check the file that lies here against its checksum and remove it if it differs.

        Returns:
            Whether reading again may give something else: nothing lies here, or it was damaged.
        """
        path = self._path(file)
        try:
            damaged = file.sha256 is None or sha256_of_file(path) != file.sha256
        except FileNotFoundError:
            self._by_range[self._key(file)] = file.bytes or 0  # read by range: now the whole, checked
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
            if path.exists():  # by whoever held the lock before
                part.unlink(missing_ok=True)
                return path
            self._make_room(file)
            with self._noting_failure(file, is_waited_for=wait):
                download(file, descriptor, self.patience, stop)
            file.keep(part, path)
        return path

    @contextmanager
    def _part(self, file: RemoteFile, path: Path, *, wait: bool) -> Iterator[tuple[Path, int | None]]:
        """The unfinished file, opened and locked; no descriptor where another one has the lock."""
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
                with suppress(OSError):  # of another user: a hint only, for who was read last goes last
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
        """Whether so little of a file was asked for that a request for each piece is cheaper."""
        if not file.is_read_by_range or urlsplit(file.url).netloc in self._without_ranges or self.has(file):
            return False
        assert file.bytes is not None
        if self._path(file).with_suffix(f".{file.bytes}.part").exists():  # it is coming
            return False
        key = self._key(file)
        self._by_range[key] = self._by_range.get(key, 0) + length
        return self._by_range[key] <= file.bytes * RANGE_SHARE

    def _make_room(self, file: RemoteFile) -> None:
        """Remove what was not read for longest until the file fits; its part counts as whole already."""
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
        """Fail at once with what another row, process or file of a dead server has just met."""
        for note, most in self._notes(file):
            failure = _load(note)
            is_news = failure.time > max(self._made, time.time() - COOL_DOWN_S)
            if is_news and failure.times >= most:
                raise (ServerDownError if failure.is_down else DataError)(failure.text)

    @contextmanager
    def _noting_failure(self, file: RemoteFile, *, is_waited_for: bool = True) -> Iterator[None]:
        """Failures of what is fetched ahead do not count: the server may be back when it is read."""
        self._raise_known_failure(file)
        try:
            yield
        except DataError as error:
            if not is_waited_for:
                raise
            own, host = (note for note, _ in self._notes(file))
            is_down = isinstance(error, ServerDownError)
            for note in (own, host) if is_down else (own,):
                before = _load(note)
                times = before.times + 1 if before.time > self._made else 1
                content = json.dumps([time.time(), times, str(error), is_down])
                with suppress(OSError):  # a full disk must not hide what the server said
                    self.folder.mkdir(parents=True, exist_ok=True)
                    write_atomic(note, content.encode())
            raise
        for note, _ in self._notes(file):
            note.unlink(missing_ok=True)

    def _notes(self, file: RemoteFile) -> tuple[tuple[Path, int], tuple[Path, int]]:
        """Where failures of the file and of its server are noted, and how many of them count."""
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


def _load(note: Path) -> _Failure:
    try:
        return _Failure(*json.loads(note.read_bytes()))
    except (OSError, ValueError, TypeError):
        return _Failure()


def _remove(path: Path) -> bool:
    """Remove a file, unless it is a part that somebody is fetching."""
    if path.suffix != ".part":
        path.unlink(missing_ok=True)
        return True
    descriptor = open_locked(path, wait=False)
    if descriptor is None:
        return False
    path.unlink(missing_ok=True)
    give_back(descriptor)
    return True
