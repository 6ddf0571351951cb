"""One optimizer step: the only file that knows how losses, ranks and gradients come together."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.undisturbed import hold_buffers, moving_parts
from roadwork_dist.common.work_clock import WorkClock
from roadwork_dist.trainer.engine.base import Engine
from roadwork_dist.trainer.engine.collectives import gather_objects, sum_over_ranks
from roadwork_dist.trainer.events.state import StepResult
from roadwork_dist.trainer.task import Task


@dataclass(frozen=True)
class LoadedBatch:
    """A micro-batch on the CPU, with what the sampler knew of it."""

    batch: Any
    indices: list[int]
    is_filler: bool


class OptimizerStep:
    """Accumulates, reduces, clips and steps; a step that is not finite is skipped by all ranks.

    Args:
        engine: the model on its processes.
        task: model + loss.
    """

    def __init__(self, engine: Engine, task: Task) -> None:
        self.engine, self.task, self.device = engine, task, engine.device
        self._clock = WorkClock(engine.model.parameters(), self.device)
        self._parts: list[nn.Module] | None = None

    def __call__(
        self,
        micro_batches: Sequence[LoadedBatch],
        lr: float,
        interrupt: Callable[[], bool] = lambda: False,
        is_vetoed: Callable[[float], bool] = lambda loss: False,
    ) -> StepResult:
        """Train on all rows of one optimizer step (this rank's micro-batches of it).

        Collectives: the counts before the first forward pass, the losses before the last backward pass,
        the gradients in it. Every rank has at least one micro-batch, a filler if need be, so every rank
        reaches all three.

        Args:
            micro_batches: this rank's, in order.
            lr: learning rate of the step.
            interrupt: was this rank asked to stop? The answers of all ranks travel with the losses.
            is_vetoed: whether a finite loss is refused; the same on all ranks.
        """
        if self._parts is None:  # the model is in train mode only now
            self._parts = moving_parts(self.engine.model)
        put_buffers_back = hold_buffers(self._parts)
        counts = self._count(micro_batches)
        rows = int(counts.pop("rows"))
        weights = self.task.weights
        scales = {part: weights[part] / counts[part] if counts[part] else 0.0 for part in weights}
        started = time.perf_counter()  # all ranks leave the collective of the counts together
        last_roots, sums = self._all_but_last_backward(micro_batches, scales)
        local, bad_indices = self._local_sums(micro_batches, sums, len(scales))
        work_s = time.perf_counter() - started
        learns = any(root.requires_grad for root in last_roots.values())
        told = sum_over_ranks([*local, float(interrupt()), float(not learns)], self.device)
        *totals, asked, graphless = told
        if graphless:  # on all ranks
            raise ConfigError(
                f"no part of the loss ({', '.join(weights)}) depends on a trained weight, so nothing would "
                "be learnt: look for detach(), torch.no_grad() or argmax() in the model or the task"
            )
        parts = {
            part: total / counts[part] for part, total in zip(weights, totals, strict=True) if counts[part]
        }
        loss = sum(weights[part] * value for part, value in parts.items())
        # Decided by sums over ranks, so alike on all of them. Gradients of a refused step are made NaN,
        # which no engine steps on: DeepSpeed has no other way to drop gradients that it has reduced.
        vetoed = math.isfinite(loss) and is_vetoed(loss)
        trust = 1.0 if math.isfinite(loss) and not vetoed else math.nan
        self._clock.start()
        self._backward(micro_batches[-1], last_roots, scales, trust, is_last=True)
        grad_norm = self.engine.step(lr)
        skipped = not math.isfinite(grad_norm)
        bad_rows: list[int] = []
        if skipped:
            # The forward passes have moved batch statistics; one NaN would stay in them for good.
            put_buffers_back()
            # Reached by all ranks or by none: the norm is the same on all of them.
            bad_rows = [index for share in gather_objects(bad_indices) for index in share]
        return StepResult(
            loss,
            parts,
            grad_norm,
            lr,
            rows,
            work_s=work_s + self._clock.seconds(),
            skipped=skipped,
            bad_rows=bad_rows,
            interrupted=asked > 0,
            vetoed=vetoed,
        )

    def _count(self, micro_batches: Sequence[LoadedBatch]) -> dict[str, float]:
        """Rows with a target per part, and rows, over all micro-batches and ranks."""
        names = (*self.task.weights, "rows")
        local = dict.fromkeys(names, 0.0)
        for micro in micro_batches:
            if not micro.is_filler:
                local["rows"] += len(micro.indices)
                for part, count in self.task.count(micro.batch).items():
                    local[part] += count
        totals = sum_over_ranks([local[name] for name in names], self.device)
        return dict(zip(names, totals, strict=True))

    def _all_but_last_backward(
        self, micro_batches: Sequence[LoadedBatch], scales: Mapping[str, float]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Every pass but the last backward one, which reduces the gradients.

        Returns:
            The last micro-batch's loss sums on the graph, and every micro-batch's loss sums in a row.
        """
        sums: list[Tensor] = []
        roots: dict[str, Tensor] = {}
        for number, micro in enumerate(micro_batches):
            is_last = number == len(micro_batches) - 1
            with nullcontext() if is_last else self.engine.accumulate():
                roots = self._forward(micro)
                sums += [roots[part].detach() for part in scales]
                if not is_last:
                    self._backward(micro, roots, scales, 1.0, is_last=False)
        return roots, sums

    def _forward(self, micro: LoadedBatch) -> dict[str, Tensor]:
        """A micro-batch's loss sums by part."""
        batch = micro.batch
        if self.device.type != "cpu":
            batch = send_to_device(batch, self.device, non_blocking=True)
        return self.task(self.engine.forward, batch).sums

    def _backward(
        self,
        micro: LoadedBatch,
        sums: Mapping[str, Tensor],
        scales: Mapping[str, float],
        trust: float,
        *,
        is_last: bool,
    ) -> None:
        # Engines average gradients over ranks; the scales already hold the counts of all ranks.
        factor = (0.0 if micro.is_filler else float(self.engine.processes)) * trust
        learned = [part for part in scales if sums[part].requires_grad]
        if not learned:
            return
        factors = torch.tensor([scales[part] * factor for part in learned], dtype=torch.float32)
        self.engine.backward(
            [sums[part] for part in learned], factors.to(self.device, non_blocking=True), is_last=is_last
        )

    def _local_sums(
        self, micro_batches: Sequence[LoadedBatch], sums: Sequence[Tensor], parts: int
    ) -> tuple[list[float], list[int]]:
        """This rank's loss sums by part, and rows of micro-batches whose loss is not finite."""
        values = iter(torch.stack(list(sums)).tolist())  # one look at the device for the whole step
        totals, bad_indices = [0.0] * parts, []
        for micro in micro_batches:
            row = [next(values) for _ in range(parts)]
            if not micro.is_filler:
                totals = [total + value for total, value in zip(totals, row, strict=True)]
                bad_indices += [] if all(map(math.isfinite, row)) else micro.indices
        return totals, bad_indices
