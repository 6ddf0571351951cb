"""Sorted fixed-width index of the entries' locations, searched by binary search in a memory map.

N entries, in columns (each contiguous, so that a search touches only one column and copies nothing):
key (128 bits in two halves), offset in its part, number of the part, views, CRC-32 of the values.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Unsigned = NDArray[np.unsignedinteger]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

MAGIC = b"RWINDEX1"
HEADER_BYTES = 64
CHUNK = 1 << 20
"""Entries that a merge has in memory at a time."""

_COLUMNS = {"high": "<u8", "low": "<u8", "offset": "<u8", "part": "<u4", "views": "<u4", "crc": "<u4"}
ENTRY_BYTES = sum(np.dtype(kind).itemsize for kind in _COLUMNS.values())


@dataclass(frozen=True)
class Entries:
    """Columns of N entries."""

    high: Unsigned
    low: Unsigned
    offset: Unsigned
    part: Unsigned
    views: Unsigned
    crc: Unsigned

    def __len__(self) -> int:
        return len(self.high)

    def take(self, chosen: Ints | Bools | slice) -> "Entries":
        """The selected entries."""
        return Entries(*(column[chosen] for column in self.columns()))

    def columns(self) -> list[Unsigned]:
        """The columns, in file order."""
        return [getattr(self, item.name) for item in fields(self)]

    def in_order(self) -> "Entries":
        """Sorted by key; of entries with equal keys only the last."""
        order = np.lexsort((self.low, self.high))  # stable: equal keys stay ordered by age
        ordered = self.take(order)
        is_last = np.ones(len(ordered), dtype=bool)
        is_last[:-1] = (ordered.high[1:] != ordered.high[:-1]) | (ordered.low[1:] != ordered.low[:-1])
        return ordered if is_last.all() else ordered.take(is_last)

    def find(self, high: Unsigned, low: Unsigned) -> Ints:
        """Rows of keys in sorted entries; -1 where a key is missing."""
        found = np.full(len(high), -1, dtype=np.int64)
        rows = np.searchsorted(self.high, high, side="right").astype(np.int64) - 1
        waiting = np.flatnonzero(rows >= 0)
        while len(waiting):  # more than one pass only if two keys share their first 64 bits
            waiting = waiting[self.high[rows[waiting]] == high[waiting]]
            is_match = self.low[rows[waiting]] == low[waiting]
            found[waiting[is_match]] = rows[waiting[is_match]]
            waiting = waiting[~is_match]
            rows[waiting] -= 1
            waiting = waiting[rows[waiting] >= 0]
        return found


def empty_entries() -> Entries:
    """No entries."""
    return Entries(*(np.empty(0, dtype=kind) for kind in _COLUMNS.values()))


def concatenate(entries: Sequence[Entries]) -> Entries:
    """Entries one after the other."""
    if not entries:
        return empty_entries()
    columns = zip(*(each.columns() for each in entries), strict=True)
    return Entries(*map(np.concatenate, columns))


def entry_keys(
    contents: Iterable[str], sample_ids: Iterable[str], copy: int | None
) -> tuple[Unsigned, Unsigned]:
    """Keys of entries, a BLAKE2b hash in two halves [N].

    Features without augmentation depend on the photo's content alone. Augmented ones also depend on
    the sample's id and the copy, which determine the draws.
    """
    if copy is None:
        texts = [str(content) for content in contents]
    else:
        pairs = zip(contents, sample_ids, strict=True)
        texts = [f"{content}\x1f{sample_id}\x1f{copy}" for content, sample_id in pairs]
    # Sample ids may contain surrogates, for bytes of file names that are not UTF-8.
    digests = (hashlib.blake2b(t.encode(errors="surrogatepass"), digest_size=16).digest() for t in texts)
    halves = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)
    return np.ascontiguousarray(halves[:, 0]), np.ascontiguousarray(halves[:, 1])


def write_index(path: Path, old: Entries, new: Entries, dropped: Sequence[tuple[int, int]] = ()) -> int:
    """Merge entries into a new file; memory use does not grow with ``old``.

    Args:
        path: the new file; it is complete and durable when this returns.
        old: sorted entries, may be memory-mapped.
        new: further entries, oldest first; they replace old ones with the same key.
        dropped: (part, offset) of entries to leave out.

    Returns:
        Number of entries written.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    new = new.in_order()
    capacity, count = len(old) + len(new), 0
    bases = _column_offsets(capacity)
    with path.open("wb") as file:
        file.truncate(HEADER_BYTES + capacity * ENTRY_BYTES)
        for chunk in _merged(old, new):
            kept = _without(chunk, dropped)
            for column, base in zip(kept.columns(), bases, strict=True):
                file.seek(base + count * column.dtype.itemsize)
                file.write(column.tobytes())
            count += len(kept)
        file.seek(0)
        file.write(MAGIC + np.array([count, capacity], dtype="<u8").tobytes())
        file.flush()
        os.fsync(file.fileno())
    return count


def read_index(path: Path) -> Entries | None:
    """Memory-map a file of :func:`write_index`; ``None`` if it is missing or damaged."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
    except OSError:
        return None
    if (len(header) < HEADER_BYTES and size) or header[: len(MAGIC)] != MAGIC:
        return None
    count, capacity = np.frombuffer(header, dtype="<u8", count=2, offset=len(MAGIC)).tolist()
    if count > capacity or size != HEADER_BYTES + capacity * ENTRY_BYTES:
        return None
    if not count:
        return empty_entries()
    try:
        memory = np.memmap(path, mode="r", dtype=np.uint8)
    except FileNotFoundError:  # replaced meanwhile by a merging process
        return None
    columns = [
        # A plain array on the map: slices of np.memmap itself cost microseconds each.
        np.asarray(memory[base : base + count * np.dtype(kind).itemsize]).view(kind)
        for base, kind in zip(_column_offsets(capacity), _COLUMNS.values(), strict=True)
    ]
    return Entries(*columns)


def _column_offsets(capacity: int) -> list[int]:
    sizes = [np.dtype(kind).itemsize * capacity for kind in _COLUMNS.values()]
    return [HEADER_BYTES + sum(sizes[:number]) for number in range(len(sizes))]


def _merged(old: Entries, new: Entries) -> Iterable[Entries]:
    """Sorted entries of both, in chunks; equal keys never fall into different chunks."""
    start, taken = 0, 0
    while start < len(old):
        end = min(start + CHUNK, len(old))
        upto = len(new)
        if end < len(old):
            bound = old.high[end]
            end = max(int(np.searchsorted(old.high, bound)), start + 1)
            upto = int(np.searchsorted(new.high, bound)) if end < len(old) else len(new)
        yield concatenate([old.take(slice(start, end)), new.take(slice(taken, upto))]).in_order()
        start, taken = end, upto
    for first in range(taken, len(new), CHUNK):
        yield new.take(slice(first, first + CHUNK))


def _without(entries: Entries, dropped: Sequence[tuple[int, int]]) -> Entries:
    if not dropped or not len(entries):
        return entries
    is_kept = np.ones(len(entries), dtype=bool)
    for part in {part for part, _ in dropped}:
        offsets = np.array([offset for other, offset in dropped if other == part], dtype=np.uint64)
        is_kept &= ~((entries.part == part) & np.isin(entries.offset, offsets))
    return entries.take(is_kept)
