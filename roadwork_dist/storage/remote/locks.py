"""Locks on cache files, which are shared by the processes of a machine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.flock import Flock, give_back, is_at, take


def lock(descriptor: int, path: Path, *, wait: bool) -> bool:
    """Lock an open file; false if it is locked by another process and ``wait`` is false.

    Raises:
        ConfigError: the file system does not support locks.
    """
    try:
        held = take(descriptor, wait=wait)
        reason = held.value
    except OSError as error:
        held, reason = Flock.UNSUPPORTED, str(error.strerror)
    if held is not Flock.UNSUPPORTED:
        return held is Flock.HELD
    raise ConfigError(
        f"{path.parent}: files there cannot be locked ({reason}), expected locks to work in "
        "data.remote.cache_dir, which processes share: name a folder on a disk of this machine"
    )


def open_locked(path: Path, *, wait: bool) -> int | None:
    """Open a file, created if absent, and lock it; None if it is locked by another process.

    Raises:
        ConfigError: it cannot be created or locked.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(
                f"{path.parent}: cannot be written to ({error.strerror}), expected a folder for "
                "data.remote.cache_dir: check its permissions, or name another one"
            ) from error
        try:
            if not lock(descriptor, path, wait=wait):
                os.close(descriptor)
                return None
        except BaseException:
            os.close(descriptor)
            raise
        if is_at(descriptor, path):
            return descriptor
        give_back(descriptor)  # the file was renamed or removed during the wait


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file."""
    descriptor = open_locked(path, wait=True)
    assert descriptor is not None  # with wait
    try:
        yield
    finally:
        give_back(descriptor)
