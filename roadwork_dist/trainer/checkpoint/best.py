"""Exports the weights with the best validation metric."""

from pathlib import Path
from typing import Protocol, runtime_checkable

import safetensors.torch
from torch import Tensor, nn

from roadwork_dist.common.errors import CheckpointError
from roadwork_dist.common.files import write_atomic
from roadwork_dist.trainer.engine.base import Engine
from roadwork_dist.trainer.events.callback import Callback, Run


@runtime_checkable
class Pretrained(Protocol):
    """A model that defines how it is saved."""

    def saved_names(self) -> set[str]:
        """Names in its state dict of the tensors to save."""

    def save_pretrained(self, folder: Path, *, state: dict[str, Tensor]) -> None:
        """Write everything needed to load the model; ``state`` holds those tensors, whole."""


def export_model(model: nn.Module, engine: Engine, folder: Path) -> None:
    """Write a model to a folder, with its own ``save_pretrained`` or else its state dict as safetensors.

    All ranks call it together; the main process writes.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    own = model if isinstance(model, Pretrained) else None
    state = engine.whole_state(own.saved_names() if own else None)
    if not engine.accelerator.is_main_process:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if own:
            own.save_pretrained(folder, state=state)
        else:
            write_atomic(folder / "model.safetensors", safetensors.torch.save(state))
    except OSError as error:
        raise CheckpointError(
            f"the best weights could not be written to {folder} ({error.strerror or error}): "
            "make room or fix the folder, then start again to resume from the last checkpoint"
        ) from error


class BestWeights(Callback):
    """Writes ``best/`` in the run folder: the validated weights, averaged if there is an average."""

    def on_validation_end(self, run: Run, metrics: dict[str, float], improved: bool) -> None:
        """Export when the monitored metric is the best so far."""
        if improved:
            export_model(run.model, run.engine, run.run_dir / "best")

    def on_fit_end(self, run: Run) -> None:
        """Export the last weights if no validation has selected any."""
        if run.state.best is None:
            with run.averaged():
                export_model(run.model, run.engine, run.run_dir / "best")
