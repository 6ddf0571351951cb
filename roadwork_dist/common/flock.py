"""Locks on open files with flock(2), which the kernel releases when the process ends, however it ends.

This module alone knows which systems and file systems have no locks; callers decide what to do then.
"""

import errno
import os
from enum import Enum
from pathlib import Path

try:
    import fcntl

    HAS_FLOCK = True
except ImportError:  # Windows
    HAS_FLOCK = False

_UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK}
READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
"""Errors of writing to a read-only file or folder."""
_OTHERS = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}


class Flock(Enum):
    """Result of an attempt to lock."""

    HELD = "held"
    OTHERS = "another process holds it"
    UNSUPPORTED = "this system or file system has no locks"


def take(descriptor: int, *, shared: bool = False, wait: bool = False) -> Flock:
    """Lock an open file.

    Args:
        descriptor: the file, or a folder.
        shared: take a shared lock, which several processes may hold; otherwise an exclusive one.
        wait: block until the lock is free.

    Raises:
        OSError: the file system reported an error.
    """
    if not HAS_FLOCK:
        return Flock.UNSUPPORTED
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _OTHERS:
            return Flock.OTHERS
        if error.errno in _UNSUPPORTED:
            return Flock.UNSUPPORTED
        raise
    return Flock.HELD


def give_back(descriptor: int) -> None:
    """Release a lock and close the file.

    Closing alone is not enough: a process forked in the meantime has the file open too, which keeps the lock.
    """
    try:
        if HAS_FLOCK:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at a path; whoever held its lock may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def open_locked(
    path: Path, *, shared: bool = False, wait: bool = False, mode: int = 0o666, may_read_only: bool = False
) -> tuple[int, Flock]:
    """Open a file, created if absent, and lock it.

    Args:
        path: the file.
        shared: others may hold a shared lock at the same time.
        wait: until others have released theirs.
        mode: permissions of a new file.
        may_read_only: a file that cannot be written to is locked as well.

    Returns:
        Its descriptor (-1 if others hold the lock), and what came of the lock.

    Raises:
        OSError: it cannot be opened, or the file system fails.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
        except OSError as error:
            if not may_read_only or error.errno not in READ_ONLY or not path.exists():
                raise
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            held = take(descriptor, shared=shared, wait=wait)
            if held is not Flock.OTHERS and is_at(descriptor, path):
                return descriptor, held
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if held is Flock.OTHERS:
            return -1, held
        # Otherwise the file was removed or replaced during the wait: lock the one that is there now.
