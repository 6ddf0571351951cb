"""Locks on cache files, which are shared by the processes of a machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from roadwork_dist.common import flock
from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.flock import Flock, give_back


def open_locked(path: Path, *, wait: bool) -> int | None:
    """Open a file, created if absent, and lock it; None if it is locked by another process.

    Raises:
        ConfigError: it cannot be created or locked.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, held = flock.open_locked(path, wait=wait)
    except OSError as error:
        raise ConfigError(
            f"{path.parent}: cannot be written to ({error.strerror}), expected a folder for "
            "data.remote.cache_dir: check its permissions, or name another one"
        ) from error
    if held is Flock.UNSUPPORTED:
        give_back(descriptor)
        raise ConfigError(
            f"{path.parent}: files there cannot be locked ({held.value}), expected locks to work in "
            "data.remote.cache_dir, which processes share: name a folder on a disk of this machine"
        )
    return None if held is Flock.OTHERS else descriptor


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file."""
    descriptor = open_locked(path, wait=True)
    assert descriptor is not None  # with wait
    try:
        yield
    finally:
        give_back(descriptor)
