"""Batches whose random draws do not depend on history."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from roadwork_dist.common.random import seed_everything
from roadwork_dist.trainer.feed.dataset import WrappedDataset
from roadwork_dist.trainer.feed.loader import load_batches
from roadwork_dist.trainer.feed.sampler import Sampler

BATCHES = [[0, 1, 2], [3, 4], [5, 6, 7]]


class Noisy:
    """Each row: its number and a draw of each global generator."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        self.read.append(index)
        return torch.tensor([float(index), float(torch.rand(())), np.random.rand(), random.random()])


def draws(batches: list[list[int]] = BATCHES, **settings: Any) -> list[Tensor]:
    return list(load_batches(Noisy(), batches, **({"seed": 1, "epoch": 2} | settings)))


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.fixture(scope="module")
def expected() -> list[Tensor]:
    return draws()


@pytest.mark.parametrize("workers", [1, 2])
def test_draws_do_not_depend_on_workers(expected: list[Tensor], workers: int) -> None:
    assert same(draws(workers=workers), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_draws_do_not_depend_on_the_point_of_resume(expected: list[Tensor], workers: int) -> None:
    assert same(draws(BATCHES[1:], workers=workers), expected[1:])


@pytest.mark.parametrize("workers", [0, 1])
def test_draws_do_not_depend_on_the_global_generators(expected: list[Tensor], workers: int) -> None:
    seed_everything(99)
    assert same(draws(workers=workers), expected)


def test_draws_differ_between_rows_batches_epochs_and_seeds(expected: list[Tensor]) -> None:
    values = torch.cat(expected)[:, 1:]
    assert len(values.unique()) == values.numel()
    for other in (draws(epoch=3), draws(seed=2)):
        assert not set(torch.cat(other)[:, 1:].flatten().tolist()) & set(values.flatten().tolist())


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generators_are_left_alone(workers: int) -> None:
    seed_everything(5)
    untouched = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    seed_everything(5)
    draws(workers=workers)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == untouched


def test_a_failing_row_leaves_the_global_generators_alone() -> None:
    class Broken(Noisy):
        def __getitem__(self, index: int) -> Tensor:
            torch.rand(3)
            raise OSError("the disk is gone")

    before = torch.get_rng_state()
    with pytest.raises(OSError, match="the disk is gone"):
        list(load_batches(Broken(), BATCHES))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pure_data_set_is_not_seeded() -> None:
    class Pure(Noisy):
        pure = True

    seed_everything(5)
    first = float(torch.rand(()))
    seed_everything(5)
    # The row's draw is the next one of the global generator.
    assert float(next(iter(load_batches(Pure(), BATCHES)))[0, 1]) == pytest.approx(first)


def test_a_tensor_data_set_counts_as_pure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(seed: int) -> None:
        raise AssertionError("seeded")

    monkeypatch.setattr("roadwork_dist.trainer.feed.loader.isolated_rng", fail)
    data = TensorDataset(torch.arange(8))
    assert [batch[0].tolist() for batch in load_batches(data, BATCHES)] == BATCHES
    with pytest.raises(AssertionError, match="seeded"):
        draws()


@pytest.mark.parametrize("workers", [0, 1])
def test_the_data_set_is_told_the_epoch(workers: int) -> None:
    class Epochs(Noisy):
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __getitem__(self, index: int) -> Tensor:
            return torch.tensor(self.epoch)

    data = Epochs()
    assert torch.cat(list(load_batches(data, BATCHES, epoch=7, workers=workers))).tolist() == [7] * 8


def test_skipped_rows_are_not_read() -> None:
    data, sampler = Noisy(), Sampler(8, 2, 2)
    left = [micro.indices for step in sampler.steps(0, start=1) for micro in step]
    list(load_batches(data, left))
    assert data.read == sampler.order(0)[4:].tolist()


def test_rows_are_read_all_at_once_where_the_data_set_can() -> None:
    class Many(Noisy):
        def __getitems__(self, indices: list[int]) -> list[Tensor]:
            self.read.append(-len(indices))
            return [torch.tensor(index) for index in indices]

    class PureAndMany(Many):
        pure = True

    for data, read in (
        (PureAndMany(), [-3, -2, -3]),
        (Many(), [-1] * 8),
    ):  # what may draw is seeded row by row
        assert [batch.tolist() for batch in load_batches(data, BATCHES)] == BATCHES
        assert data.read == read


def test_own_collate() -> None:
    assert list(load_batches(Noisy(), BATCHES, collate=len)) == [3, 2, 3]


class OwnDraws:
    """Draws from generators of its own, as a data set, a transform and a wrapper do."""

    def __init__(self) -> None:
        self.torch_draws = torch.Generator().manual_seed(1)
        self.transforms = [NumpyTransform(np.random.default_rng(1)), NumpyTransform(np.random.RandomState(1))]
        self.options = {"python": random.Random(1)}

    def __len__(self) -> int:
        return 256

    def __getitem__(self, row: int) -> Tensor:
        own = [float(torch.rand((), generator=self.torch_draws)), self.options["python"].random()]
        return torch.tensor([*own, *(transform() for transform in self.transforms)], dtype=torch.float64)


class NumpyTransform:
    def __init__(self, rng: Any) -> None:
        self.rng = rng

    def __call__(self) -> float:
        return float(
            self.rng.random_sample() if isinstance(self.rng, np.random.RandomState) else self.rng.random()
        )


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: Subset(data, range(256)), WrappedDataset])
def test_generators_of_a_data_set_are_seeded_for_each_row(wrap: Any) -> None:
    def drawn(batches: list[list[int]], workers: int, epoch: int = 0) -> Tensor:
        return torch.cat(list(load_batches(wrap(OwnDraws()), batches, workers=workers, epoch=epoch)))

    rows = [list(range(start, start + 32)) for start in range(0, 256, 32)]
    whole = drawn(rows, 0)
    assert all(len(column.unique()) == 256 for column in whole.T)
    assert torch.equal(drawn(rows, 2), whole)
    assert torch.equal(drawn(rows[3:], 0), whole[96:])  # as after a resume
    assert not set(drawn(rows, 0, epoch=1).flatten().tolist()) & set(whole.flatten().tolist())


@pytest.mark.parametrize("dataset", [Noisy, OwnDraws])
def test_draws_do_not_depend_on_the_batch_that_a_row_is_in(dataset: Any) -> None:
    def drawn(batches: list[list[int]]) -> Tensor:
        return torch.cat(list(load_batches(dataset(), batches)))

    assert torch.equal(drawn([[0, 1, 2, 3]]), drawn([[0], [1, 2], [3]]))


def test_a_run_of_version_0_1_keeps_the_seeds_of_its_batches() -> None:
    def drawn(batches: list[list[int]]) -> Tensor:
        return torch.cat(list(load_batches(Noisy(), batches, by_row=False)))

    assert torch.equal(drawn([[0, 1]]), drawn([[0, 1]]))
    assert not torch.equal(drawn([[0, 1]]), drawn([[0], [1]]))
