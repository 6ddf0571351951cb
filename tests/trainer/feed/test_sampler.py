"""Which rows are read when, over any number of ranks."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.trainer.feed.sampler import MicroBatch, Sampler, evaluation_batches

lengths = st.integers(1, 200)
small = st.integers(1, 6)
fast = settings(max_examples=60, deadline=None)


def plan(
    length: int, batch: int, accumulation: int, world: int, epoch: int = 0
) -> list[list[list[MicroBatch]]]:
    """Micro-batches by rank and step."""
    return [
        list(Sampler(length, batch, accumulation, rank, world, seed=3).steps(epoch)) for rank in range(world)
    ]


def own_rows(micros: list[MicroBatch]) -> list[int]:
    return [row for micro in micros if not micro.is_filler for row in micro.indices]


@fast
@given(lengths, small, small, small)
def test_every_row_is_trained_exactly_once_per_epoch(
    length: int, batch: int, accumulation: int, world: int
) -> None:
    ranks = plan(length, batch, accumulation, world)
    rows = [row for steps in ranks for micros in steps for row in own_rows(micros)]
    assert sorted(rows) == list(range(length))


@fast
@given(lengths, small, small, small)
def test_ranks_run_the_same_number_of_full_enough_micro_batches(
    length: int, batch: int, accumulation: int, world: int
) -> None:
    ranks = plan(length, batch, accumulation, world)
    assert {len(steps) for steps in ranks} == {Sampler(length, batch, accumulation, 0, world).steps_per_epoch}
    for step in zip(*ranks, strict=True):
        assert len({len(micros) for micros in step}) == 1  # each backward pass is met by all ranks
        assert len(step[0]) <= accumulation
        for micro in chain.from_iterable(step):
            assert 1 <= len(micro.indices) <= batch
            assert not micro.is_filler or len(micro.indices) == 1
        trained = set(chain.from_iterable(own_rows(micros) for micros in step))
        fillers = {m.indices[0] for m in chain.from_iterable(step) if m.is_filler}
        assert fillers <= trained  # nothing from another step


@fast
@given(lengths, small, small, small)
def test_a_step_has_the_same_rows_whatever_deals_them(
    length: int, batch: int, accumulation: int, world: int
) -> None:
    ranks = plan(length, batch, accumulation, world)
    whole = plan(length, batch * accumulation * world, 1, 1)[0]
    assert len(ranks[0]) == len(whole)
    for dealt, expected in zip(zip(*ranks, strict=True), whole, strict=True):
        rows = chain.from_iterable(own_rows(micros) for micros in dealt)
        assert list(rows) == own_rows(expected)


@fast
@given(lengths, small, small, small, small)
def test_another_number_of_ranks_shares_the_rows_of_each_step(
    length: int, batch: int, accumulation: int, world: int, others: int
) -> None:
    rows = batch * accumulation * world
    whole = plan(length, rows, 1, 1)[0]
    ranks = [
        list(Sampler(length, batch, accumulation, r, others, seed=3, effective_batch=rows).steps(0))
        for r in range(others)
    ]
    for dealt, expected in zip(zip(*ranks, strict=True), whole, strict=True):
        assert len({len(micros) for micros in dealt}) == 1
        assert all(len(micro.indices) <= batch for micro in chain.from_iterable(dealt))
        shares = [own_rows(micros) for micros in dealt]
        assert list(chain.from_iterable(shares)) == own_rows(expected)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1  # 32 rows on 3 ranks: 11, 11, 10


@fast
@given(lengths, small, small, small, st.data())
def test_starting_at_a_step_gives_the_tail(
    length: int, batch: int, accumulation: int, world: int, data: st.DataObject
) -> None:
    sampler = Sampler(length, batch, accumulation, world - 1, world)
    start = data.draw(st.integers(0, sampler.steps_per_epoch))
    assert list(sampler.steps(5, start=start)) == list(sampler.steps(5))[start:]


def test_epochs_and_seeds_differ_and_repeat() -> None:
    first = Sampler(50, 4, seed=1)
    assert first.order(0).tolist() == Sampler(50, 9, 2, seed=1).order(0).tolist()
    assert first.order(0).tolist() != first.order(1).tolist()
    assert first.order(0).tolist() != Sampler(50, 4, seed=2).order(0).tolist()


def test_a_short_last_step_is_dealt_evenly_by_hand() -> None:
    # 10 rows, 2 ranks x 2 micro-batches of 2 = 8 a step; the last step has 2 rows, 1 a rank.
    ranks = plan(10, 2, 2, 2)
    assert [[len(m.indices) for m in step] for step in ranks[0]] == [[2, 2], [1]]
    assert [[len(m.indices) for m in step] for step in ranks[1]] == [[2, 2], [1]]
    # 9 rows: the last step has a single one; rank 1 reads it too, as a filler.
    left, right = (steps[1] for steps in plan(9, 2, 2, 2))
    assert (left[0].is_filler, right[0].is_filler) == (False, True)
    assert left[0].indices == right[0].indices


def test_weighted_draws_follow_the_weights_and_repeat() -> None:
    weights = [5.0, 2.5, 1.0, 0.3, 0.0] * 2000
    sampler = Sampler(len(weights), 32, weights=weights, seed=4)
    drawn = sampler.order(0)
    assert len(drawn) == len(weights)
    shares = np.bincount(drawn % 5, minlength=5) / len(drawn)
    expected = np.array([5.0, 2.5, 1.0, 0.3, 0.0]) / 8.8
    # Five standard errors of a share p over n draws: sqrt(p (1 - p) / n).
    assert np.all(np.abs(shares - expected) <= 5 * np.sqrt(expected * (1 - expected) / len(drawn)))
    assert shares[4] == 0
    assert drawn.tolist() == Sampler(len(weights), 8, 4, weights=weights, seed=4).order(0).tolist()
    assert drawn.tolist() != sampler.order(1).tolist()


@pytest.mark.parametrize("world", [1, 3])
def test_weighted_epochs_have_as_many_draws_as_rows(world: int) -> None:
    ranks = [list(Sampler(23, 2, 2, r, world, weights=[1.0] * 23).steps(0)) for r in range(world)]
    assert sum(len(own_rows(micros)) for steps in ranks for micros in steps) == 23


@fast
@given(st.integers(0, 200), st.integers(1, 40), small)
def test_evaluation_reads_every_row_exactly_once(length: int, batch: int, world: int) -> None:
    ranks = [evaluation_batches(length, batch, rank, world) for rank in range(world)]
    rows = [row for batches in ranks for rows in batches for row in rows]
    assert rows == list(range(length))  # rank after rank in the order of the table
    assert all(1 <= len(rows) <= batch for batches in ranks for rows in batches)


@pytest.mark.parametrize(
    ("length", "weights", "told"),
    [
        (0, None, "0 rows, expected at least 1"),
        (3, [1.0, 2.0], "2 sampling weights for 3 rows"),
        (3, [1.0, -1.0, 1.0], "sampling weight of row 1 is -1.0"),
        (3, [1.0, 1.0, float("nan")], "sampling weight of row 2 is nan"),
        (2, [0.0, 0.0], "all sampling weights are 0"),
    ],
)
def test_unusable_input_is_told(length: int, weights: list[float] | None, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Sampler(length, 2, weights=weights)
