"""The callback interface of the training loop, with its events in the order of their calls.

on_setup → on_fit_start → on_train_start → per epoch: (on_step_end)* → on_validation_start
→ on_validation_end → on_epoch_end → on_fit_end. After an error, on_exception replaces the remaining events.
If a validation is aborted because the run was asked to stop, on_validation_interrupted replaces
on_validation_end.

Callbacks are called in the given order. A callback can also veto a step because of its loss
(:meth:`Callback.vetoes`) and swap in other weights for the validation
(:meth:`Callback.validation_weights`), from on_validation_start to on_validation_end.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from roadwork_dist.trainer.config import TrainConfig
from roadwork_dist.trainer.engine.base import Engine, TensorSource
from roadwork_dist.trainer.events.state import StepResult, TrainState


class Run(Protocol):
    """The running Trainer, as callbacks see it."""

    config: TrainConfig
    state: TrainState
    accelerator: Accelerator
    model: nn.Module  # as given, not wrapped; its parameters may be sharded
    optimizer: Optimizer
    run_dir: Path
    # May be set on any rank at any time, for example by a signal handler: all ranks then save a checkpoint
    # and leave the loop after the current step.
    interrupt_requested: bool
    # All ranks have agreed at the end of an epoch to leave after it.
    is_leaving: bool
    # Counts every batch read, in training and validation; increases as long as the run makes progress.
    batches_read: int

    @property
    def engine(self) -> Engine:
        """The engine that runs the model on all processes."""

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to train."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""

    def averaged(self) -> AbstractContextManager[None]:
        """Run a block with the averaged weights in ``model``, or with its own if there is no average."""

    def sample_ids(self, rows: Sequence[int]) -> list[str]:
        """Ids of rows of the training data: its ``sample_id(row)`` if it has that method, else the row."""

    def tell(self, kind: str, figures: dict[str, Any]) -> None:
        """Pass figures to every callback (:meth:`Callback.on_figures`); on every rank or on one alone."""

    def rewind(self) -> None:
        """Let every callback return to the last checkpoint; all ranks call it together."""

    def state_dict(self) -> dict[str, Any]:
        """Loop state and the state of every callback, JSON-serializable."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a :meth:`state_dict`."""

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of every callback, by ``key/name``."""

    def load_tensors(self, source: TensorSource) -> None:
        """Load :meth:`tensors`."""


class Callback:
    """Base class of callbacks; override the methods you need.

    Every method is called on every rank at the same point, so collectives are allowed in all of
    them except :meth:`on_exception` and :meth:`on_figures`.

    Attributes:
        key: key of its state in checkpoints, unique among callbacks with state; empty = the class name. It is
            part of the checkpoint format: set it before you rename the class.
        former_keys: earlier keys, under which older checkpoints hold the state.
    """

    key: str = ""
    former_keys: tuple[str, ...] = ()

    def on_setup(self, run: Run) -> None:
        """Called once; the model is as given: not sharded and not yet on its device."""

    def on_fit_start(self, run: Run) -> None:
        """The model is on its device, distributed over the ranks; nothing has been trained yet.

        The checkpoint is loaded here, and errors that prevent the start are raised here.
        """

    def on_train_start(self, run: Run) -> None:
        """Training starts: no callback has raised, and ``run.state`` is where the run starts or resumes."""

    def vetoes(self, run: Run, loss: float) -> bool:
        """Whether to skip the step with this loss; called before the backward pass.

        Args:
            run: the Trainer.
            loss: finite, over the rows of all ranks, hence the same on all; so must the answer be.
        """
        return False

    def on_step_end(self, run: Run, result: StepResult) -> None:
        """An optimizer step was taken or skipped; ``run.state.step`` includes it."""

    def on_rewind(self, run: Run) -> None:
        """Weights, moments and callback tensors are to return to the last checkpoint; counters are not."""

    def validation_weights(self, run: Run) -> AbstractContextManager[None] | None:
        """A context with other weights in ``run.model`` for validation and export; None = its own weights."""
        return None

    def on_validation_start(self, run: Run) -> None:
        """All training rows of an epoch have been processed."""

    def on_validation_end(self, run: Run, metrics: dict[str, float], improved: bool) -> None:
        """The validation is complete; ``improved`` = the monitored figure is the best so far."""

    def on_validation_interrupted(self, run: Run) -> None:
        """The validation was aborted, since the run was asked to stop; repeated when the run resumes."""

    def on_figures(self, run: Run, kind: str, figures: dict[str, Any]) -> None:
        """Another callback reports figures of this kind. No collectives."""

    def on_epoch_end(self, run: Run) -> None:
        """The epoch is complete."""

    def on_fit_end(self, run: Run) -> None:
        """Training ended normally."""

    def on_exception(self, run: Run, error: BaseException) -> None:
        """Training ends with an error. Other ranks may not get here: no collectives."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-serializable state for checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a :meth:`state_dict`."""

    def tensors(self) -> dict[str, Tensor]:
        """Tensors for checkpoints: the same on all ranks, or in the engine's stored form."""
        return {}

    def load_tensors(self, source: TensorSource) -> None:
        """Load :meth:`tensors`. All ranks must read the same names in the same order."""

    def on_no_tensors(self) -> None:
        """The checkpoint has no tensors of this callback; its weights are already loaded."""
