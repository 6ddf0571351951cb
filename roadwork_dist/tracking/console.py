"""Progress: a live bar on a terminal, plain lines elsewhere."""

import time

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from roadwork_dist.events.callback import Callback, Run
from roadwork_dist.events.state import StepResult

_LINE_EVERY_S = 10.0


class Console(Callback):
    """Tells a person how training goes (rank 0)."""

    def __init__(self) -> None:
        self._console = RichConsole(highlight=False, markup=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._last_line = 0.0

    def on_fit_start(self, run: Run) -> None:
        """Start the bar."""
        if not run.accelerator.is_main_process:
            return
        accelerator = run.accelerator
        self._console.print(
            f"training {type(run.model).__name__}: {run.config.epochs} epochs x {run.steps_per_epoch} steps "
            f"on {accelerator.num_processes} x {accelerator.device.type} → {run.run_dir}"
        )
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]} · wait {task.fields[wait]} · left"),
                TimeRemainingColumn(),
                console=self._console,
                refresh_per_second=4,
            )
            self._progress.add_task("", total=run.total_steps, epoch=0, loss="-", wait="-")
            self._progress.start()

    def on_step_end(self, run: Run, result: StepResult) -> None:
        """Move the bar, or print a line every ten seconds."""
        if not run.accelerator.is_main_process:
            return
        if self._progress is not None:
            self._progress.update(
                self._progress.task_ids[0],
                completed=run.state.step,
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
        """Give the terminal back before the error is printed."""
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
