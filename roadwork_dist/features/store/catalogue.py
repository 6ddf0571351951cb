"""Catalogue of a space's entries: the merged index of its parts, plus newer records from their logs.

``index.json`` names the current index file. For each part it states how many records of its log are in
that file, and the state (size, mtime) of its values when they were last known to be intact. All of this
can be rebuilt from the logs.
"""

import json
import uuid
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from roadwork_dist.common.files import write_atomic
from roadwork_dist.features.store.index import (
    CHUNK,
    Bools,
    Entries,
    Unsigned,
    concatenate,
    empty_entries,
    read_index,
    write_index,
)
from roadwork_dist.features.store.locks import FileLock
from roadwork_dist.features.store.part import PartFiles, parts_in, read_log

INDEX_JSON = "index.json"
INDEX_LOCK = "index.lock"
PARTS = "parts"
_UNKNOWN = (-1, -1)


@dataclass(frozen=True)
class KnownPart:
    """A part and its state in the index."""

    files: PartFiles
    merged: int = 0
    """Number of records of its log that are in the index file."""
    trusted: tuple[int, int] = _UNKNOWN
    """State of its values when they were last known to be intact."""

    def is_trusted(self) -> bool:
        """Whether the values are unmodified since they were known to be intact."""
        return self.files.state() == self.trusted


class Catalogue:
    """The index of one space.

    Args:
        folder: folder of the space.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: list[KnownPart] = []
        self.merged = empty_entries()
        self.recent = empty_entries()
        """Sorted log entries that are not in the index file yet."""
        self.index_name = ""
        self.reload()

    def __len__(self) -> int:
        """Number of entries; recomputed ones that are not merged yet count twice."""
        return len(self.merged) + len(self.recent)

    def reload(self) -> None:
        """Load what other processes have added. It reads only the unmerged records of the logs."""
        self._load_merged()
        known = {part.files.name for part in self.parts}
        files = parts_in(self.folder / PARTS)
        self.parts += [KnownPart(each) for each in files if each.name not in known]
        recent, self._counts = [], []
        for number, part in enumerate(self.parts):
            count = part.files.records()
            self._counts.append(max(count, part.merged))
            if count > part.merged:
                recent.append(read_log(part.files, number, part.merged, count))
        self.recent = concatenate(recent).in_order()

    def _load_merged(self) -> None:
        for _ in range(20):  # a merging process replaces the file and deletes the old one
            name, parts = self._read_json()
            if name and name == self.index_name:
                self.parts = parts
                return
            index = read_index(self.folder / name) if name else empty_entries()
            if index is not None:
                self.index_name, self.merged, self.parts = name, index, parts
                return
        warnings.warn(
            f"{self.folder / name} is missing or damaged: the index is built again",
            RuntimeWarning,
            stacklevel=2,
        )
        self.index_name, self.merged = "", empty_entries()
        self.parts = [KnownPart(part.files) for part in parts]

    def _read_json(self) -> tuple[str, list[KnownPart]]:
        path = self.folder / INDEX_JSON
        try:
            content = json.loads(path.read_bytes())
            return str(content["index"]), [
                KnownPart(PartFiles(self.folder / PARTS, name), merged, (size, changed))
                for name, merged, size, changed in content["parts"]
            ]
        except FileNotFoundError:
            return "", []
        except (ValueError, KeyError, TypeError) as error:
            warnings.warn(
                f"{path} is damaged ({error!r}): the index is built again", RuntimeWarning, stacklevel=2
            )
            return "", []

    def find(self, high: Unsigned, low: Unsigned) -> tuple[Entries, Bools]:
        """Entries of keys [N], and which of them exist; rows of missing ones are meaningless."""
        rows = self.merged.find(high, low)
        is_there = rows >= 0
        columns = [
            column[rows] if len(column) else np.zeros(len(rows), dtype=column.dtype)
            for column in self.merged.columns()
        ]
        if len(self.recent):
            newer = self.recent.find(high, low)
            is_newer = newer >= 0
            for column, recent in zip(columns, self.recent.columns(), strict=True):
                column[is_newer] = recent[newer[is_newer]]
            is_there |= is_newer
        return Entries(*columns), is_there

    def entries_of(self, number: int) -> Entries:
        """All entries of a part; reads the whole index once."""
        merged = [
            chunk.take(chunk.part == number)
            for start in range(0, len(self.merged), CHUNK)
            for chunk in [self.merged.take(slice(start, start + CHUNK))]
        ]
        return concatenate([*merged, self.recent.take(self.recent.part == number)])

    def merge(
        self,
        trusted: Mapping[str, tuple[int, int]] | None = None,
        dropped: Sequence[tuple[str, int]] = (),
    ) -> None:
        """Write the logs' new records into the index file.

        Args:
            trusted: state of parts whose values are known to be intact, by name.
            dropped: (part, offset) of entries that are damaged.

        Raises:
            OSError: the disk is full or the folder cannot be written; the old index stays.
        """
        with FileLock(self.folder / INDEX_LOCK, shared=False, wait=True):
            self.reload()  # another process may have merged meanwhile
            numbers = {part.files.name: number for number, part in enumerate(self.parts)}
            gone = [(numbers[name], offset) for name, offset in dropped if name in numbers]
            name = self.index_name
            if gone or len(self.recent) or not name:
                name = f"index-{uuid.uuid4().hex[:12]}.bin"
                self._write_index(self.folder / name, gone)
            states = {part.files.name: part.trusted for part in self.parts} | dict(trusted or {})
            parts = [
                [part.files.name, count, *states[part.files.name]]
                for part, count in zip(self.parts, self._counts, strict=True)
            ]
            content = {"version": 1, "index": name, "parts": parts}
            write_atomic(self.folder / INDEX_JSON, json.dumps(content).encode())
            for path in self.folder.glob("index-*"):
                if path.name != name:
                    path.unlink(missing_ok=True)
            self.reload()

    def _write_index(self, path: Path, gone: Sequence[tuple[int, int]]) -> None:
        temporary = path.with_suffix(".tmp")
        try:
            write_index(temporary, self.merged, self.recent, gone)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
