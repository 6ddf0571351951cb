"""Features of one space on disk: memory-mapped reads, appends by any number of processes.

V views of a photo · D width of the backbone · N entries; an entry is one copy of one photo.
"""

import errno
import json
import logging
import mmap
import os
import threading
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from roadwork_dist.common.errors import ConfigError, DataError
from roadwork_dist.common.files import write_atomic
from roadwork_dist.common.flock import READ_ONLY
from roadwork_dist.features.store.catalogue import PARTS, Catalogue
from roadwork_dist.features.store.checking import check_touched
from roadwork_dist.features.store.index import Bools, Entries, Ints, entry_keys
from roadwork_dist.features.store.locks import FileLock
from roadwork_dist.features.store.part import (
    PART_BYTES,
    PartWriter,
    new_part,
    parts_in,
    read_log,
    read_width,
)
from roadwork_dist.features.store.space import (
    MANIFEST,
    NOTES,
    FeatureSpace,
    check_manifest,
    read_notes,
    tell_nearest,
)

logger = logging.getLogger(__name__)

FLUSH_BYTES = 32 << 20
FLUSH_SECONDS = 10.0
"""Values are buffered in memory up to this size or time before they are made durable."""
MERGE_ENTRIES = 250_000
"""After this many entries a writing process merges them into the index."""
IN_USE = "in-use.lock"
"""Locked by every process that reads or writes the space; its mtime is the time of the last use."""
CHECK_LOCK = "check.lock"


class FeatureStore:
    """The features of one space.

    Args:
        root: folder that contains all spaces, or the folder of one space.
        space: identity of the features; written to ``manifest.json`` in the space's folder.

    Raises:
        ConfigError: the folder cannot be written, or holds features of another space; then the message
            names the fields that differ.
    """

    def __init__(self, root: Path | str, space: FeatureSpace) -> None:
        self.space = space
        root = Path(root)
        self.folder = root if (root / MANIFEST).is_file() else root / space.key
        try:
            self._open_folder(root)
        except OSError as error:
            raise ConfigError(
                f"the feature store {root} cannot be written ({error}): set features.dir to a folder with "
                "free space and write access, or features.mode to online"
            ) from error
        self.catalogue = Catalogue(self.folder)
        self._reset_state()

    def _open_folder(self, root: Path) -> None:
        self._in_use: FileLock | None = None
        while self._in_use is None:  # repeats only if the space is pruned meanwhile
            try:
                check_manifest(self.folder, self.space)
            except FileNotFoundError:
                (self.folder / PARTS).mkdir(parents=True, exist_ok=True)
                write_atomic(self.folder / MANIFEST, self.space.describe().encode())
                tell_nearest(root, self.folder, self.space)
            try:
                lock = FileLock(self.folder / IN_USE, shared=True, wait=True)
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno in READ_ONLY:  # read-only: it cannot be deleted, so no lock is needed
                    return
                raise
            if (self.folder / MANIFEST).is_file():
                self._in_use = lock
        with suppress(OSError):
            os.utime(self.folder / IN_USE)

    def _reset_state(self) -> None:
        self._maps: dict[int, mmap.mmap] = {}
        self._writer: PartWriter | None = None
        self._keys: list[tuple[int, int]] = []
        self._values: list[bytes] = []
        self._waiting_bytes, self._flushed_at, self._unmerged = 0, time.monotonic(), 0
        self._width: int | None = None
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {"space": self.space, "folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["space"])  # type: ignore[misc]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def width(self) -> int | None:
        """D; ``None`` if the store is empty."""
        if self._width is None:
            widths = (read_width(part) for part in parts_in(self.folder / PARTS))
            self._width = next((width for width in widths if width is not None), None)
        return self._width

    @property
    def view_bytes(self) -> int:
        """Bytes of one view; 0 if the store is empty."""
        return (self.width or 0) * self.space.torch_dtype.itemsize

    def _entry_keys(self, contents: Iterable[str], sample_ids: Iterable[str], copy: int | None) -> Any:
        if (copy is None) != (self.space.augment is None):
            raise ValueError(
                f"copy is {copy} in a feature space with augment={self.space.augment}, "
                "expected None exactly if the space has no augmentation"
            )
        return entry_keys(contents, sample_ids, copy)

    def present(self, contents: Sequence[str], sample_ids: Sequence[str], copy: int | None) -> Bools:
        """Which entries exist [N], according to the index; values are not read.

        Args:
            contents: content hashes of the photos.
            sample_ids: ids of the samples.
            copy: augmented copy; ``None`` exactly if the space has no augmentation.

        Raises:
            ValueError: ``copy`` does not fit the space.
        """
        self._flush_before_lookup()
        return self.catalogue.find(*self._entry_keys(contents, sample_ids, copy))[1]

    def has(self, content_hash: str, sample_id: str, copy: int | None) -> bool:
        """Whether one entry exists."""
        return bool(self.present([content_hash], [sample_id], copy)[0])

    def views_of(self, contents: Sequence[str], sample_ids: Sequence[str], copy: int | None) -> Ints:
        """Number of views of each entry [N]; 0 if it does not exist."""
        self._flush_before_lookup()
        entries, is_there = self.catalogue.find(*self._entry_keys(contents, sample_ids, copy))
        return np.where(is_there, entries.views, 0).astype(np.int64)

    def get(self, content_hash: str, sample_id: str, copy: int | None) -> Tensor:
        """Read the features of a photo.

        Returns:
            [V, D] in the stored dtype.

        Raises:
            DataError: they are missing or damaged.
        """
        return self.read([content_hash], [sample_id], copy)[0]

    def read(
        self, contents: Sequence[str], sample_ids: Sequence[str], copy: int | None
    ) -> tuple[Tensor, Ints]:
        """Read the features of many photos and verify their checksums.

        Returns:
            All views one after the other, [sum of V, D] in the stored dtype, and V of each photo [N].

        Raises:
            DataError: an entry is missing or damaged; the message names its sample.
        """
        entries = self._find_entries(contents, sample_ids, copy)
        sizes = entries.views.astype(np.int64) * self.view_bytes
        ends = np.cumsum(sizes)
        raw = torch.empty(int(sizes.sum()), dtype=torch.uint8)
        target = raw.numpy()
        order = np.lexsort((entries.offset, entries.part))  # in the order of the files
        damaged = []
        for row in order.tolist():
            size = int(sizes[row])
            content = self._mapped_bytes(int(entries.part[row]), int(entries.offset[row]), size)
            if content is None or zlib.crc32(content) != int(entries.crc[row]):
                damaged.append(row)
            elif size:
                target[ends[row] - size : ends[row]] = np.frombuffer(content, dtype=np.uint8)
        if damaged:
            self._raise_damaged(sample_ids, entries, damaged)
        values = raw.view(self.space.torch_dtype)
        return values.reshape(-1, self.width or 1), entries.views.astype(np.int64)

    def _find_entries(self, contents: Sequence[str], sample_ids: Sequence[str], copy: int | None) -> Entries:
        self._flush_before_lookup()
        keys = self._entry_keys(contents, sample_ids, copy)
        entries, is_there = self.catalogue.find(*keys)
        if not is_there.all():  # another process may have added it since
            self.reload()
            entries, is_there = self.catalogue.find(*keys)
        if not is_there.all():
            sample = sample_ids[int(np.flatnonzero(~is_there)[0])]
            raise DataError(
                f"sample {sample!r}: its stored features ({self.folder}) are missing or damaged: start the "
                "same command again, it computes what is missing"
            )
        return entries

    def _mapped_bytes(self, part: int, offset: int, size: int) -> memoryview | None:
        """Bytes of an entry in the memory map; ``None`` if the file is missing or too short."""
        if not size:
            return memoryview(b"")
        mapped = self._maps.get(part)
        if mapped is None or offset + size > len(mapped):
            path = self.catalogue.parts[part].files.values
            try:
                with path.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):  # missing or empty
                return None
            self._maps[part] = mapped  # also replaces the map of a part that has grown
        return memoryview(mapped)[offset : offset + size] if offset + size <= len(mapped) else None

    def _raise_damaged(self, sample_ids: Sequence[str], entries: Entries, damaged: list[int]) -> None:
        """Drop damaged entries from the index, so that the next run computes them again, and raise."""
        places = [
            (self.catalogue.parts[int(entries.part[row])].files, int(entries.offset[row])) for row in damaged
        ]
        with suppress(OSError):  # in a read-only store they stay in the index
            self._merge(dropped=[(files.name, offset) for files, offset in places])
        files, offset = places[0]
        more = f" (and those of {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        raise DataError(
            f"sample {sample_ids[damaged[0]]!r}: its stored features ({files.values} at byte {offset}) are "
            f"damaged{more}: start the same command again, it computes what is missing"
        )

    def put(self, content_hash: str, sample_id: str, copy: int | None, features: Tensor) -> None:
        """Add the features of a photo: [V, D] of any floating-point dtype and on any device.

        They are durable after :meth:`flush` or :meth:`close`, or once the buffer is full.

        Raises:
            ValueError: ``features`` does not have two axes.
            DataError: D differs from that of the stored features.
            ConfigError: the disk is full or the folder cannot be written.
        """
        if features.ndim != 2:
            raise ValueError(f"features are {tuple(features.shape)}, expected [V, D]")
        high, low = self._entry_keys([content_hash], [sample_id], copy)
        stored = features.detach().to("cpu", self.space.torch_dtype).contiguous().reshape(-1)
        with self._lock:
            if self.width is None:
                self._width = features.shape[1]
            if features.shape[1] != self.width:
                raise DataError(
                    f"sample {sample_id!r}: its features are of width {features.shape[1]}, expected "
                    f"{self.width} as for the others in {self.folder}: set features.dir to another folder"
                )
            self._keys.append((int(high[0]), int(low[0])))
            self._values.append(stored.view(torch.uint8).numpy().tobytes())
            self._waiting_bytes += stored.nbytes
            waited = time.monotonic() - self._flushed_at
            if self._waiting_bytes >= FLUSH_BYTES or waited >= FLUSH_SECONDS:
                self.flush()

    def flush(self) -> None:
        """Make all added features durable and visible to other processes.

        Raises:
            ConfigError: the disk is full or the folder cannot be written; what was flushed before stays.
        """
        with self._lock:
            self._flushed_at = time.monotonic()
            if not self._keys:
                return
            keys, values = self._keys, self._values
            self._keys, self._values, self._waiting_bytes = [], [], 0
            try:
                if self._writer is None or self._writer.is_full:
                    self._close_writer()
                    self._writer = self._open_writer()
                self._writer.append(keys, values)
                self._unmerged += len(keys)
                if self._unmerged >= MERGE_ENTRIES:
                    self._merge()
                    self._unmerged = 0
            except OSError as error:
                raise self._write_error(error) from error

    def _open_writer(self) -> PartWriter:
        """Continue a part that no process writes to, or start a new one."""
        (self.folder / PARTS).mkdir(exist_ok=True)
        for known in self.catalogue.parts:
            part = known.files
            is_ours = known.is_trusted() and part.state()[0] < PART_BYTES and read_width(part) == self.width
            # A log with a damaged record does not show where the part's values end. Records appended to a
            # truncated log would count as already merged.
            if is_ours and len(read_log(part, 0)) == part.records() >= known.merged:
                with suppress(BlockingIOError, PermissionError):
                    return PartWriter(part, self.width or 0, self.view_bytes)
        return PartWriter(new_part(self.folder / PARTS), self.width or 0, self.view_bytes)

    def _write_error(self, error: OSError) -> ConfigError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "is full" if full else f"cannot be written ({error.strerror or error})"
        return ConfigError(
            f"the disk of the feature store {self.folder} {what}: make room, or set features.dir to another "
            "folder, and start the same command again; stored features are not computed again"
        )

    def close(self) -> None:
        """Flush, merge the entries of this process into the index, and release its part.

        Raises:
            ConfigError: the disk is full or the folder cannot be written.
        """
        with self._lock:
            try:
                self.flush()
            finally:
                self._close_writer()
            self._maps.clear()

    def _close_writer(self) -> None:
        writer, self._writer, self._unmerged = self._writer, None, 0
        if writer is None:
            return
        state = writer.part.state()
        writer.close()
        try:
            self._merge({writer.part.name: state})
        except OSError as error:  # nothing is lost: a later merge reads the logs
            logger.warning("the index of %s could not be written: %s", self.folder, error)

    def _merge(
        self,
        trusted: Mapping[str, tuple[int, int]] | None = None,
        dropped: Sequence[tuple[str, int]] = (),
    ) -> None:
        self.catalogue.merge(trusted, dropped)
        self._maps.clear()  # part numbers may have changed

    def _flush_before_lookup(self) -> None:
        """Flush buffered entries, so that lookups see them."""
        if self._keys:
            self.flush()
            self.reload()

    def reload(self) -> None:
        """Load what other processes have added."""
        with self._lock:
            self.catalogue.reload()
            self._maps.clear()
            self._width = None

    def note(self, backbone: str, source: str, photos: int) -> None:
        """Record the backbone's name and a data set's number of photos, as information for people only."""
        notes = read_notes(self.folder)
        sources = {**notes.get("sources", {}), source: photos}
        with suppress(OSError):
            content = json.dumps({"backbone": backbone, "sources": sources}, indent=1)
            write_atomic(self.folder / NOTES, content.encode())

    def check(self) -> None:
        """Verify parts modified since they were known to be intact; drop damaged entries from the index.

        Parts that were closed properly and not modified since are skipped. So are parts that a running
        process writes to; their entries are checked when they are read.
        """
        try:
            with FileLock(self.folder / CHECK_LOCK, shared=False, wait=True):  # once, not per process
                self.reload()
                trusted, dropped = check_touched(self.catalogue, self.view_bytes)
                if trusted:
                    self._merge(trusted, dropped)
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
            # The store is read-only; every entry is checked when it is read.
