"""Shuffles rows with few shards open at a time, for data in which random access is expensive.

In a globally shuffled order, consecutive rows are in different shards; read from a server, every photo would
cost a request, or a whole shard. Here the rows of an epoch, whichever they are, are ordered so that few
shards are open at a time and each process has shards of its own:

1. The shards are put in a random order, new in each epoch, and their rows are concatenated.
2. The result is cut into L lanes, each with as many rows as it contributes to the epoch's optimizer steps.
3. In a lane, rows are sorted by ``j + window * u_i`` for row i of the lane's j-th shard, with ``u_i`` drawn
   from [0, 1): rows are mixed within a window of shards that slides by one shard at a time.
4. Each step takes equal parts from all lanes, lane after lane. Since a process gets a contiguous part of a
   step, process r of L reads only lane r.

Bounds, with S shards that have rows in the epoch: a lane has at most ``window`` shards open at a time (from
its first row of a shard to its last one), and the lanes' numbers of shards sum to at most S + L - 1, because
each of the L - 1 cuts can split one shard. Rows are never split: each is in one lane. Every lane has rows
until the last step, so no process ends an epoch before another one does.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from roadwork_dist.common.errors import ConfigError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ShardOrder:
    """Which shard each row is in, and how far rows are mixed.

    Args:
        shards: ``[N]`` number of the shard of each row, from 0.
        window: shards of a lane that are open at a time; 1 = rows are shuffled only within their shard.

    Raises:
        ConfigError: the window is smaller than 1.
    """

    shards: Indices
    window: int = 4

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ConfigError(f"a window of {self.window} shards, expected at least 1")


def part(length: int, parts: int, number: int) -> slice:
    """Part ``number`` of ``length`` items in ``parts`` whose sizes differ by at most one, larger first."""
    size, extra = divmod(length, parts)
    start = number * size + min(number, extra)
    return slice(start, start + size + (number < extra))


def keep_to_shards(
    rows: Indices, order: ShardOrder, *, lanes: int, rows_per_step: int, generator: np.random.Generator
) -> Indices:
    """Rearrange the rows of an epoch so that each lane reads shards of its own.

    Args:
        rows: ``[M]`` rows of the epoch in random order; a row may occur more than once, or not at all.
        order: the shards and the window.
        lanes: L, processes that read.
        rows_per_step: rows of a full optimizer step.
        generator: of the epoch.

    Returns:
        ``[M]`` the same rows, step after step; within a step, lane after lane.
    """
    place = generator.permutation(int(order.shards.max()) + 1)
    line = rows[np.argsort(place[order.shards[rows]], kind="stable")]
    steps, rest = divmod(len(rows), rows_per_step)
    a_step, at_the_end = _part_sizes(rows_per_step, lanes), _part_sizes(rest, lanes)
    cuts = np.cumsum(steps * a_step + at_the_end)[:-1]
    mixed = [_slide(lane, order, generator) for lane in np.split(line, cuts)]
    full = [lane[: steps * size].reshape(steps, size) for lane, size in zip(mixed, a_step, strict=True)]
    short = [lane[steps * size :] for lane, size in zip(mixed, a_step, strict=True)]
    return np.concatenate([np.concatenate(full, axis=1).ravel(), *short])


def _slide(lane: Indices, order: ShardOrder, generator: np.random.Generator) -> Indices:
    """Mix rows that are grouped by shard, within a window that slides over the shards."""
    own = order.shards[lane]
    position = np.cumsum(np.diff(own, prepend=own[:1]) != 0)
    return lane[np.argsort(position + order.window * generator.random(len(lane)), kind="stable")]


def _part_sizes(length: int, parts: int) -> Indices:
    slices = (part(length, parts, number) for number in range(parts))
    return np.array([each.stop - each.start for each in slices], dtype=np.int64)
