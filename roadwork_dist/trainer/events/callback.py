"""The events of the training loop, in the order in which they happen.

on_setup → on_fit_start → on_train_start → per epoch: (on_step_end)* → on_validation_start
→ on_validation_end → on_epoch_end → on_fit_end. If anything is raised, on_exception comes instead of
what is left. In a validation that is given up because the run was asked to stop, on_validation_interrupted
comes in place of on_validation_end.

Callbacks are called in the order in which they were given. Besides watching, a callback can refuse a step by
its loss (:meth:`Callback.vetoes`) and put other weights in place for the validation
(:meth:`Callback.validation_weights`), which are there from on_validation_start to on_validation_end.
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
    """What observers see of a running Trainer."""

    config: TrainConfig
    state: TrainState
    accelerator: Accelerator
    model: nn.Module  # as given, not wrapped; its parameters may hold shards
    optimizer: Optimizer
    run_dir: Path
    # Set on any rank, at any time (by a signal's handler, say): all ranks leave the loop behind the
    # step that is under way, with a checkpoint.
    interrupt_requested: bool
    # All ranks have agreed at the end of an epoch to leave behind it.
    is_leaving: bool
    # Counts every batch that is read, in training and validation: what changes as long as the run moves.
    batches_read: int

    @property
    def engine(self) -> Engine:
        """The model on its processes."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""

    def averaged(self) -> AbstractContextManager[None]:
        """Run a block with the averaged weights in ``model``; with its own where no average is kept."""

    def sample_ids(self, rows: Sequence[int]) -> list[str]:
        """Ids of rows of the training data: its ``sample_id(row)`` where it has one, else the row."""

    def tell(self, kind: str, figures: dict[str, Any]) -> None:
        """Hand figures to every observer (:meth:`Callback.on_figures`); every rank does, or one alone."""

    def rewind(self) -> None:
        """Let every observer go back to the last checkpoint; all ranks call it together."""

    def state_dict(self) -> dict[str, Any]:
        """Loop state and the state of every observer, JSON-able."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a :meth:`state_dict` over."""

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of every observer, by ``observer/name``."""

    def load_tensors(self, source: TensorSource) -> None:
        """Take :meth:`tensors` over."""


class Callback:
    """An observer of the loop; override what is needed.

    Every method is called on every rank at the same point, so collectives are allowed in all of
    them but :meth:`on_exception` and :meth:`on_figures`.

    Attributes:
        key: name of its state in checkpoints, another one for every callback that has state; empty = the name
            of the class. Part of the format of checkpoints: say it before you rename the class.
        former_keys: earlier names, under which older checkpoints hold the state.
    """

    key: str = ""
    former_keys: tuple[str, ...] = ()

    def on_setup(self, run: Run) -> None:
        """Once: the model is as it was given, whole, not yet on its device."""

    def on_fit_start(self, run: Run) -> None:
        """The model is on its device, spread over the ranks; nothing is trained yet.

        Here a run goes on from its checkpoint, and here a start is refused.
        """

    def on_train_start(self, run: Run) -> None:
        """Nobody has refused; ``run.state`` tells from where the run goes on."""

    def vetoes(self, run: Run, loss: float) -> bool:
        """Whether the step with this loss must not be taken; asked before the backward pass.

        Args:
            run: the Trainer.
            loss: finite, over the rows of all ranks and so the same on all; so must the answer be.
        """
        return False

    def on_step_end(self, run: Run, result: StepResult) -> None:
        """An optimizer step was taken or skipped; ``run.state.step`` counts it."""

    def on_rewind(self, run: Run) -> None:
        """Weights, moments and tensors of observers are to go back to the last checkpoint; counters not."""

    def validation_weights(self, run: Run) -> AbstractContextManager[None] | None:
        """A block with other weights in ``run.model``, to validate and export; None = its own."""
        return None

    def on_validation_start(self, run: Run) -> None:
        """The training rows of an epoch are done."""

    def on_validation_end(self, run: Run, metrics: dict[str, float], improved: bool) -> None:
        """The validation set was seen once; ``improved`` = its figure is the best so far."""

    def on_validation_interrupted(self, run: Run) -> None:
        """The run was asked to stop, so the validation is given up, to be done anew by who goes on."""

    def on_figures(self, run: Run, kind: str, figures: dict[str, Any]) -> None:
        """Another observer has figures of its own to tell, of this kind. No collectives."""

    def on_epoch_end(self, run: Run) -> None:
        """The epoch counts as complete."""

    def on_fit_end(self, run: Run) -> None:
        """Training ended by itself."""

    def on_exception(self, run: Run, error: BaseException) -> None:
        """Training ends with an error. Other ranks may not get here: no collectives."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state for checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a :meth:`state_dict` over."""

    def tensors(self) -> dict[str, Tensor]:
        """Tensors for checkpoints: the same on all ranks, or in the engine's stored form."""
        return {}

    def load_tensors(self, source: TensorSource) -> None:
        """Take :meth:`tensors` over. All ranks read the same names in the same order, if any."""

    def on_no_tensors(self) -> None:
        """The checkpoint, whose weights are in place, has no tensors of this callback."""
