"""Output folder of a shard set during writing: lock, plan file and cleanup after killed writers."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from roadwork_dist.common.errors import ConfigError, DataError, RunLockedError
from roadwork_dist.common.files import write_atomic
from roadwork_dist.common.flock import Flock, give_back, take
from roadwork_dist.storage.shards.index import FORMAT, PLAN_FILE, SET_FILE
from roadwork_dist.storage.shards.parts import Part
from roadwork_dist.storage.shards.plan import ShardOptions


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock a folder against other writers.

    Raises:
        RunLockedError: another process holds the lock.
    """
    handle = os.open(out, os.O_RDONLY)
    try:
        # Some network file systems cannot lock folders. Two writers would still write the same bytes.
        if take(handle) is Flock.OTHERS:
            raise RunLockedError(
                f"{out}: another process writes shards there: wait for it, or choose another folder"
            )
        yield
    finally:
        give_back(handle)


def claim(out: Path, source: str, options: ShardOptions) -> None:
    """Write the plan of the set to the folder, or check that it matches.

    Raises:
        ConfigError: the folder holds something else.
    """
    own = _plan(source, options)
    found = _claimed(out)
    if found is None:
        if any(not path.name.startswith(".") for path in out.iterdir()):
            raise ConfigError(f"{out}: holds other files, expected an empty or new folder: choose another")
        write_atomic(out / PLAN_FILE, json.dumps(own).encode())
        return
    for field, value in own.items():
        if found.get(field) != value:
            raise ConfigError(
                f"{out}: holds shards with {field} {found.get(field)!r}, now it is {value!r}: choose another "
                "folder, or delete this one"
            )


def reopen(out: Path, source: str, options: ShardOptions, parts: Iterable[Part]) -> None:
    """Turn a finished set that lost a tar into an unfinished one that keeps the records of complete tars."""
    if (out / SET_FILE).exists():
        for part in parts:
            part.save(out)
        write_atomic(out / PLAN_FILE, json.dumps(_plan(source, options)).encode())
        (out / SET_FILE).unlink()


def _plan(source: str, options: ShardOptions) -> dict[str, Any]:
    own = {"format": FORMAT, "name": options.name, "kind": options.kind, "source": source}
    return own | options.settings()


def _claimed(out: Path) -> dict[str, Any] | None:
    for name in (PLAN_FILE, SET_FILE):
        try:
            found: dict[str, Any] = json.loads((out / name).read_bytes())
            return {**found, **found.get("settings", {})}
        except FileNotFoundError:
            continue
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{out / name}: cannot be read ({error}): delete the folder {out} and write the shards again"
            ) from error
    return None


def sweep(out: Path, options: ShardOptions, count: int) -> None:
    """Remove temporary files of killed writers, and tars that are not in this plan."""
    for path in out.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    planned = {f"{options.name}-{number:06d}.tar" for number in range(count)}
    for path in out.glob(f"{options.name}-[0-9]*.tar"):
        if path.name not in planned:
            path.unlink()
