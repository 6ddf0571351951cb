"""Batches from any map-style data set, with random draws that do not depend on history.

A data set that draws from Python's, numpy's or torch's global generator (a random crop, say) would
give other draws after a resume, or with another number of workers. Here those generators are
seeded for each batch from (seed, epoch, rows), and put back behind it. A data set whose rows are
pure functions of (epoch, row) says so with an attribute ``pure = True`` and saves the time.
"""

from collections.abc import Callable, Iterable, Sized
from typing import Any, Protocol

from torch.utils.data import DataLoader, TensorDataset, default_collate

from roadwork_dist.common.random import derive_seed, isolated_rng, torch_generator_for


class MapDataset(Sized, Protocol):
    """Anything with a length that gives a row for an index.

    A method ``set_epoch(epoch: int)`` is called before each epoch where there is one.
    """

    def __getitem__(self, index: int, /) -> Any: ...


class _SeededRows:
    """Reads a batch's rows with the global generators seeded for that batch."""

    def __init__(self, dataset: MapDataset, seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch
        self.is_pure = isinstance(dataset, TensorDataset) or getattr(dataset, "pure", False)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        if self.is_pure:
            return self._read(indices)
        with isolated_rng(derive_seed(self.seed, "rows", self.epoch, *indices)):
            return self._read(indices)

    def _read(self, indices: list[int]) -> list[Any]:
        read_many = getattr(self.dataset, "__getitems__", None)
        return read_many(indices) if read_many else [self.dataset[index] for index in indices]


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
        workers: loader processes; 0 = read in this process.
        collate: list of rows -> batch; None = torch's ``default_collate``.
        pin_memory: page-locked host memory, for copies to a GPU.

    Returns:
        An iterable, to be gone through once, with as many batches as were asked for.
    """
    set_epoch = getattr(dataset, "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)
    return DataLoader(
        _SeededRows(dataset, seed, epoch),  # type: ignore[arg-type]
        batch_sampler=batches,  # read once, in order
        num_workers=workers,
        collate_fn=collate or default_collate,
        pin_memory=pin_memory,
        # Its own generator, or making the iterator would draw from the global one that dropout uses.
        generator=torch_generator_for(seed, "loader", epoch),
    )
