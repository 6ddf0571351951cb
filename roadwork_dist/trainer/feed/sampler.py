"""Assigns rows to optimizer steps as a pure function of (seed, epoch), and divides them among ranks.

The unit is the optimizer step. Its rows (micro-batch x accumulation x ranks, fewer in the last step of an
epoch) are fixed before they are divided. So a step trains on the same rows for any number of processes, and
training can start at any step without reading earlier ones. A run that resumes with another number of
processes keeps the rows of its steps: they are divided as evenly as possible, in micro-batches that are no
larger than before.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.random import generator_for
from roadwork_dist.trainer.feed.order import Indices, ShardOrder, keep_to_shards, part


@dataclass(frozen=True)
class MicroBatch:
    """Rows that one rank sends through the model at once.

    Attributes:
        indices: rows of the data set.
        is_filler: the rows belong to another rank and do not count here. A rank without rows of its own in
            a short last step still reads one, because every rank has to reach the step's collectives.
    """

    indices: list[int]
    is_filler: bool = False


@dataclass(frozen=True)
class Sampler:
    """Assigns the rows of a data set to optimizer steps, ranks and micro-batches.

    Args:
        length: rows of the data set.
        batch_size: rows per rank and micro-batch.
        accumulation: micro-batches per optimizer step.
        rank: this process.
        world_size: processes.
        seed: order of the rows.
        weights: relative probability of each row, for sampling with replacement (an epoch has ``length``
            draws); None = every row once, shuffled.
        effective_batch: rows of a full optimizer step over all ranks; None = ``batch_size`` x
            ``accumulation`` x ``world_size``.
        shard_order: the rows' shards, to limit each rank to few shards at a time; None = rows are
            shuffled over the whole data set.
        lanes: number of ranks that shared the shards when the run was started; None = ``world_size``.

    Raises:
        ConfigError: the data set is empty, or the weights or the shards do not fit it.
    """

    length: int
    batch_size: int
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    weights: Sequence[float] | None = None
    effective_batch: int | None = None
    shard_order: ShardOrder | None = None
    lanes: int | None = None

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigError("the training data set has 0 rows, expected at least 1")
        if self.shard_order is not None and len(self.shard_order.shards) != self.length:
            raise ConfigError(f"shard numbers of {len(self.shard_order.shards)} rows, expected {self.length}")
        if self.weights is not None:
            self._check_weights(np.asarray(self.weights, dtype=np.float64))

    def _check_weights(self, weights: npt.NDArray[np.float64]) -> None:
        if len(weights) != self.length:
            raise ConfigError(f"{len(weights)} sampling weights for {self.length} rows")
        wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
        if len(wrong):
            raise ConfigError(
                f"sampling weight of row {wrong[0]} is {weights[wrong[0]]}, expected a number >= 0"
            )
        if not weights.any():
            raise ConfigError("all sampling weights are 0, expected at least one above 0")

    @property
    def rows_per_step(self) -> int:
        """Rows of a full optimizer step over all ranks (the effective batch)."""
        return self.effective_batch or self.batch_size * self.accumulation * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last one may be short."""
        return -(-self.length // self.rows_per_step)

    def order(self, epoch: int) -> Indices:
        """All rows of an epoch in the order of training, the same on every rank."""
        generator = generator_for(self.seed, "order", epoch)
        if self.weights is None:
            rows = generator.permutation(self.length)
        else:
            chances = np.asarray(self.weights, dtype=np.float64)
            rows = generator.choice(self.length, size=self.length, p=chances / chances.sum())
        if self.shard_order is None:
            return rows
        return keep_to_shards(
            rows,
            self.shard_order,
            lanes=self.lanes or self.world_size,
            rows_per_step=self.rows_per_step,
            generator=generator,
        )

    def steps(self, epoch: int, start: int = 0) -> Iterator[list[MicroBatch]]:
        """This rank's micro-batches of each optimizer step of an epoch, from step ``start`` on."""
        order = self.order(epoch)
        for step in range(start, self.steps_per_epoch):
            yield self._micro_batches(order[step * self.rows_per_step : (step + 1) * self.rows_per_step])

    def _micro_batches(self, rows: Indices) -> list[MicroBatch]:
        largest_share = -(-len(rows) // self.world_size)
        # Every rank runs the same number of micro-batches, so all reduce gradients after the last one only.
        chunks = -(-largest_share // self.batch_size)
        share = rows[part(len(rows), self.world_size, self.rank)].tolist()
        micros = (share[part(len(share), chunks, number)] for number in range(chunks))
        filler = MicroBatch(rows[:1].tolist(), is_filler=True)
        return [MicroBatch(micro) if micro else filler for micro in micros]


def evaluation_batches(length: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """This rank's batches of a pass in which every row is read exactly once by exactly one rank."""
    share = range(length)[part(length, world_size, rank)]
    return [list(share[start : start + batch_size]) for start in range(0, len(share), batch_size)]
