"""The weights with the best validation figure."""

from pathlib import Path
from typing import Protocol, runtime_checkable

import safetensors.torch
from torch import nn

from roadwork_dist.common.errors import CheckpointError
from roadwork_dist.common.files import write_atomic
from roadwork_dist.events.callback import Callback, Run


@runtime_checkable
class Pretrained(Protocol):
    """A model that knows how it wants to be saved."""

    def save_pretrained(self, folder: Path) -> None:
        """Write all that is needed to load it again."""


def export_model(model: nn.Module, folder: Path) -> None:
    """Write a model to a folder: by its own ``save_pretrained``, else its state as safetensors.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(model, Pretrained):
            model.save_pretrained(folder)
        else:
            state = {n: t.detach().cpu().contiguous().clone() for n, t in model.state_dict().items()}
            write_atomic(folder / "model.safetensors", safetensors.torch.save(state))
    except OSError as error:
        raise CheckpointError(
            f"the best weights could not be written to {folder} ({error.strerror or error}): "
            "make room or mend the folder, then start again to go on from the last checkpoint"
        ) from error


class BestWeights(Callback):
    """Keeps ``best/`` of the run folder: the validated weights, averaged where there is an average."""

    def on_validation_end(self, run: Run, metrics: dict[str, float], improved: bool) -> None:
        """Export when the monitored figure is the best so far."""
        if improved and run.accelerator.is_main_process:
            export_model(run.model, run.run_dir / "best")

    def on_fit_end(self, run: Run) -> None:
        """Export the last weights where no validation has chosen any."""
        if run.state.best is None and run.accelerator.is_main_process:
            with run.averaged():
                export_model(run.model, run.run_dir / "best")
