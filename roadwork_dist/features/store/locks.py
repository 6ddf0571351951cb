"""Locks that the kernel drops with their process, however it ends, and folders that may only be read."""

import errno
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from roadwork_dist.common.flock import Flock, give_back, is_at, take

logger = logging.getLogger(__name__)

READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
"""What a folder that may only be read says to a writer."""

_told: set[Path] = set()
_telling = threading.Lock()


@contextmanager
def unless_read_only(root: Path) -> Iterator[None]:
    """Around a write of what can be computed again: a store that may only be read does without, and says so.

    Raises:
        OSError: it cannot be written for another reason; the disk is full, say.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
        with _telling:
            if root not in _told:
                logger.warning(
                    "%s may only be read (%s): hashes of photos, masks and texts that it lacks are computed "
                    "anew in every run. To keep them, give this user write access or set features.dir",
                    *(root, error.strerror),
                )
            _told.add(root)


class FileLock:
    """A lock on a file, held until :meth:`release`.

    A file system that knows no locks gives none: what is written stays right, since every process
    writes files of its own, and only the merging of their indexes may then do its work twice.

    Args:
        path: the file; made where it is not there.
        shared: several may hold it, as long as nobody holds it alone.
        wait: wait for it.

    Raises:
        BlockingIOError: somebody else holds it, and ``wait`` is False.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, *, shared: bool, wait: bool = False) -> None:
        self.path, self._owner = path, os.getpid()
        while True:
            self._handle = _open(path)
            try:
                held = take(self._handle, shared=shared, wait=wait)
                if held is Flock.OTHERS:
                    raise BlockingIOError(errno.EWOULDBLOCK, "another process holds its lock", str(path))
            except BaseException:
                os.close(self._handle)
                raise
            self.is_real = held is Flock.HELD
            """False where the file system knows no locks."""
            if is_at(self._handle, path):
                return
            os.close(self._handle)  # it was deleted while this one waited

    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self._handle).st_size

    def write_at(self, offset: int, content: bytes) -> None:
        """Write and make durable.

        Raises:
            OSError: the disk is full or broken.
        """
        view = memoryview(content)
        while len(view):
            written = os.pwrite(self._handle, view, offset)
            view, offset = view[written:], offset + written
        os.fsync(self._handle)

    def truncate(self, size: int) -> None:
        """Cut the file."""
        os.ftruncate(self._handle, size)

    def release(self) -> None:
        """Give the lock back; twice is once."""
        if self._handle >= 0:
            handle, self._handle = self._handle, -1
            if self._owner == os.getpid():
                give_back(handle)
            else:  # a process forked meanwhile must not give back what is not its own
                os.close(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        with suppress(OSError, AttributeError):
            self.release()


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        # A store that may only be read can be locked all the same.
        if error.errno in READ_ONLY and path.exists():
            return os.open(path, os.O_RDONLY)
        raise


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock on a file."""
    if not path.exists():
        return False
    try:
        FileLock(path, shared=False).release()
    except BlockingIOError:
        return True
    return False
