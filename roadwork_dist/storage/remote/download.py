"""Resumable, verified download of a URL into a file."""

import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.storage.remote.retry import Patience, Stop, StoppedError, persist
from roadwork_dist.storage.remote.transport import RefusedError, Stream, TransientError, open_at

PIECE = 1 << 20
LEAST_RATE = 16 * 1024
"""Bytes/s below which a connection is replaced by a new one."""
_MOST_WRONG = 3
"""Complete downloads with a wrong checksum after which the file on the server counts as damaged."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file on a server, or a byte range of one, and its known properties.

    Attributes:
        url: address of the file.
        bytes: size of the file or range; None = unknown.
        sha256: hex SHA-256 of the content; None = unknown.
        start: first byte of the range; None = the whole file.
        version: identifies the content where there is no checksum.
    """

    url: str
    bytes: int | None = None
    sha256: str | None = None
    start: int | None = None
    version: str = ""

    @property
    def is_read_by_range(self) -> bool:
        """Whether readers want bytes of the file itself, so range requests can serve them."""
        return self.start is None and self.bytes is not None

    def keep(self, fetched: Path, path: Path) -> None:
        """Move the download to its final path, atomically."""
        fetched.replace(path)


def download(file: RemoteFile, descriptor: int, patience: Patience, stop: Stop) -> None:
    """Download into an open file, which may already hold the beginning.

    Args:
        file: what to fetch.
        descriptor: open for reading and writing.
        patience: when to give up.
        stop: ends the download; the bytes received so far stay in the file.

    Raises:
        DataError: the server was given up, or has a different file.
        ConfigError: the disk is full.
        StoppedError: it was stopped.
    """
    wrong = 0

    def attempt() -> None:
        nonlocal wrong
        _append(file, descriptor, patience, stop)
        if file.sha256 is None or _sha256(descriptor) == file.sha256:
            return
        os.ftruncate(descriptor, 0)
        wrong += 1
        text = "its checksum differs from what shards.json says"
        raise RefusedError(text) if wrong >= _MOST_WRONG else TransientError(text)

    persist(file.url, patience, attempt, stop)


def read_range(url: str, offset: int, length: int, patience: Patience) -> bytes | None:
    """Read a range of a file; None if the server does not support range requests.

    Raises:
        DataError: the server was given up, or does not have these bytes.
    """

    def attempt() -> bytes | None:
        with open_at(url, offset, offset + length, timeout=patience.timeout) as stream:
            if stream.start != offset:
                return None
            data = b"".join(_pieces(stream, length, patience.timeout))
        if len(data) < length:
            raise TransientError(f"the response ended after {len(data):,} of {length:,} bytes")
        return data

    return persist(url, patience, attempt, Stop())


def read_whole(url: str, patience: Patience) -> bytes:
    """Read a small file into memory.

    Raises:
        DataError: the server was given up, or has no such file.
    """

    def attempt() -> bytes:
        with open_at(url, timeout=patience.timeout) as stream:
            data = b"".join(_pieces(stream, None, patience.timeout))
            if stream.total is not None and len(data) < stream.total:
                raise TransientError(f"the response ended after {len(data):,} of {stream.total:,} bytes")
        return data

    return persist(url, patience, attempt, Stop())


def size_of(url: str, patience: Patience) -> int:
    """Size of a file in bytes.

    Raises:
        DataError: the server was given up, has no such file or does not report its size.
    """

    def attempt() -> int:
        with open_at(url, 0, 1, timeout=patience.timeout) as stream:
            if stream.total is None:
                raise RefusedError("the server does not report the size of the file")
            return stream.total

    return persist(url, patience, attempt, Stop())


def _append(file: RemoteFile, descriptor: int, patience: Patience, stop: Stop) -> None:
    have = os.fstat(descriptor).st_size
    if file.bytes is None or have > file.bytes:  # completeness cannot be decided: start over
        have = 0
        os.ftruncate(descriptor, 0)
    if have == file.bytes:
        return
    began, base = have, file.start or 0
    end = None if file.start is None or file.bytes is None else file.start + file.bytes
    with open_at(file.url, base + have, end, timeout=patience.timeout) as stream:
        _check_size(file, stream)
        if stream.start != base + have:  # no range support: all from the beginning
            have = began = 0
            os.ftruncate(descriptor, 0)
        stop.watch(stream)
        try:
            for data in _pieces(stream, None, patience.timeout):
                _write(file, descriptor, data, have)
                have += len(data)
        except TransientError as error:
            raise TransientError(str(error), moved_on=have - began >= PIECE) from error
        finally:
            stop.watch(None)
        total = stream.total if file.bytes is None else file.bytes
    if stop:
        raise StoppedError
    if total is not None and have < total:
        text = f"the response ended after {have:,} of {total:,} bytes"
        raise TransientError(text, moved_on=have - began >= PIECE)
    if total is not None and have > total:
        os.ftruncate(descriptor, 0)
        raise TransientError(f"the response has {have:,} bytes instead of {total:,}")


def _check_size(file: RemoteFile, stream: Stream) -> None:
    if file.start is not None:
        if stream.start < file.start:
            raise RefusedError("the server does not support range requests, which parts of a file need")
    elif None not in (file.bytes, stream.total) and stream.total != file.bytes:
        raise RefusedError(f"the server's file has {stream.total:,} bytes, shards.json says {file.bytes:,}")


def _write(file: RemoteFile, descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    try:
        while view:
            done = os.pwrite(descriptor, view, offset)
            offset, view = offset + done, view[done:]
    except OSError as error:
        raise ConfigError(
            f"{file.url}: cannot be stored ({error.strerror}), expected space in data.remote.cache_dir: "
            "free some, lower data.remote.cache_gb, or name a folder on another disk"
        ) from error


def _pieces(stream: Stream, length: int | None, window: float) -> Iterator[bytes]:
    """Pieces of a stream, to its end or up to ``length`` bytes; raises if the stream is too slow."""
    began, got, left = time.monotonic(), 0, length
    while left is None or left > 0:
        data = stream.read(PIECE if left is None else min(PIECE, left))
        if not data:
            return
        yield data
        got += len(data)
        left = None if left is None else left - len(data)
        seconds = time.monotonic() - began
        if seconds >= window:
            if got < LEAST_RATE * seconds:
                raise TransientError(f"the server sent only {got / seconds:.0f} bytes/s")
            began, got = time.monotonic(), 0


def _sha256(descriptor: int) -> str:
    with os.fdopen(os.dup(descriptor), "rb") as reader:
        reader.seek(0)
        return hashlib.file_digest(reader, "sha256").hexdigest()
