"""One pass over a data set without learning."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from roadwork_dist.trainer.engine.collectives import gather_rows, sum_over_ranks
from roadwork_dist.trainer.task import Task


@dataclass(frozen=True)
class PassResult:
    """What a pass over a data set gave, over all ranks.

    Attributes:
        metrics: ``loss``, ``loss/<part>`` and the task's figures.
        rows: the task's per-row tensors, on the CPU; rank 0's rows first.
    """

    metrics: dict[str, float]
    rows: dict[str, Tensor]


class PassInterrupted(Exception):
    """A pass was given up, on all ranks behind the same round of batches."""


def interruptible(batches: Iterable[Any], rounds: int, asked: Callable[[], bool]) -> Iterator[Any]:
    """Batches, with a question between them whether to give up.

    Args:
        batches: this rank's.
        rounds: batches of the rank that has most of them. A rank with fewer takes part in what is left of the
            rounds, since the others wait for its answer.
        asked: whether to give up; a collective, with one answer for all ranks.

    Raises:
        PassInterrupted: ``asked`` said so.
    """
    questions = rounds - 1
    for batch in batches:
        yield batch
        if questions > 0 and asked():
            raise PassInterrupted
        questions -= 1
    if any(asked() for _ in range(questions)):
        raise PassInterrupted


@torch.no_grad()
def run_pass(
    forward: Callable[..., Any],
    task: Task,
    batches: Iterable[Any],
    device: torch.device,
    *,
    counted: int | None = None,
) -> PassResult:
    """Loss and figures over the rows of all ranks' batches.

    Collectives: two at the end, which every rank reaches, also one without batches.

    Args:
        forward: of a model in eval mode.
        task: loss and figures.
        batches: this rank's batches, on the CPU; no row twice, also not on two ranks.
        device: where the model is.
        counted: batches that count; those behind them are run only because other ranks wait for this
            one in every forward pass. None = all.
    """
    sums = dict.fromkeys(task.weights, 0.0)
    counts = dict.fromkeys(task.weights, 0)
    rows: dict[str, list[Tensor]] = defaultdict(list)
    for number, batch in enumerate(batches):
        on_device = send_to_device(batch, device, non_blocking=True)
        output = task(forward, on_device)
        if counted is not None and number >= counted:
            continue
        for part, count in task.count(batch).items():
            counts[part] += count
        for part in sums:
            sums[part] += float(output.sums[part])
        for name, tensor in output.rows.items():
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
