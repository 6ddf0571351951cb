"""What the order of rows depends on, and how a run keeps it on another number of processes."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from roadwork_dist.common.errors import CheckpointError
from roadwork_dist.trainer.feed.sampler import Sampler

logger = logging.getLogger(__name__)

PER_STEP = "rows per optimizer step (batch_size x accumulation x processes)"
LANES = "lanes that the shards are dealt to (processes when the run was started)"
_PARTS = ("batch_size", "accumulation", PER_STEP)


ROWS = "digest of the training data"


def row_plan(sampler: Sampler, ids: str, rows: str) -> dict[str, int | str]:
    """Everything that says which rows are trained on in which step; JSON-able.

    Args:
        sampler: deals them.
        ids: digest of the rows' ids.
        rows: digest of which rows there are.
    """
    weights = sampler.weights
    plan: dict[str, int | str] = {
        "digest of the sampling weights": "none" if weights is None else _digest(weights, np.float64),
        "rows of the training data": sampler.length,
        "digest of the rows' ids": ids,
        ROWS: rows,
        "seed": sampler.seed,
        "batch_size": sampler.batch_size,
        "accumulation": sampler.accumulation,
        PER_STEP: sampler.rows_per_step,
    }
    if sampler.shard_order is not None:
        plan["digest of the rows' shards"] = _digest(sampler.shard_order.shards, np.int64)
        plan["shards that are mixed"] = sampler.shard_order.window
        plan[LANES] = sampler.lanes or sampler.world_size
    return plan


def keep_row_plan(
    sampler: Sampler, ids: str, rows: str, was: Mapping[str, int | str], run_dir: Path
) -> Sampler:
    """A sampler that goes on with the steps of a run.

    Another number of processes shares the rows of each step that the run was started with; so may other
    settings of ``batch_size`` and ``accumulation`` that come to the same number of rows.

    Args:
        sampler: of the settings and processes as they are now.
        ids: digest of the rows' ids as they are now.
        rows: digest of which rows there are now.
        was: :func:`row_plan` of the checkpoint.
        run_dir: for the message.

    Raises:
        CheckpointError: the order of rows was another one, so its place in the epoch means nothing.
    """
    if sampler.shard_order is not None and LANES in was:
        sampler = replace(sampler, lanes=int(was[LANES]))
    now = row_plan(sampler, ids, rows)
    if ROWS not in was:  # a checkpoint of version 0.1
        del now[ROWS]
    changed = [name for name in {**now, **was} if was.get(name) != now.get(name)]
    if now[PER_STEP] == was[PER_STEP] or not {"batch_size", "accumulation"} & set(changed):
        changed = [name for name in changed if name not in _PARTS]
    if changed:
        told = "; ".join(
            f"{name} was {was.get(name, 'none')}, is {now.get(name, 'none')}" for name in changed
        )
        raise CheckpointError(
            f"cannot go on from the checkpoint in {run_dir}: {told}; set it back, or train into another "
            "output_dir"
        )
    if now[PER_STEP] == was[PER_STEP]:
        return sampler
    logger.info(
        "this run's steps keep the %s rows that it was started with, shared by the %d processes it has now",
        was[PER_STEP],
        sampler.world_size,
    )
    return replace(sampler, effective_batch=int(was[PER_STEP]))


def _digest(values: ArrayLike, dtype: type[np.generic]) -> str:
    return hashlib.sha256(np.asarray(values, dtype=dtype).tobytes()).hexdigest()[:12]
