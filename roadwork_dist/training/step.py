"""One optimizer step: the only file that knows how losses, ranks and gradients come together."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from roadwork_dist.engine.collectives import gather_objects, sum_over_ranks
from roadwork_dist.events.state import StepResult
from roadwork_dist.training.task import Task


@dataclass(frozen=True)
class LoadedBatch:
    """A micro-batch on the CPU, with what the sampler knew of it."""

    batch: Any
    indices: list[int]
    is_filler: bool


def moving_buffers(model: nn.Module) -> list[Tensor]:
    """Buffers that forward passes in training may move (batch statistics): of modules in train mode."""
    return [buffer for part in model.modules() if part.training for buffer in part.buffers(recurse=False)]


class OptimizerStep:
    """Accumulates, reduces, clips and steps; a step that is not finite is skipped by all ranks.

    Args:
        accelerator: processes and precision.
        model: as prepared by the engine.
        optimizer: over the model's trainable parameters.
        task: model + loss.
        clip: largest global gradient norm; 0 = no clipping.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, task: Task, clip: float
    ) -> None:
        self.accelerator, self.model, self.optimizer, self.task = accelerator, model, optimizer, task
        self.device = accelerator.device
        self.max_norm = clip or math.inf
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._buffers: list[Tensor] | None = None

    def __call__(
        self, micro_batches: Sequence[LoadedBatch], lr: float, interrupt: Callable[[], bool] = lambda: False
    ) -> StepResult:
        """Train on all rows of one optimizer step (this rank's micro-batches of it).

        Args:
            micro_batches: this rank's, in order.
            lr: learning rate of the step.
            interrupt: was this rank asked to stop? Asked once, behind the backward pass; the answers
                of all ranks travel with the losses.

        Collectives: the counts before the first forward pass, the gradients in the last backward
        pass (DDP), the losses behind it. Every rank has at least one micro-batch, a filler if need
        be, so every rank reaches all three.
        """
        if self._buffers is None:  # the model is in train mode only now
            self._buffers = moving_buffers(self.model)
        held = [buffer.clone() for buffer in self._buffers]
        counts = self._count(micro_batches)
        rows = int(counts.pop("rows"))
        weights = self.task.weights
        scales = {part: weights[part] / counts[part] if counts[part] else 0.0 for part in weights}
        sums, bad_indices = self._backward(micro_batches, scales)
        *totals, asked = sum_over_ranks([*sums, float(interrupt())], self.device)
        parts = {
            part: total / counts[part] for part, total in zip(weights, totals, strict=True) if counts[part]
        }
        loss = sum(weights[part] * value for part, value in parts.items())
        grad_norm = self._clip()
        # Both figures are the same on all ranks (sums over ranks, gradients after DDP's reduction),
        # so all ranks take the same branch without a vote of its own.
        skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
        bad_rows: list[int] = []
        if skipped:
            # The forward passes have moved batch statistics; one NaN would stay in them for good.
            for buffer, before in zip(self._buffers, held, strict=True):
                buffer.copy_(before)
            # Reached by all ranks or by none: see above.
            bad_rows = [index for share in gather_objects(bad_indices) for index in share]
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(
            loss, parts, grad_norm, lr, rows, skipped=skipped, bad_rows=bad_rows, interrupted=asked > 0
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

    def _backward(
        self, micro_batches: Sequence[LoadedBatch], scales: Mapping[str, float]
    ) -> tuple[list[float], list[int]]:
        """Gradients of all micro-batches; this rank's loss sums, and rows of non-finite losses."""
        sums: list[Tensor] = []
        for number, micro in enumerate(micro_batches):
            is_last = number == len(micro_batches) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                sums += self._forward_backward(micro, scales)
        # One look at the device for the whole step.
        values = iter(torch.stack(sums).tolist())
        totals, bad_indices = [0.0] * len(scales), []
        for micro in micro_batches:
            row = [next(values) for _ in scales]
            if not micro.is_filler:
                totals = [total + value for total, value in zip(totals, row, strict=True)]
                bad_indices += [] if all(map(math.isfinite, row)) else micro.indices
        return totals, bad_indices

    def _forward_backward(self, micro: LoadedBatch, scales: Mapping[str, float]) -> list[Tensor]:
        """Add a micro-batch's gradients; returns its loss sums in the order of ``scales``."""
        batch = micro.batch
        if self.device.type != "cpu":
            batch = send_to_device(batch, self.device, non_blocking=True)
        sums = self.task(self.model, batch).sums
        # DDP averages gradients over ranks; the scales already hold the counts of all ranks.
        factor = 0.0 if micro.is_filler else float(self.accelerator.num_processes)
        learned = [part for part in scales if sums[part].requires_grad]
        roots = [sums[part] for part in learned]
        factors = torch.tensor([scales[part] * factor for part in learned], dtype=torch.float32)
        # The weighted sum of the parts is never built: its gradient to each part is the part's factor.
        torch.autograd.backward(roots, list(factors.to(self.device, non_blocking=True).unbind()))
        return [sums[part].detach() for part in scales]

    def _clip(self) -> float:
        """Global norm of the gradients, which are scaled down to the largest norm if it is above."""
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        value = float(norm)
        if value + 1e-6 > self.max_norm:  # torch's own threshold; a factor of 1 would change nothing
            clip_grads_with_norm_(self.parameters, self.max_norm, norm)
        return value
