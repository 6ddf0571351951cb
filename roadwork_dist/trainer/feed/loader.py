"""Batches from any map-style data set, with random draws that do not depend on history.

A data set that draws from Python's, numpy's or torch's global generator (a random crop, say) would
give other draws after a resume, or with another number of workers. Here those generators are
seeded for each batch from (seed, epoch, rows), collating included, and put back behind it. A data
set whose rows are pure functions of (epoch, row) says so with an attribute ``pure = True``, which
saves the time where torch's own collate function is used.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sized
from typing import Any, Protocol

from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.random import derive_seed, isolated_rng, torch_generator_for
from roadwork_dist.trainer.feed.worker import shield_worker


class MapDataset(Sized, Protocol):
    """Anything with a length that gives a row for an index.

    A method ``set_epoch(epoch: int)`` is called before each epoch where there is one, also through
    torch's ``Subset`` and ``ConcatDataset``. A method ``read_ahead(batches)`` gets the row numbers of all
    batches to come and gives them back one by one: it may fetch what they need meanwhile.
    """

    def __getitem__(self, index: int, /) -> Any: ...


class _SeededBatches:
    """Reads and collates a batch with the global generators seeded for that batch."""

    def __init__(
        self, dataset: MapDataset, collate: Callable[[list[Any]], Any] | None, seed: int, epoch: int
    ) -> None:
        self.dataset, self.collate = dataset, collate or default_collate
        self.seed, self.epoch = seed, epoch
        # A collate function may draw too (MixUp); torch's own does not.
        has_pure_rows = isinstance(dataset, TensorDataset) or getattr(dataset, "pure", False)
        self.is_pure = has_pure_rows and collate is None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> Any:
        if self.is_pure:
            return self.collate(self._read(indices))
        with isolated_rng(derive_seed(self.seed, "rows", self.epoch, *indices)):
            return self.collate(self._read(indices))

    def _read(self, indices: list[int]) -> list[Any]:
        read_many = getattr(self.dataset, "__getitems__", None)
        return read_many(indices) if read_many else [self.dataset[index] for index in indices]


def _as_it_is(batch: Any) -> Any:
    return batch


def _tell_epoch(dataset: Any, epoch: int) -> None:
    """Also inside torch's ``Subset`` (which ``random_split`` gives) and ``ConcatDataset``."""
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)
    elif isinstance(dataset, Subset):
        _tell_epoch(dataset.dataset, epoch)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            _tell_epoch(part, epoch)


def sample_id(dataset: MapDataset, row: int) -> str:
    """Id of a row: the ``sample_id(row)`` of the data set or of the one it is a part of; else the row."""
    inner: Any = dataset
    number = row
    while not hasattr(inner, "sample_id"):
        if isinstance(inner, Subset):
            inner, number = inner.dataset, inner.indices[number]
        elif isinstance(inner, ConcatDataset):
            part = bisect_right(inner.cumulative_sizes, number)
            number -= inner.cumulative_sizes[part - 1] if part else 0
            inner = inner.datasets[part]
        else:
            return str(row)
    return str(inner.sample_id(number))


def _has_ids(dataset: Any) -> bool:
    if hasattr(dataset, "sample_id"):
        return True
    if isinstance(dataset, ConcatDataset):
        return all(map(_has_ids, dataset.datasets))
    return isinstance(dataset, Subset) and _has_ids(dataset.dataset)


def ids_digest(dataset: MapDataset) -> str:
    """Which rows a data set has, in which order: a hash of their ids; ``none`` where it tells no ids."""
    if not _has_ids(dataset):
        return "none"
    own: Callable[[int], Any] | None = getattr(dataset, "sample_id", None)
    ids = map(own, range(len(dataset))) if own else (sample_id(dataset, row) for row in range(len(dataset)))
    # Surrogates stand for bytes of file names that are not UTF-8.
    text = "\n".join(map(str, ids)).encode(errors="surrogatepass")
    return hashlib.sha256(text).hexdigest()[:12]


def check_map_style(dataset: object, name: str) -> None:
    """Refuse what has no length or gives no row for a number.

    Raises:
        ConfigError: it is an iterable data set, a loader, an iterator, …
    """
    is_map = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, IterableDataset) or not is_map:
        raise ConfigError(
            f"{name} is of type {type(dataset).__name__}, expected a map-style data set with __len__ and "
            "__getitem__(row): only such rows can be dealt to processes once each and gone on with in the "
            "middle of an epoch; give the data set itself, not a loader, a list for a stream that fits into "
            "memory, and a large stream as shards or Parquet on its server: their rows are found by number "
            "(load_manifest of its URL, or of hf:owner/name:split?streaming)"
        )


def load_batches(
    dataset: MapDataset,
    batches: Iterable[list[int]],
    *,
    seed: int = 0,
    epoch: int = 0,
    workers: int = 0,
    collate: Callable[[list[Any]], Any] | None = None,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Read the given batches of rows in the given order.

    Args:
        dataset: map-style data set.
        batches: row numbers of each batch; nothing else is read.
        seed: of the random draws inside the data set.
        epoch: handed to ``dataset.set_epoch`` and part of the seeds.
        workers: loader processes; 0 = read in this process, as is always done with a data set that says
            of itself ``in_memory = True``.
        collate: list of rows -> batch; None = torch's ``default_collate``.
        pin_memory: page-locked host memory, for copies to a GPU.

    Returns:
        An iterable, to be gone through once, with as many batches as were asked for.
    """
    _tell_epoch(dataset, epoch)
    batches = getattr(dataset, "read_ahead", _as_it_is)(batches)
    # Rows in the memory of this process or of its GPU: no other process is nearer to them.
    in_memory = getattr(dataset, "in_memory", False)
    return DataLoader(
        _SeededBatches(dataset, collate, seed, epoch),  # type: ignore[arg-type]
        batch_sampler=batches,  # read once, in order
        num_workers=0 if in_memory else workers,
        worker_init_fn=shield_worker,
        collate_fn=_as_it_is,
        pin_memory=pin_memory and not in_memory,
        # Its own generator, or making the iterator would draw from the global one that dropout uses.
        generator=torch_generator_for(seed, "loader", epoch),
    )
