"""Logging to TensorBoard event files."""

from typing import TYPE_CHECKING, Any

from roadwork_dist.trainer.events.callback import Callback, Run
from roadwork_dist.trainer.events.state import StepResult
from roadwork_dist.trainer.tracking.figures import numbers, step_figures

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard(Callback):
    """Writes events to ``tensorboard/`` in the run folder (rank 0)."""

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None
        self._purge: int | None = None

    def on_train_start(self, run: Run) -> None:
        """Purge later steps: a resumed run repeats them, so the viewer drops the earlier ones."""
        self._purge = run.state.step + 1

    def on_step_end(self, run: Run, result: StepResult) -> None:
        """Write scalars ``train/…``."""
        self._add(run, "train", step_figures(run, result))

    def on_validation_end(self, run: Run, metrics: dict[str, float], improved: bool) -> None:
        """Write scalars ``val/…``."""
        self._add(run, "val", metrics)

    def on_figures(self, run: Run, kind: str, figures: dict[str, Any]) -> None:
        """Write the numeric figures as scalars ``<kind>/…``."""
        self._add(run, kind, numbers(figures))

    def on_fit_end(self, run: Run) -> None:
        """Close the file."""
        self._close()

    def on_exception(self, run: Run, error: BaseException) -> None:
        """Close the file."""
        self._close()

    def _add(self, run: Run, kind: str, figures: dict[str, float]) -> None:
        if not run.accelerator.is_main_process:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            purge = run.state.step + 1 if self._purge is None else self._purge
            self._writer = SummaryWriter(str(run.run_dir / "tensorboard"), purge_step=purge)
        for name, value in figures.items():
            self._writer.add_scalar(f"{kind}/{name}", value, run.state.step)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
