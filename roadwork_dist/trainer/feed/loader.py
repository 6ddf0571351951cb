"""Loads batches from any map-style data set, with reproducible random draws.

If a data set draws from Python's, numpy's or torch's global generator (a random crop, say), or from
generators of its own, its draws would change after a resume, or with another number of workers. Here all
of them are seeded for each row from (seed, epoch, row), so draws do not depend on the rest of the batch
either; the global generators are restored. A data set whose rows are pure functions of (epoch, row)
declares this with an attribute ``pure = True``, and so does a collate function (:func:`pure`). Its rows are
then read together and not seeded, which saves time.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from torch.utils.data import DataLoader, default_collate

from roadwork_dist.common.errors import DataError
from roadwork_dist.common.generators import generators_of, seed_row
from roadwork_dist.common.random import derive_seed, isolated_rng, torch_generator_for
from roadwork_dist.common.worker import shield_worker
from roadwork_dist.trainer.feed.dataset import (
    MapDataset,
    is_in_memory,
    is_pure,
    read_ahead,
    read_rows,
    set_epoch,
)

F = TypeVar("F", bound=Callable[..., Any])


def pure(collate: F) -> F:
    """Mark a collate function that draws no random numbers."""
    collate.pure = True  # type: ignore[attr-defined]
    return collate


class _SeededBatches:
    """Reads and collates batches with all generators seeded for each row, and for the batch's collation."""

    def __init__(
        self,
        dataset: MapDataset,
        collate: Callable[[list[Any]], Any] | None,
        seed: int,
        epoch: int,
        by_row: bool,
    ) -> None:
        self.dataset = dataset
        self.collate: Callable[[Any], Any] = collate or default_collate
        self.seed, self.epoch = seed, epoch
        # A collate function may draw too (MixUp); torch's own does not.
        self.is_pure = is_pure(dataset) and (collate is None or getattr(collate, "pure", False))
        self.by_row = by_row and not is_pure(dataset)
        # Found before workers are started: each of them gets the list with its own copies.
        self.generators = generators_of(dataset) if self.by_row else []

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, rows: list[int]) -> Any:
        if self.is_pure:
            return self._batch(rows)
        with isolated_rng(derive_seed(self.seed, "rows", self.epoch, *rows)):
            return self._batch(rows)

    def _batch(self, rows: list[int]) -> Any:
        read = self._read_by_row(rows) if self.by_row else self._read(rows)
        try:
            return self.collate(read)
        except (TypeError, RuntimeError, ValueError, KeyError) as error:
            raise DataError(
                f"the rows {_in_words(rows)} cannot be put into one batch ({type(error).__name__}: {error}), "
                "expected tensors, arrays, numbers or texts, of one shape in all rows: change the rows, "
                "or give the Trainer a function collate(rows)"
            ) from error

    def _read_by_row(self, rows: list[int]) -> list[Any]:
        read: list[Any] = []
        for row in rows:
            seed_row(self.generators, self.seed, "row", self.epoch, row)
            read += self._read([row])
        seed_row([], self.seed, "rows", self.epoch, *rows)  # for the collate function
        return read

    def _read(self, rows: list[int]) -> Sequence[Any]:
        try:
            return read_rows(self.dataset, rows)
        except Exception as error:
            error.add_note(f"while reading the rows {_in_words(rows)} of a {type(self.dataset).__name__}")
            raise


def _in_words(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")


def _identity(batch: Any) -> Any:
    return batch


def load_batches(
    dataset: MapDataset,
    batches: Iterable[list[int]],
    *,
    seed: int = 0,
    epoch: int = 0,
    workers: int = 0,
    collate: Callable[[list[Any]], Any] | None = None,
    pin_memory: bool = False,
    by_row: bool = True,
) -> DataLoader[Any]:
    """Read the given batches of rows in the given order.

    Args:
        dataset: map-style data set.
        batches: row numbers of each batch; nothing else is read.
        seed: of the random draws inside the data set.
        epoch: passed to ``dataset.set_epoch`` and part of the seeds.
        workers: loader processes; 0 = read in this process, as is always done if the data set has
            ``in_memory = True``.
        collate: list of rows -> batch; None = torch's ``default_collate``.
        pin_memory: page-locked host memory, for copies to a GPU.
        by_row: seed each row, which makes draws independent of the size of batches; else each batch, as
            version 0.1 did.

    Returns:
        An iterable over these batches, to be used once.
    """
    set_epoch(dataset, epoch)
    batches = read_ahead(dataset, batches)
    # Rows are in the memory of this process or of its GPU: loader processes would only add overhead.
    in_memory = is_in_memory(dataset)
    return DataLoader(
        _SeededBatches(dataset, collate, seed, epoch, by_row),  # type: ignore[arg-type]
        batch_sampler=batches,  # read once, in order
        num_workers=0 if in_memory else workers,
        worker_init_fn=shield_worker,
        collate_fn=_identity,
        pin_memory=pin_memory and not in_memory,
        # Its own generator: otherwise creating the iterator draws from the global one, which dropout uses.
        generator=torch_generator_for(seed, "loader", epoch),
    )
