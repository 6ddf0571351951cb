"""Locks that the kernel drops with their process, however it ends."""

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Self

try:
    import fcntl

    HAS_FLOCK = True
except ImportError:  # Windows: every process writes parts of its own, which needs no lock
    HAS_FLOCK = False

READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
"""What a folder that may only be read says to a writer."""
_NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK}


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
        self.is_real = HAS_FLOCK
        """False where the file system knows no locks."""
        while True:
            self._handle = _open(path)
            try:
                self._acquire(shared, wait)
            except BaseException:
                os.close(self._handle)
                raise
            if self._is_the_file():
                return
            os.close(self._handle)  # it was deleted while this one waited

    def _acquire(self, shared: bool, wait: bool) -> None:
        if not HAS_FLOCK:
            return
        try:
            fcntl.flock(
                self._handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
            )
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            self.is_real = False

    def _is_the_file(self) -> bool:
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return False
        own = os.fstat(self._handle)
        return (own.st_ino, own.st_dev) == (there.st_ino, there.st_dev)

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
            # A process forked meanwhile has the file open as well: closing it here would leave it the lock,
            # and it must not give back what is not its own.
            if HAS_FLOCK and self.is_real and self._owner == os.getpid():
                fcntl.flock(self._handle, fcntl.LOCK_UN)
            os.close(self._handle)
            self._handle = -1

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
