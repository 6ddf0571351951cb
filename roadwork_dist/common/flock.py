"""Locks on open files, flock(2), which the kernel drops with their process, however it ends.

The one place that knows which systems and file systems have none; what that means is for those who lock to
say.
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
_OTHERS = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}


class Flock(Enum):
    """What became of the wish for a lock."""

    HELD = "held"
    OTHERS = "somebody else holds it"
    UNSUPPORTED = "this system or its file system has no locks"


def take(descriptor: int, *, shared: bool = False, wait: bool = False) -> Flock:
    """Lock an open file.

    Args:
        descriptor: the file, or a folder.
        shared: several may hold it, as long as nobody holds it alone.
        wait: until it is free.

    Raises:
        OSError: the file system fails.
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
    """Give a lock back and close the file.

    Closing alone would not do: a process forked meanwhile has the file open as well, and the lock with it.
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
    """Whether an open file is still the one at a path: who held its lock may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
