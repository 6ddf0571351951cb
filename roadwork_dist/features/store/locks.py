"""File locks that the kernel releases when their process ends, and handling of read-only folders."""

import errno
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from roadwork_dist.common.flock import READ_ONLY, Flock, give_back, open_locked

logger = logging.getLogger(__name__)

_warned: set[Path] = set()
_warned_guard = threading.Lock()


@contextmanager
def unless_read_only(root: Path) -> Iterator[None]:
    """Skip a cache write in a read-only store, with one warning per folder. Wrap only what can be recomputed.

    Raises:
        OSError: the write failed for another reason, for example a full disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
        with _warned_guard:
            if root not in _warned:
                logger.warning(
                    "%s is read-only (%s): hashes of photos, masks and texts that it lacks are computed "
                    "again in every run. To keep them, give this user write access or set features.dir",
                    *(root, error.strerror),
                )
            _warned.add(root)


class FileLock:
    """A lock on a file, held until :meth:`release`.

    On a file system without locks nothing is locked. Stored data stay correct, since every process
    writes its own files; only the merging of their indexes may then be done twice.

    Args:
        path: the file; created if missing.
        shared: take a shared lock, which several processes may hold; otherwise an exclusive one.
        wait: block until the lock is free.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is False.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, *, shared: bool, wait: bool = False) -> None:
        self.path, self._owner = path, os.getpid()
        self._handle, held = open_locked(path, shared=shared, wait=wait, may_read_only=True)
        if held is Flock.OTHERS:
            raise BlockingIOError(errno.EWOULDBLOCK, "another process holds its lock", str(path))
        self.is_real = held is Flock.HELD
        """False if the file system has no locks."""

    def size(self) -> int:
        """Size of the file in bytes."""
        return os.fstat(self._handle).st_size

    def write_at(self, offset: int, content: bytes) -> None:
        """Write and make durable.

        Raises:
            OSError: the disk is full or failing.
        """
        view = memoryview(content)
        while len(view):
            written = os.pwrite(self._handle, view, offset)
            view, offset = view[written:], offset + written
        os.fsync(self._handle)

    def truncate(self, size: int) -> None:
        """Truncate the file to ``size`` bytes."""
        os.ftruncate(self._handle, size)

    def release(self) -> None:
        """Release the lock; calling it again has no effect."""
        if self._handle >= 0:
            handle, self._handle = self._handle, -1
            if self._owner == os.getpid():
                give_back(handle)
            else:  # a forked child must not release the lock of its parent
                os.close(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        with suppress(OSError, AttributeError):
            self.release()


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock on a file."""
    if not path.exists():
        return False
    try:
        FileLock(path, shared=False).release()
    except BlockingIOError:
        return True
    return False
