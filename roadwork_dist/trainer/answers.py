"""Rows answered by a forward pass, without learning: for validation, evaluation and prediction alike."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from roadwork_dist.trainer.engine.collectives import gather_rows, sum_over_ranks
from roadwork_dist.trainer.feed.dataset import MapDataset
from roadwork_dist.trainer.feed.loader import load_batches
from roadwork_dist.trainer.feed.sampler import evaluation_batches
from roadwork_dist.trainer.task import Task

Load = Callable[[MapDataset, Iterable[list[int]]], Iterable[Any]]
"""(data set, row numbers of each batch) -> batches; ``load_batches`` with its options set, for example."""


@dataclass(frozen=True)
class Answer:
    """What a forward pass gave for one batch.

    Attributes:
        batch: as it was loaded, on the CPU.
        output: what the forward pass returned, on the device.
    """

    batch: Any
    output: Any


class PassInterrupted(Exception):
    """A pass was given up, on all ranks after the same round of batches."""


@torch.no_grad()
def answer_rows(
    forward: Callable[[Any], Any],
    data: MapDataset,
    *,
    batch_size: int,
    device: torch.device,
    load: Load = load_batches,
    rank: int = 0,
    ranks: int = 1,
    lockstep: bool = False,
    asked: Callable[[], bool] | None = None,
) -> Iterator[Answer]:
    """Answer every row of a data set once, in order, batch by batch; each of several ranks answers a part.

    Args:
        forward: gets a batch that is on the device; of a model in eval mode.
        data: map-style data set.
        batch_size: rows at a time.
        device: where the forward pass runs.
        load: reads batches.
        rank: this process; it answers a contiguous part of the rows.
        ranks: processes that share the rows.
        lockstep: a forward pass talks to the other ranks, so all of them make equally many. A rank with fewer
            batches runs fillers, which are not in the answers.
        asked: whether to give up; a collective with one answer for all ranks, asked between batches.

    Raises:
        PassInterrupted: ``asked`` said so.
    """
    shares = [evaluation_batches(len(data), batch_size, each, ranks) for each in range(ranks)]
    own, rounds = shares[rank], max(map(len, shares))
    loaded = load(data, own + [[0]] * (rounds - len(own)) if lockstep else own)
    if asked is not None:
        loaded = _interruptible(loaded, rounds, asked)
    for number, batch in enumerate(loaded):
        output = forward(send_to_device(batch, device, non_blocking=True))
        if number < len(own):
            yield Answer(batch, output)


def _interruptible(batches: Iterable[Any], rounds: int, asked: Callable[[], bool]) -> Iterator[Any]:
    """Batches, with the question between them whether to give up.

    Args:
        batches: this rank's.
        rounds: batches of the rank that has most of them. A rank with fewer takes part in what is left of the
            rounds, since the others wait for its answer.
        asked: whether to give up; a collective, with one answer for all ranks.
    """
    questions = rounds - 1
    for batch in batches:
        yield batch
        if questions > 0 and asked():
            raise PassInterrupted
        questions -= 1
    if any(asked() for _ in range(questions)):
        raise PassInterrupted


@dataclass(frozen=True)
class PassResult:
    """What a pass over a data set gave, over all ranks.

    Attributes:
        metrics: ``loss``, ``loss/<part>`` and the task's figures.
        rows: the task's per-row tensors, on the CPU; rank 0's rows first.
    """

    metrics: dict[str, float]
    rows: dict[str, Tensor]


def summarize(task: Task, answers: Iterable[Answer], device: torch.device) -> PassResult:
    """Loss and figures over the rows of all ranks' answers.

    Collectives: two at the end, which every rank reaches, also one without answers.

    Args:
        task: loss and figures.
        answers: this rank's, whose outputs are the task's; no row twice, also not on two ranks.
        device: where sums are exchanged.
    """
    sums = dict.fromkeys(task.weights, 0.0)
    counts = dict.fromkeys(task.weights, 0)
    rows: dict[str, list[Tensor]] = defaultdict(list)
    for answer in answers:
        for part, count in task.count(answer.batch).items():
            counts[part] += count
        for part in sums:
            sums[part] += float(answer.output.sums[part])
        for name, tensor in answer.output.rows.items():
            rows[name].append(tensor.cpu())
    local = {name: torch.cat(tensors) for name, tensors in rows.items()}
    totals = sum_over_ranks([*sums.values(), *counts.values()], device)
    means = {
        part: total / count
        for part, total, count in zip(sums, totals[: len(sums)], totals[len(sums) :], strict=True)
        if count
    }
    all_rows = gather_rows(local)
    # Without any target there is no loss; a sum of nothing would be the best one ever.
    loss = sum(task.weights[part] * mean for part, mean in means.items()) if means else math.nan
    metrics = {"loss": loss}
    metrics |= {f"loss/{part}": mean for part, mean in means.items()}
    # Tasks compute with numpy or torch, whose scalars are not JSON.
    metrics |= {name: float(value) for name, value in task.metrics(all_rows).items()}
    return PassResult(metrics, all_rows)
