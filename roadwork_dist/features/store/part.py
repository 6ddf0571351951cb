"""Parts: large append-only files of values, each with a log of its entries.

``<name>.values`` holds raw entries [V, D] one after the other. ``<name>.log`` holds one fixed-width record
per entry, written only after the values of the entry are durable. After a kill, bytes after the last
recorded entry are therefore ignored, and an incomplete record does not count.
"""

import os
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from roadwork_dist.common.files import sync_folder
from roadwork_dist.features.store.index import Entries, empty_entries
from roadwork_dist.features.store.locks import FileLock

PART_BYTES = 16 << 30
"""A part of this size or more is not appended to any more."""

LOG_MAGIC = b"RWPARTS1"
LOG_HEADER_BYTES = 64
RECORD = np.dtype(
    [
        *(("high", "<u8"), ("low", "<u8"), ("offset", "<u8"), ("views", "<u4"), ("crc", "<u4")),
        *(("check", "<u4"), ("unused", "<u4")),
    ]
)
_CHECKED_BYTES = 32


@dataclass(frozen=True)
class PartFiles:
    """The two files of a part."""

    folder: Path
    name: str

    @property
    def values(self) -> Path:
        """Raw values."""
        return self.folder / f"{self.name}.values"

    @property
    def log(self) -> Path:
        """Log of the entries."""
        return self.folder / f"{self.name}.log"

    def state(self) -> tuple[int, int]:
        """Size and mtime of the values file; (0, 0) if it does not exist."""
        try:
            stat = self.values.stat()
        except FileNotFoundError:
            return 0, 0
        return stat.st_size, stat.st_mtime_ns

    def records(self) -> int:
        """Records in the log, valid or not, by its size; 0 if there is no log."""
        try:
            return max(0, self.log.stat().st_size - LOG_HEADER_BYTES) // RECORD.itemsize
        except FileNotFoundError:
            return 0


def parts_in(folder: Path) -> list[PartFiles]:
    """The parts of a folder, oldest first."""
    return [PartFiles(folder, path.stem) for path in sorted(folder.glob("*.log"))]


def read_width(part: PartFiles) -> int | None:
    """D of a part's entries, in elements; ``None`` if the log's header is missing or damaged."""
    try:
        with part.log.open("rb") as file:
            header = file.read(LOG_HEADER_BYTES)
    except FileNotFoundError:
        return None
    if len(header) < LOG_HEADER_BYTES or header[: len(LOG_MAGIC)] != LOG_MAGIC:
        return None
    return int(np.frombuffer(header, "<u4", 1, len(LOG_MAGIC))[0])


def read_log(part: PartFiles, number: int, start: int = 0, stop: int | None = None) -> Entries:
    """Records ``start`` to ``stop`` of a part as entries of part ``number``, without damaged ones."""
    if read_width(part) is None:
        return empty_entries()
    stop = part.records() if stop is None else stop
    with part.log.open("rb") as file:
        file.seek(LOG_HEADER_BYTES + start * RECORD.itemsize)
        content = file.read(max(0, stop - start) * RECORD.itemsize)
    records = np.frombuffer(content[: len(content) // RECORD.itemsize * RECORD.itemsize], RECORD)
    records = records[_checks(records) == records["check"]]
    columns = {
        name: np.ascontiguousarray(records[name]) for name in ("high", "low", "offset", "views", "crc")
    }
    return Entries(part=np.full(len(records), number, dtype="<u4"), **columns)


def _checks(records: NDArray[np.void]) -> NDArray[np.uint32]:
    """CRC-32 of the fields of each record."""
    content = records.tobytes()
    starts = range(0, len(content), RECORD.itemsize)
    return np.array([zlib.crc32(content[at : at + _CHECKED_BYTES]) for at in starts], dtype=np.uint32)


class PartWriter:
    """Appends entries to a part, with exclusive write access.

    Args:
        part: the files; created if missing.
        width: D of the entries.
        view_bytes: bytes of one view.

    Raises:
        BlockingIOError: another process is writing to this part.
        OSError: the folder cannot be written.
    """

    def __init__(self, part: PartFiles, width: int, view_bytes: int) -> None:
        self.part, self.width, self.view_bytes = part, width, view_bytes
        self._values = -1
        self._lock = FileLock(part.log, shared=False)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        if not self._lock.size():
            header = LOG_MAGIC + np.array([self.width], dtype="<u4").tobytes()
            self._lock.write_at(0, header.ljust(LOG_HEADER_BYTES, b"\0"))
        known = read_log(self.part, 0)
        ends = known.offset + known.views * np.uint64(self.view_bytes)
        self.end = int(ends.max()) if len(known) else 0
        self.records = self.part.records()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._values = os.open(self.part.values, flags, 0o666)
        self._truncate()
        sync_folder(self.part.folder)

    def _truncate(self) -> None:
        """Truncate both files after the last complete record."""
        os.ftruncate(self._values, self.end)
        self._lock.truncate(LOG_HEADER_BYTES + self.records * RECORD.itemsize)

    def append(self, keys: list[tuple[int, int]], values: list[bytes]) -> None:
        """Write entries, make them durable, then record them in the log.

        Raises:
            OSError: the disk is full or failing; then none of these entries is recorded.
        """
        sizes = np.array([len(item) for item in values], dtype=np.int64)
        records = np.zeros(len(keys), dtype=RECORD)
        records["high"], records["low"] = np.array(keys, dtype=np.uint64).reshape(-1, 2).T
        records["offset"] = self.end + np.cumsum(sizes) - sizes
        records["views"], records["crc"] = sizes // self.view_bytes, [zlib.crc32(item) for item in values]
        records["check"] = _checks(records)
        try:
            _write_all(self._values, memoryview(b"".join(values)))
            os.fsync(self._values)
            self._lock.write_at(LOG_HEADER_BYTES + self.records * RECORD.itemsize, records.tobytes())
        except BaseException:
            with suppress(OSError):  # the first error is the one to report
                self._truncate()
            raise
        self.end, self.records = self.end + int(sizes.sum()), self.records + len(records)

    @property
    def is_full(self) -> bool:
        """Whether the next entry must go to another part."""
        return self.end >= PART_BYTES

    def close(self) -> None:
        """Close the part, so that other processes may append to it."""
        if self._values >= 0:
            os.close(self._values)
            self._values = -1
        self._lock.release()

    def __del__(self) -> None:
        with suppress(OSError, AttributeError):
            self.close()


def _write_all(handle: int, content: memoryview) -> None:
    while len(content):
        content = content[os.write(handle, content) :]


def new_part(folder: Path) -> PartFiles:
    """A part with a new unique name; names sort by age."""
    return PartFiles(folder, f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}")


def damaged_entries(part: PartFiles, entries: Entries, view_bytes: int) -> Iterator[int]:
    """Rows of entries of one part whose values fail their checksum; reads the file in order."""
    order = np.argsort(entries.offset, kind="stable")
    try:
        file = part.values.open("rb")
    except FileNotFoundError:
        yield from order.tolist()
        return
    with file:
        for row in order.tolist():
            file.seek(int(entries.offset[row]))
            size = int(entries.views[row]) * view_bytes
            content = file.read(size)
            if len(content) != size or zlib.crc32(content) != int(entries.crc[row]):
                yield row
