"""Locks on open files, which the kernel drops with their process, however it ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from roadwork_dist.common.errors import ConfigError

try:
    import fcntl

    HAS_FLOCK = True
except ImportError:  # Windows
    HAS_FLOCK = False


def lock(descriptor: int, path: Path, *, wait: bool) -> bool:
    """Lock an open file; false where somebody else has the lock, and ``wait`` is false.

    Raises:
        ConfigError: the file system knows no locks.
    """
    reason = "this system has none"
    if HAS_FLOCK:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            reason = str(error.strerror)
    raise ConfigError(
        f"{path.parent}: files there cannot be locked ({reason}), expected that of data.remote.cache_dir, "
        "for processes share it: name a folder on a disk of this machine"
    )


def unlock(descriptor: int) -> None:
    """Give a lock back, and close the file.

    Closing alone would not do: a process forked meanwhile has it open as well, and the lock with it.
    """
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def open_locked(path: Path, *, wait: bool) -> int | None:
    """Open a file, made if need be, and lock it; None where somebody else has the lock.

    Raises:
        ConfigError: it cannot be made or locked.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(
                f"{path.parent}: cannot be written to ({error.strerror}), expected a folder for "
                "data.remote.cache_dir: check its rights, or name another one"
            ) from error
        try:
            if not lock(descriptor, path, wait=wait):
                os.close(descriptor)
                return None
        except BaseException:
            os.close(descriptor)
            raise
        if _is_at(descriptor, path):
            return descriptor
        unlock(descriptor)  # it was finished or removed while this one waited


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file."""
    descriptor = open_locked(path, wait=True)
    assert descriptor is not None  # with wait
    try:
        yield
    finally:
        unlock(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    own = os.fstat(descriptor)
    return (own.st_ino, own.st_dev) == (there.st_ino, there.st_dev)
