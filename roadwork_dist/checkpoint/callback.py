"""Saves the whole training state and takes it up again."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from roadwork_dist.checkpoint.store import CheckpointStore
from roadwork_dist.checkpoint.weights import frozen_identity, load_trained_tensors, trained_tensors
from roadwork_dist.common.errors import CheckpointError, ConfigError
from roadwork_dist.common.random import capture_rng, restore_rng
from roadwork_dist.config.schema import CheckpointConfig
from roadwork_dist.engine.base import WholeTensors
from roadwork_dist.engine.collectives import broadcast_object, gather_objects
from roadwork_dist.events.callback import Callback, Run
from roadwork_dist.events.state import StepResult

logger = logging.getLogger(__name__)


class Checkpointer(Callback):
    """Saves at the end of each epoch and every so many steps; resumes when training starts.

    A checkpoint holds what training moves (weights, optimizer, average), the loop's and every
    observer's state and each rank's random state; of the frozen weights only their hash.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        self.config = config
        self._frozen = ""

    def store(self, run: Run) -> CheckpointStore:
        """The run's checkpoints."""
        return CheckpointStore(run.run_dir / "checkpoints", self.config.keep)

    def on_setup(self, run: Run) -> None:
        """Tell who the frozen weights are, while they are whole."""
        run.model.train()
        self._frozen = frozen_identity(run.model)

    def on_fit_start(self, run: Run) -> None:
        """Go on from the newest whole checkpoint.

        Raises:
            ConfigError: ``resume`` is ``never`` and the folder holds a checkpoint.
            CheckpointError: the checkpoint belongs to another model or another order of rows.
        """
        store = self.store(run)
        # Every rank must go on from the same checkpoint, so one looks and tells.
        is_main = run.accelerator.is_main_process
        found, steps = broadcast_object((store.newest(), store.steps()) if is_main else (None, []))
        if run.config.resume == "never" and steps:  # unreadable ones too: they are somebody's run
            raise ConfigError(
                f"resume is 'never' but {run.run_dir} holds the checkpoint {store.path(steps[-1]).name}: "
                "choose another output_dir, delete the folder, or leave resume at 'auto'"
            )
        if found is not None:
            self._load(run, found)
            logger.info("going on from %s", found)

    def on_step_end(self, run: Run, result: StepResult) -> None:
        """Save every ``every_steps`` steps, and when the run was asked to stop.

        The former not in place of the save at the epoch's end, and not behind a skipped step.
        """
        every = self.config.every_steps
        is_epoch_end = run.state.step_in_epoch == run.steps_per_epoch
        is_due = every and run.state.step % every == 0 and not is_epoch_end and not result.skipped
        if is_due or result.interrupted:
            self._save(run)

    def on_epoch_end(self, run: Run) -> None:
        """Save with the validation behind it."""
        self._save(run)

    def _save(self, run: Run) -> None:
        # Every rank reaches both: its random state is gathered, and rank 0 writes for all.
        rng = gather_objects(capture_rng())
        state = run.state_dict()
        if run.accelerator.is_main_process:
            best = run.state.best_step if run.state.best is not None else None
            self.store(run).save(
                run.state.step, lambda folder: self._write(run, folder, state, rng), best_step=best
            )
        run.accelerator.wait_for_everyone()

    def _write(self, run: Run, folder: Path, state: dict[str, Any], rng: list[Any]) -> None:
        _write_tensors(folder / "model.safetensors", trained_tensors(run.model))
        _write_tensors(folder / "callbacks.safetensors", run.tensors())
        _write_torch(folder / "optimizer.pt", run.optimizer.state_dict())
        _write_torch(folder / "rng.pt", rng)
        text = json.dumps({"frozen": self._frozen, "processes": len(rng), **state}, indent=1)
        (folder / "state.json").write_text(text)

    def _load(self, run: Run, folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        if state["frozen"] != self._frozen:
            raise CheckpointError(
                f"{folder} was trained on other frozen weights (SHA-256 {state['frozen'][:12]}…, "
                f"now {self._frozen[:12]}…): use the same backbone weights, or another output_dir"
            )
        run.load_state_dict(state)
        load_trained_tensors(run.model, safetensors.torch.load_file(folder / "model.safetensors"))
        run.load_tensors(WholeTensors(safetensors.torch.load_file(folder / "callbacks.safetensors")))
        # The optimizer moves its state to the device of its parameters.
        moments = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        run.optimizer.load_state_dict(moments)
        rng = torch.load(folder / "rng.pt", map_location="cpu", weights_only=True)
        rank = run.accelerator.process_index
        if rank < len(rng):
            restore_rng(rng[rank])


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    # Copies, also of what lies on the CPU: safetensors refuses tensors that share memory (a buffer of
    # two modules, say).
    contiguous = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    path.write_bytes(safetensors.torch.save(contiguous))


def _write_torch(path: Path, value: Any) -> None:
    # Through memory: torch.save to a file turns a full disk into an error that does not say so.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(buffer.getbuffer())
