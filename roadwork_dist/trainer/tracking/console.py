"""Progress on the console: a live bar in a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.distributed.fsdp import FSDPModule

from roadwork_dist.trainer.events.callback import Callback, Run
from roadwork_dist.trainer.events.state import StepResult

_LINE_EVERY_S = 10.0


class Console(Callback):
    """Shows training progress (rank 0)."""

    def __init__(self) -> None:
        self._console = RichConsole(highlight=False, markup=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._last_line = 0.0
        self._last_health = 0.0

    def on_train_start(self, run: Run) -> None:
        """Start the bar."""
        if not run.accelerator.is_main_process:
            return
        accelerator = run.accelerator
        self._console.print(
            f"training {_class_name(run.model)}: {run.config.epochs} epochs x {run.steps_per_epoch} steps "
            f"on {accelerator.num_processes} x {accelerator.device.type} → {run.run_dir}"
        )
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]} · wait {task.fields[wait]} · left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[health]}"),
                console=self._console,
                refresh_per_second=4,
            )
            self._progress.add_task("", total=run.total_steps, epoch=0, loss="-", wait="-", health="")
            self._progress.start()

    def on_step_end(self, run: Run, result: StepResult) -> None:
        """Update the bar, or print a line every ten seconds."""
        if not run.accelerator.is_main_process:
            return
        if self._progress is not None:
            self._progress.update(
                self._progress.task_ids[0],
                completed=run.state.step,
                total=run.total_steps,  # may change when a checkpoint is loaded
                epoch=run.state.epoch + 1,
                loss=f"{result.loss:.4f}",
                wait=f"{result.data_wait:.0%}",
            )
        elif time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._console.print(
                f"epoch {run.state.epoch + 1} step {run.state.step}/{run.total_steps} loss {result.loss:.4f} "
                f"lr {result.lr:.2e} {result.rows / result.seconds:.0f} samples/s wait {result.data_wait:.0%}"
            )

    def on_figures(self, run: Run, kind: str, figures: dict[str, Any]) -> None:
        """Show ``health`` figures in the bar, or as a line at most every ten seconds."""
        if not run.accelerator.is_main_process or kind != "health":
            return
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], health=health_text(figures))
        elif time.monotonic() - self._last_health > _LINE_EVERY_S:
            self._last_health = time.monotonic()
            self._console.print(
                f"epoch {run.state.epoch + 1} step {run.state.step}/{run.total_steps} "
                f"wait {figures['data_wait']:.0%} {health_text(figures)}"
            )

    def on_validation_end(self, run: Run, metrics: dict[str, float], improved: bool) -> None:
        """Print the figures, with a star for the best so far."""
        if run.accelerator.is_main_process:
            figures = "  ".join(f"{n} {v:.4f}" for n, v in metrics.items() if not n.startswith("loss/"))
            self._console.print(f"epoch {run.state.epoch + 1:3d}  val  {figures}{'  *' if improved else ''}")

    def on_fit_end(self, run: Run) -> None:
        """Stop the bar and say why training ended."""
        self._stop()
        if run.accelerator.is_main_process and run.state.should_stop:
            self._console.print(
                f"stopped early: no better {run.config.monitor} in {run.state.stale_validations} validations"
            )

    def on_exception(self, run: Run, error: BaseException) -> None:
        """Release the terminal before the error is printed."""
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _class_name(model: nn.Module) -> str:
    """Name of the user's class; ``fully_shard`` replaces it by a subclass of its own."""
    cls = type(model)
    return (cls.__bases__[1] if cls.__bases__[0] is FSDPModule else cls).__name__


def health_text(figures: Mapping[str, Any]) -> str:
    """Figures of kind ``health`` in one readable line."""
    parts = [
        f"{figures['samples_per_s']:.0f} samples/s ({figures['samples_per_s_per_rank']:.0f} a rank)",
        f"step {figures['step_s_p50'] * 1000:.0f} ms, p95 {figures['step_s_p95'] * 1000:.0f}",
        f"memory {figures['memory_peak_mb'] / 1024:.1f} GiB",
    ]
    if "backbone_mfu" in figures:
        parts.append(f"backbone MFU {figures['backbone_mfu']:.0%}")
    # Ranks never take exactly the same time; below this it is noise.
    if figures.get("slowest_share", 0.0) >= 0.1:
        parts.append(
            f"others wait {figures['slowest_share']:.0%} for rank {figures['slowest_rank']} on "
            f"{figures['slowest_host']} ({figures['slowest_cause']})"
        )
    return " · ".join(parts)
