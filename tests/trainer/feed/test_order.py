"""The order that keeps to shards: nothing lost, few shards at a time, the same on any number of processes."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roadwork_dist.common.errors import CheckpointError, ConfigError
from roadwork_dist.trainer.feed.order import ShardOrder
from roadwork_dist.trainer.feed.sampler import MicroBatch, Sampler
from roadwork_dist.trainer.row_plan import keep_row_plan, row_plan

small = st.integers(1, 5)
shard_sizes = st.lists(st.integers(1, 30), min_size=1, max_size=12)
fast = settings(max_examples=60, deadline=None)


def shards_of(sizes: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), sizes)


def sampler_of(sizes: list[int], window: int = 3, **arguments: object) -> Sampler:
    shards = shards_of(sizes)
    settings = {"batch_size": 2, "seed": 3, "shard_order": ShardOrder(shards, window), **arguments}
    return Sampler(len(shards), **settings)  # type: ignore[arg-type]


def own_rows(steps: list[list[MicroBatch]]) -> list[int]:
    return [row for micros in steps for micro in micros if not micro.is_filler for row in micro.indices]


def most_open(shards: list[int]) -> int:
    """Shards between their first and their last row, at the fullest time."""
    last = {shard: place for place, shard in enumerate(shards)}
    most, current = 0, set()
    for place, shard in enumerate(shards):
        current.add(shard)
        most = max(most, len(current))
        if last[shard] == place:
            current.remove(shard)
    return most


@fast
@given(shard_sizes, small, small, st.integers(1, 4), st.integers(0, 3))
def test_every_row_is_there_once_and_ranks_share_no_shard_but_the_cut_ones(
    sizes: list[int], batch: int, world: int, window: int, epoch: int
) -> None:
    ranks = [
        own_rows(list(sampler_of(sizes, window, batch_size=batch, rank=r, world_size=world).steps(epoch)))
        for r in range(world)
    ]
    assert sorted(row for rows in ranks for row in rows) == list(range(sum(sizes)))
    shards = shards_of(sizes)
    touched = [shards[rows].tolist() for rows in ranks]
    assert sum(len(set(own)) for own in touched) <= len(sizes) + world - 1
    assert all(most_open(own) <= window for own in touched)


@fast
@given(st.integers(1, 6), small, small, st.integers(1, 12))
def test_equal_shards_that_share_out_evenly_are_each_read_by_one_rank(
    each: int, world: int, batch: int, rows: int
) -> None:
    sizes = [rows * batch] * each * world
    shards = shards_of(sizes)
    seen: Counter[int] = Counter()
    for rank in range(world):
        sampler = sampler_of(sizes, batch_size=batch, rank=rank, world_size=world)
        seen.update(set(shards[own_rows(list(sampler.steps(0)))].tolist()))
    assert set(seen.values()) == {1}
    assert len(seen) == len(sizes)


@fast
@given(shard_sizes, small, small, st.data())
def test_weights_draw_the_same_rows_as_without_shards(
    sizes: list[int], batch: int, world: int, data: st.DataObject
) -> None:
    length = sum(sizes)
    weights = data.draw(st.lists(st.floats(0.1, 5), min_size=length, max_size=length))
    kept = sampler_of(sizes, batch_size=batch, world_size=world, weights=weights)
    plain = Sampler(length, batch, world_size=world, seed=3, weights=weights)
    assert Counter(kept.order(1).tolist()) == Counter(plain.order(1).tolist())


@fast
@given(shard_sizes, small, small, small, st.data())
def test_starting_at_a_step_gives_the_tail_on_any_number_of_processes(
    sizes: list[int], batch: int, world: int, others: int, data: st.DataObject
) -> None:
    first = sampler_of(sizes, batch_size=batch, world_size=world)
    start = data.draw(st.integers(0, first.steps_per_epoch))
    order = first.order(2)[start * first.rows_per_step :].tolist()
    later = [
        sampler_of(
            sizes,
            batch_size=batch,
            rank=rank,
            world_size=others,
            effective_batch=first.rows_per_step,
            lanes=world,
        )
        for rank in range(others)
    ]
    steps = [list(sampler.steps(2, start=start)) for sampler in later]
    assert len({tuple(len(micros) for micros in each) for each in steps}) == 1  # nobody waits for nobody
    dealt = [row for step in zip(*steps, strict=True) for micros in step for row in own_rows([micros])]
    assert dealt == order


def test_shards_take_turns_and_rows_are_mixed() -> None:
    sampler = sampler_of([50] * 8, window=2)
    first, second = sampler.order(0), sampler.order(1)
    shards = shards_of([50] * 8)
    assert shards[first].tolist() != shards[second].tolist()
    assert first.tolist() == sampler_of([50] * 8, window=2).order(0).tolist()
    places = [np.flatnonzero(shards[first] == shard).mean() for shard in range(8)]
    assert places != sorted(places)  # the order of the shards is random
    inside = first[shards[first] == 3]
    assert inside.tolist() != sorted(inside.tolist())
    assert (np.diff(shards[first]) != 0).sum() > 100  # two shards at a time, not one after the other


def test_a_run_keeps_its_lanes_and_refuses_another_layout() -> None:
    started = sampler_of([10, 10, 10], batch_size=4, world_size=2)
    was = row_plan(started, "ids", "rows")
    alone = keep_row_plan(sampler_of([10, 10, 10], batch_size=8), "ids", "rows", was, Path("run"))
    assert alone.order(0).tolist() == started.order(0).tolist()
    four = keep_row_plan(
        sampler_of([10, 10, 10], batch_size=4, world_size=4),
        "ids",
        "rows",
        was,
        Path("run"),
    )
    assert four.order(0).tolist() == started.order(0).tolist()
    for other, told in (
        (sampler_of([15, 15], batch_size=4, world_size=2), "digest of the rows' shards was"),
        (sampler_of([10, 10, 10], window=2, batch_size=4, world_size=2), "shards that are mixed was 3, is 2"),
        (Sampler(30, 4, world_size=2, seed=3), "shards that are mixed was 3, is none"),
    ):
        with pytest.raises(CheckpointError, match=told):
            keep_row_plan(other, "ids", "rows", was, Path("run"))
    with pytest.raises(CheckpointError, match="shards that are mixed was none, is 3"):
        keep_row_plan(
            started, "ids", "rows", row_plan(Sampler(30, 4, world_size=2, seed=3), "ids", "rows"), Path("run")
        )


def test_an_order_that_does_not_fit_is_told() -> None:
    with pytest.raises(ConfigError, match="shard numbers of 2 rows, expected 3"):
        Sampler(3, 1, shard_order=ShardOrder(np.array([0, 0])))
    with pytest.raises(ConfigError, match="a window of 0 shards"):
        ShardOrder(np.array([0]), window=0)
