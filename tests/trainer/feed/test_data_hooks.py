"""What data sets offer besides rows reaches the loader through every wrapper."""

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from roadwork_dist.trainer.feed.dataset import (
    WrappedDataset,
    has_ids,
    ids_digest,
    is_in_memory,
    is_pure,
    read_ahead,
    sample_id,
    set_epoch,
)
from roadwork_dist.trainer.feed.loader import load_batches, pure


class Everything:
    """Offers all hooks and notes what was asked of it."""

    pure = True
    in_memory = True

    def __init__(self, name: str, rows: int = 6) -> None:
        self.name, self.rows, self.epoch = name, rows, -1
        self.prefetched: list[list[int]] = []
        self.read_together: list[list[int]] = []

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> int:
        return row

    def __getitems__(self, rows: list[int]) -> list[int]:
        self.read_together.append(rows)
        return rows

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def sample_id(self, row: int) -> str:
        return f"{self.name}{row}"

    def read_ahead(self, batches: Iterable[list[int]]) -> Iterator[list[int]]:
        for batch in batches:
            self.prefetched.append(batch)
            yield batch


class Reversed(WrappedDataset[int]):
    def inner_row(self, row: int) -> int:
        return len(self.dataset) - 1 - row


class Doubled(WrappedDataset[int]):
    def __getitem__(self, row: int) -> int:
        return 2 * super().__getitem__(row)


WRAPPERS: dict[str, tuple[Any, list[int]]] = {
    "own": (Reversed, [5, 4]),
    "own in own": (lambda inner: Reversed(Reversed(inner)), [0, 1]),
    "subset": (lambda inner: Subset(inner, [3, 1, 2]), [3, 1]),
    "own in a subset": (lambda inner: Subset(Reversed(inner), [3, 1, 2]), [2, 4]),
    "joined": (lambda inner: ConcatDataset([inner, inner]), [0, 1]),
    "changed": (Doubled, [0, 1]),
}


@pytest.mark.parametrize(("wrap", "rows"), WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_forward_everything(wrap: Any, rows: list[int]) -> None:
    inner = Everything("a")
    outer = wrap(inner)
    assert is_pure(outer)
    assert is_in_memory(outer)
    assert has_ids(outer)
    set_epoch(outer, 7)
    assert inner.epoch == 7
    assert [sample_id(outer, row) for row in (0, 1)] == [f"a{row}" for row in rows]
    assert list(read_ahead(outer, [[0, 1], [0]])) == [[0, 1], [0]]
    assert [batch for batch in inner.prefetched if batch] == [rows, rows[:1]]


def test_parts_of_a_joined_set_prefetch_what_is_theirs() -> None:
    first, second = Everything("a", 2), Everything("b", 3)
    joined = ConcatDataset([first, Reversed(second)])
    assert list(read_ahead(joined, [[0, 4], [2], [1, 3]])) == [[0, 4], [2], [1, 3]]
    assert first.prefetched == [[0], [], [1]]
    assert second.prefetched == [[0], [2], [1]]
    assert [sample_id(joined, row) for row in range(5)] == ["a0", "a1", "b2", "b1", "b0"]


def test_prefetching_stays_as_lazy_as_the_batches() -> None:
    def batches() -> Iterator[list[int]]:
        yield [0]
        raise AssertionError("asked for a batch that nobody needs yet")

    inner = Everything("a")
    assert next(iter(read_ahead(Reversed(inner), batches()))) == [0]
    assert inner.prefetched == [[5]]


def test_rows_are_read_together_unless_the_wrapper_changes_them() -> None:
    inner = Everything("a")
    assert Reversed(inner).__getitems__([0, 1]) == [5, 4]
    assert inner.read_together == [[5, 4]]
    assert Doubled(inner).__getitems__([1, 2]) == [2, 4]
    assert inner.read_together == [[5, 4]]


@pytest.mark.parametrize("hook", ["pure", "in_memory"])
def test_one_part_that_says_no_decides_for_a_joined_set(hook: str) -> None:
    no = Everything("b")
    setattr(no, hook, False)
    joined = ConcatDataset([Everything("a"), no])
    assert is_pure(joined) == (hook != "pure")
    assert is_in_memory(joined) == (hook != "in_memory")


def test_plain_data_sets_have_what_torch_knows() -> None:
    tensors = TensorDataset(torch.arange(3))
    assert is_pure(Subset(tensors, [0]))
    assert not is_in_memory(tensors)
    assert not has_ids(Subset(tensors, [0]))
    assert ids_digest(tensors) == "none"
    assert not is_pure([1, 2])


def test_an_attribute_that_is_no_method_is_no_hook() -> None:
    class Named(list[int]):
        sample_id = ("a", "b")

    data = Named([1, 2])
    assert sample_id(data, 1) == "1"
    assert ids_digest(data) == "none"


@pytest.mark.parametrize("says_so", [True, False])
def test_a_collate_function_that_says_that_it_is_pure_is_not_seeded(says_so: bool) -> None:
    def draw(rows: list[int]) -> float:
        return float(torch.rand(()))

    torch.manual_seed(5)
    expected = float(torch.rand(()))
    torch.manual_seed(5)
    (drawn,) = load_batches(Everything("a"), [[0, 1]], collate=pure(draw) if says_so else draw)
    assert (drawn == expected) == says_so  # not seeded: the caller's own generator goes on
