"""Optional methods of data sets, and a base class for data sets that wrap another one.

``set_epoch(epoch)``     is called before each epoch
``sample_id(row)``       id of a row: for messages, and to detect on resume that the rows have changed
``pure``                 True = a row depends on (epoch, row) alone, so no generator has to be seeded for it
``in_memory``            True = reading is so cheap that loader processes would only add overhead
``read_ahead(batches)``  takes all upcoming batches of row numbers and yields them; may prefetch meanwhile
``__getitems__(rows)``   several rows at once

All are optional. Of torch's own wrappers, ``Subset`` (also from ``random_split``) forwards only the last and
``ConcatDataset`` none. The functions here look inside both, and :class:`WrappedDataset` forwards all.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from itertools import tee
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from roadwork_dist.common.errors import ConfigError

Row = TypeVar("Row")


class MapDataset(Sized, Protocol):
    """Anything with a length that returns a row for an index; the module lists its optional methods."""

    def __getitem__(self, index: int, /) -> Any: ...


def set_epoch(dataset: Any, epoch: int) -> None:
    """Pass the epoch to a data set, or to those inside it that accept it."""
    if _offers(dataset, "set_epoch"):
        dataset.set_epoch(epoch)
        return
    for part in _parts(dataset):
        set_epoch(part, epoch)


def is_pure(dataset: Any) -> bool:
    """Whether rows are pure functions of (epoch, row)."""
    if hasattr(dataset, "pure"):
        return bool(dataset.pure)
    parts = _parts(dataset)
    return all(map(is_pure, parts)) if parts else isinstance(dataset, TensorDataset)


def is_in_memory(dataset: Any) -> bool:
    """Whether rows are in the memory of this process or of its GPU."""
    if hasattr(dataset, "in_memory"):
        return bool(dataset.in_memory)
    parts = _parts(dataset)
    return bool(parts) and all(map(is_in_memory, parts))


def sample_id(dataset: Any, row: int) -> str:
    """Id of a row, from the data set or the one inside it that has the row; else the row's number."""
    inner, number = dataset, row
    while not _offers(inner, "sample_id"):
        if not _parts(inner):
            return str(row)
        part, number = _located(inner, number)
        inner = _parts(inner)[part]
    return str(inner.sample_id(number))


def has_ids(dataset: Any) -> bool:
    """Whether every row has an id."""
    parts = _parts(dataset)
    return _offers(dataset, "sample_id") or (bool(parts) and all(map(has_ids, parts)))


def ids_digest(dataset: MapDataset) -> str:
    """Hash of the ids of a data set's rows, in order; ``none`` where it has no ids."""
    if not has_ids(dataset):
        return "none"
    # Surrogates stand for bytes of file names that are not UTF-8.
    text = "\n".join(sample_id(dataset, row) for row in range(len(dataset))).encode(errors="surrogatepass")
    return hashlib.sha256(text).hexdigest()[:12]


def rows_digest(dataset: Any) -> str:
    """A hash of which rows a data set has, as far as it can be told without reading them.

    Of tensors their values, of ``Subset`` its indices, else the ids, or the length where there are none.
    """
    if has_ids(dataset):  # however it is put together
        return ids_digest(dataset)
    digest = hashlib.sha256()
    _add_rows(digest, dataset)
    return digest.hexdigest()[:12]


def _add_rows(digest: Any, dataset: Any) -> None:
    digest.update(f"{type(dataset).__name__} {len(dataset)}\n".encode())
    if isinstance(dataset, TensorDataset):
        for tensor in dataset.tensors:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    elif _offers(dataset, "sample_id"):
        digest.update(ids_digest(dataset).encode())
    else:
        if isinstance(dataset, Subset):
            digest.update(np.asarray(dataset.indices, dtype=np.int64).tobytes())
        for part in _parts(dataset):
            _add_rows(digest, part)


def read_ahead(dataset: Any, batches: Iterable[list[int]]) -> Iterable[list[int]]:
    """Let a data set, or those inside it, prefetch upcoming batches; yields the same batches."""
    if _offers(dataset, "read_ahead"):
        ahead: Iterable[list[int]] = dataset.read_ahead(batches)
        return ahead
    parts = _parts(dataset)
    if not any(map(_reads_ahead, parts)):
        return batches
    return _read_ahead_of_parts(dataset, parts, batches)


def check_map_style(dataset: object, name: str) -> None:
    """Refuse what has no length or cannot be indexed by row.

    Raises:
        ConfigError: it is an iterable data set, a loader, an iterator, …
    """
    if isinstance(dataset, Mapping):
        raise ConfigError(
            f"{name} is a dict of {', '.join(map(str, list(dataset)[:4]))}, expected one data set: give one "
            "of them, or torch.utils.data.ConcatDataset of several"
        )
    is_map = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, IterableDataset) or not is_map:
        raise ConfigError(
            f"{name} is of type {type(dataset).__name__}, expected a map-style data set with __len__ and "
            "__getitem__(row): only then can each row be assigned to one process and training resume in the "
            "middle of an epoch. Pass the data set itself instead of a loader; a list instead of a stream "
            "that fits into memory; for a larger stream, shards or Parquet on its server, whose rows have "
            "numbers (load_manifest of its URL, or of hf:owner/name:split?streaming)"
        )


class WrappedDataset(Dataset[Row], Generic[Row]):
    """Base class of data sets that select or transform the rows of another one.

    Everything that the module lists is forwarded to ``dataset``, so a wrapper never disables prefetching or
    hides ids. Override :meth:`inner_row` to select rows, ``__getitem__`` to transform them.

    Args:
        dataset: the wrapped data set.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def inner_row(self, row: int) -> int:
        """Number of a row in the wrapped data set."""
        return row

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Row:
        inside: Row = self.dataset[self.inner_row(row)]
        return inside

    def __getitems__(self, rows: list[int]) -> Sequence[Row]:
        changes_rows = type(self).__getitem__ is not WrappedDataset.__getitem__
        return [self[row] for row in rows] if changes_rows else read_rows(self.dataset, self._inner(rows))

    def set_epoch(self, epoch: int) -> None:
        """Forward the epoch."""
        set_epoch(self.dataset, epoch)

    def sample_id(self, row: int) -> str:
        """Id of the wrapped row."""
        return sample_id(self.dataset, self.inner_row(row))

    @property
    def pure(self) -> bool:
        """Whether the wrapped data set is."""
        return is_pure(self.dataset)

    @property
    def in_memory(self) -> bool:
        """Whether the wrapped data set is."""
        return is_in_memory(self.dataset)

    def read_ahead(self, batches: Iterable[list[int]]) -> Iterator[list[int]]:
        """Let the wrapped data set prefetch the rows that will be read."""
        own, theirs = tee(batches)
        for batch, _ in zip(own, read_ahead(self.dataset, map(self._inner, theirs)), strict=True):
            yield batch

    def _inner(self, rows: Iterable[int]) -> list[int]:
        return [self.inner_row(row) for row in rows]


def read_rows(dataset: Any, rows: list[int]) -> Sequence[Any]:
    """Several rows, in one call if the data set supports it."""
    read_many: Callable[[list[int]], Sequence[Any]] | None = getattr(dataset, "__getitems__", None)
    return read_many(rows) if read_many else [dataset[row] for row in rows]


def _parts(dataset: Any) -> list[Any]:
    """The data sets inside torch's own wrappers."""
    if isinstance(dataset, ConcatDataset):
        return list(dataset.datasets)
    return [dataset.dataset] if isinstance(dataset, Subset) else []


def _located(dataset: Any, row: int) -> tuple[int, int]:
    """Which of the :func:`_parts` has a row, and the row's number in it."""
    if isinstance(dataset, Subset):
        return 0, dataset.indices[row]
    part = bisect_right(dataset.cumulative_sizes, row)
    return part, row - (dataset.cumulative_sizes[part - 1] if part else 0)


def _offers(dataset: Any, method: str) -> bool:
    """Whether there is such a method; another attribute (a list of ids named ``sample_id``) is none."""
    return callable(getattr(dataset, method, None))


def _reads_ahead(dataset: Any) -> bool:
    return _offers(dataset, "read_ahead") or any(map(_reads_ahead, _parts(dataset)))


def _read_ahead_of_parts(
    dataset: Any, parts: Sequence[Any], batches: Iterable[list[int]]
) -> Iterator[list[int]]:
    own, *theirs = tee(batches, len(parts) + 1)

    def rows_of(part: int, batch: list[int]) -> list[int]:
        located = (_located(dataset, row) for row in batch)
        return [number for number_of_part, number in located if number_of_part == part]

    streams = [
        read_ahead(part, map(partial(rows_of, number), stream))
        for number, (part, stream) in enumerate(zip(parts, theirs, strict=True))
    ]
    for batch, *_ in zip(own, *streams, strict=True):
        yield batch
