"""Logging to Weights & Biases: one run for all ranks, continued after a resume."""

import hashlib
import secrets
from dataclasses import asdict
from typing import Any

from roadwork_dist.common.files import write_atomic
from roadwork_dist.common.optional import require
from roadwork_dist.trainer.config import WandbConfig
from roadwork_dist.trainer.events.callback import Callback, Run
from roadwork_dist.trainer.events.state import StepResult
from roadwork_dist.trainer.tracking.figures import numbers, step_figures

ID_FILE = "wandb-id"


class WeightsAndBiases(Callback):
    """Logs steps and validations to Weights & Biases (rank 0).

    Raises:
        MissingDependencyError: the package wandb is not installed.
    """

    def __init__(self, config: WandbConfig) -> None:
        self.config = config
        self._wandb = require("wandb", extra="wandb", purpose="tracking.wandb")
        self._run: Any = None

    def on_train_start(self, run: Run) -> None:
        """Open the run; its id is kept in the run folder, so a resumed run continues it."""
        if run.accelerator.is_main_process:
            identity = _kept_id(run)
            self._run = self._wandb.init(
                project=self.config.project,
                entity=self.config.entity,
                mode=self.config.mode,
                id=identity,
                name=run.run_dir.name,
                resume="allow" if self.config.mode == "online" else None,
                dir=str(run.run_dir),
                config=asdict(run.config),
            )

    def on_step_end(self, run: Run, result: StepResult) -> None:
        """Log ``train/…``."""
        self._log(run, "train", step_figures(run, result))

    def on_validation_end(self, run: Run, metrics: dict[str, float], improved: bool) -> None:
        """Log ``val/…``."""
        self._log(run, "val", metrics)

    def on_figures(self, run: Run, kind: str, figures: dict[str, Any]) -> None:
        """Log the numeric figures as ``<kind>/…``."""
        self._log(run, kind, numbers(figures))

    def on_fit_end(self, run: Run) -> None:
        """Close the run."""
        self._finish(0)

    def on_exception(self, run: Run, error: BaseException) -> None:
        """Close the run as failed."""
        self._finish(1)

    def _log(self, run: Run, kind: str, figures: dict[str, Any]) -> None:
        if self._run is not None:
            self._run.log({f"{kind}/{name}": value for name, value in figures.items()}, step=run.state.step)

    def _finish(self, exit_code: int) -> None:
        if self._run is not None:
            self._run.finish(exit_code=exit_code)
            self._run = None


def _kept_id(run: Run) -> str:
    """The id in the run folder, or a new random one: equal paths on two machines are two experiments."""
    path = run.run_dir / ID_FILE
    if path.is_file():
        return path.read_text().strip()
    identity = secrets.token_hex(8)
    if run.state.step:  # a run of version 0.1, whose id was a hash of the path
        identity = hashlib.sha256(str(run.run_dir.resolve()).encode()).hexdigest()[:16]
    write_atomic(path, identity.encode())
    return identity
