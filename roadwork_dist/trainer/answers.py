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
from roadwork_dist.trainer.start_checks import check_figures
from roadwork_dist.trainer.task import Task

ANSWERS = ("logits", "predictions")
"""Names of the per-row tensors that figures are computed from, and that have to be finite."""

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
        metrics: ``loss``, ``loss/<part>`` and the task's figures; the figures are NaN where an answer is not
            finite, since the most likely class of NaN would be the first.
        rows: the task's per-row tensors, on the CPU; in the order of the data set.
        not_finite: numbers of the rows whose answers hold NaN or infinity.
    """

    metrics: dict[str, float]
    rows: dict[str, Tensor]
    not_finite: list[int]


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
    not_finite = _not_finite(all_rows)
    # Tasks compute with numpy or torch, whose scalars are not JSON.
    figures = {name: float(value) for name, value in task.metrics(all_rows).items()}
    check_figures(figures)
    metrics |= dict.fromkeys(figures, math.nan) if not_finite else figures
    return PassResult(metrics, all_rows, not_finite)


def _not_finite(rows: dict[str, Tensor]) -> list[int]:
    """Rows of which an answer is not finite; other tensors of a task may hold NaN on purpose."""
    answers = [rows[name] for name in ANSWERS if name in rows and rows[name].is_floating_point()]
    bad = [~tensor.reshape(len(tensor), -1).isfinite().all(dim=1) for tensor in answers if len(tensor)]
    return [int(row) for row in torch.stack(bad).any(dim=0).nonzero().flatten()] if bad else []
