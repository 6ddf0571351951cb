"""Maintenance of a feature store: list its spaces, verify checksums, delete unused data."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from stat import S_ISREG

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.registry import nearest
from roadwork_dist.features.store.catalogue import INDEX_JSON, PARTS, Catalogue
from roadwork_dist.features.store.feature_store import IN_USE
from roadwork_dist.features.store.locks import FileLock, is_locked
from roadwork_dist.features.store.part import damaged_entries, read_width
from roadwork_dist.features.store.space import MANIFEST, STORED_DTYPES, in_words, read_manifest, read_notes

DAY_S = 86400.0
QUIET_S = 3600.0
"""On a file system without locks, a space changed within this time counts as in use."""


@dataclass(frozen=True)
class SpaceSummary:
    """Summary of a space."""

    folder: Path
    entries: int
    size: int
    """Total bytes of its files."""
    last_used: float
    """Seconds since the epoch."""
    in_use: bool
    words: str
    """Its identity as a readable line."""
    sources: dict[str, int]
    """Number of photos by name of their data set."""


@dataclass(frozen=True)
class DamagedEntry:
    """An entry that fails its checksum."""

    path: Path
    offset: int
    views: int
    key: str

    def __str__(self) -> str:
        return f"{self.path} at byte {self.offset}: {self.views} views of the entry {self.key} are damaged"


@dataclass(frozen=True)
class Removal:
    """A file or folder that may be deleted."""

    path: Path
    size: int
    why: str


def spaces_in(root: Path) -> list[Path]:
    """Folders of the spaces of a store.

    Raises:
        ConfigError: the folder does not exist.
    """
    if (root / MANIFEST).is_file():
        return [root]
    if not root.is_dir():
        raise ConfigError(
            f"{root} is not a folder, expected a feature store: name the folder of features.dir with --dir"
        )
    return sorted(path.parent for path in root.glob(f"*/{MANIFEST}"))


def summary_of(folder: Path) -> SpaceSummary:
    """Summary of a space. It reads only the index and the file sizes, and does not count as a use.

    Raises:
        ConfigError: its manifest is damaged.
    """
    notes = read_notes(folder)
    return SpaceSummary(
        folder,
        len(Catalogue(folder)),
        _size(folder),
        last_used(folder),
        in_use(folder),
        in_words(read_manifest(folder), notes),
        dict(notes.get("sources", {})),
    )


def last_used(folder: Path) -> float:
    """When the space was last opened, in seconds since the epoch."""
    path = folder / IN_USE
    return (path if path.exists() else folder / MANIFEST).stat().st_mtime


def in_use(folder: Path) -> bool:
    """Whether a running process reads or writes the space."""
    return is_locked(folder / IN_USE)


def verify(folder: Path) -> Iterator[DamagedEntry]:
    """Read every entry of a space and verify its checksum.

    Damaged entries are dropped from the index, so that the next extraction computes them again.

    Raises:
        ConfigError: the manifest is damaged.
    """
    catalogue = Catalogue(folder)
    dtype = STORED_DTYPES[str(read_manifest(folder)["dtype"])]
    trusted: dict[str, tuple[int, int]] = {}
    dropped: list[tuple[str, int]] = []
    for number, part in enumerate(catalogue.parts):
        state, is_closed = part.files.state(), not is_locked(part.files.log)
        entries = catalogue.entries_of(number)
        width = read_width(part.files)
        if width is None:  # the log is lost; all parts have the same width
            width = next((w for p in catalogue.parts if (w := read_width(p.files)) is not None), 0)
        for row in damaged_entries(part.files, entries, width * dtype.itemsize):
            offset, views = int(entries.offset[row]), int(entries.views[row])
            key = f"{int(entries.high[row]):016x}{int(entries.low[row]):016x}"
            dropped.append((part.files.name, offset))
            yield DamagedEntry(part.files.values, offset, views, key)
        if is_closed:
            trusted[part.files.name] = state
    with suppress(PermissionError):  # a read-only store can still be verified
        catalogue.merge(trusted, dropped)


def plan_pruning(root: Path, *, older_than: float, names: Sequence[str] = ()) -> list[Removal]:
    """List what can be deleted: unused spaces, and unfinished files in the others.

    Args:
        root: the store.
        older_than: days since the last use.
        names: folder names of spaces to delete whatever their last use; then nothing else is deleted.

    Raises:
        ConfigError: there is no space with a given name.
    """
    spaces = {path.name: path for path in spaces_in(root)}
    for name in names:
        if name not in spaces:
            close = nearest(name, list(spaces), n=1)
            hint = f": did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{root} holds no space {name}{hint} (features list shows them)")
    plan: list[Removal] = []
    for name, folder in spaces.items():
        days = (time.time() - last_used(folder)) / DAY_S
        if name in names or (not names and days >= older_than):
            plan.append(Removal(folder, _size(folder), f"not used for {days:.0f} days"))
        elif not names:
            plan += [Removal(path, _size(path), "was left unfinished") for path in _leftovers(folder)]
    return plan


def remove(removal: Removal) -> str | None:
    """Delete a file or folder, or return why it must stay: its space is in use."""
    folder = removal.path if (removal.path / MANIFEST).is_file() else _space_of(removal.path)
    try:
        # A process that opens the space now waits, then creates it again.
        with FileLock(folder / IN_USE, shared=False) as lock:
            if not lock.is_real and time.time() - _newest(folder) < QUIET_S:
                return "has changed within the last hour, and this file system has no locks"
            if removal.path.is_dir():
                # The manifest first: after a kill the remaining files do not count as a space.
                (removal.path / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(removal.path)
            else:
                removal.path.unlink(missing_ok=True)
    except BlockingIOError:
        return "is used by a running process"
    return None


def _space_of(path: Path) -> Path:
    return next(parent for parent in path.parents if (parent / MANIFEST).is_file())


def _leftovers(folder: Path) -> list[Path]:
    """Unreferenced files of a space: left by killed processes or by older layouts."""
    index = folder / INDEX_JSON
    current = Catalogue(folder).index_name if index.exists() else ""
    found = [path for path in folder.glob("index-*") if path.name != current]
    found += [*folder.glob(".*.tmp"), *folder.glob("plain"), *folder.glob("copy-*")]
    known = {part.files.name for part in Catalogue(folder).parts if part.files.records() or part.merged}
    found += [path for path in (folder / PARTS).glob("*") if path.stem not in known]
    return sorted(found)


def _size(path: Path) -> int:
    return sum(each.st_size for each in _states(path) if S_ISREG(each.st_mode))


def _newest(folder: Path) -> float:
    return max(each.st_mtime for each in _states(folder))


def _states(path: Path) -> Iterator[os.stat_result]:
    """stat() of a file, or of everything in a folder; files that disappear meanwhile are skipped."""
    found = [Path(parent, name) for parent, *names in os.walk(path) for name in chain(*names)]
    for each in found if path.is_dir() else [path]:
        with suppress(FileNotFoundError):
            yield each.stat()
