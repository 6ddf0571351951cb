"""LRU cache of open file descriptors: random reads from 10,000 tars use at most 64 descriptors."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

MOST_OPEN = 64
"""Descriptors kept open by a process; a common limit per process is 1,024."""


@dataclass(slots=True)
class _Open:
    descriptor: int
    readers: int = 0
    is_evicted: bool = False


class Descriptors:
    """Least recently used cache of read-only file descriptors; safe for threads and forks.

    An evicted file is closed by its last reader, so more than ``most`` are open only while
    more than ``most`` threads read at once.

    Args:
        most: descriptors to keep open.
    """

    def __init__(self, most: int = MOST_OPEN) -> None:
        self.most = most
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._lock = threading.Lock()
        # A forked child needs a consistent table and a free lock. It can share the open files, since pread
        # does not use the file position. Readers in other threads do not exist in the child.
        os.register_at_fork(
            before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._in_child
        )

    def __len__(self) -> int:
        return len(self._open)

    def read(self, path: str, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``; fewer at the end of the file.

        Raises:
            OSError: the file cannot be opened or read.
        """
        with self._borrow(path) as descriptor:
            data = os.pread(descriptor, length, offset)
            while len(data) < length:  # a read may return fewer bytes than requested
                more = os.pread(descriptor, length - len(data), offset + len(data))
                if not more:
                    break
                data += more
            return data

    def forget(self, path: str) -> None:
        """Close a file, so that the next read opens ``path`` again."""
        with self._lock:
            entry = self._open.pop(path, None)
            if entry is not None:
                _retire(entry)

    @contextmanager
    def _borrow(self, path: str) -> Iterator[int]:
        entry = self._take(path)
        try:
            yield entry.descriptor
        finally:
            with self._lock:
                entry.readers -= 1
                if entry.is_evicted and entry.readers == 0:
                    os.close(entry.descriptor)

    def _take(self, path: str) -> _Open:
        with self._lock:
            entry = self._open.get(path)
            if entry is None:
                entry = self._open[path] = _Open(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            self._open.move_to_end(path)
            entry.readers += 1
            while len(self._open) > self.most:
                _retire(self._open.popitem(last=False)[1])
            return entry

    def _in_child(self) -> None:
        for entry in self._open.values():
            entry.readers = 0
        self._lock.release()


def _retire(entry: _Open) -> None:
    entry.is_evicted = True
    if entry.readers == 0:
        os.close(entry.descriptor)


open_files = Descriptors()
"""Descriptors of this process."""
