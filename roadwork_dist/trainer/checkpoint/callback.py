"""Saves the whole training state and takes it up again."""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from roadwork_dist.common.errors import CheckpointError, ConfigError
from roadwork_dist.common.random import RngState, capture_rng, derive_seed, restore_rng, seed_everything
from roadwork_dist.trainer.checkpoint.checkpoint_store import CheckpointStore
from roadwork_dist.trainer.checkpoint.tensors import StoredTensors, write_tensors, write_torch
from roadwork_dist.trainer.checkpoint.together import on_main
from roadwork_dist.trainer.checkpoint.weights import (
    check_same_model,
    frozen_identity,
    trained_buffers,
    trained_tensors,
)
from roadwork_dist.trainer.checkpoint.writer import CheckpointWriter
from roadwork_dist.trainer.config import CheckpointConfig
from roadwork_dist.trainer.engine.base import PrefixedSource
from roadwork_dist.trainer.engine.collectives import host_group, rank, world_size
from roadwork_dist.trainer.events.callback import Callback, Run
from roadwork_dist.trainer.events.state import StepResult

logger = logging.getLogger(__name__)

FORMAT = 2
"""Version of what a checkpoint holds; raised when an older reader would misread it."""
STATE = "state.json"


class Checkpointer(Callback):
    """Saves at the end of each epoch and every so many steps; resumes when training starts.

    A checkpoint holds what training moves (weights, optimizer, average), the loop's and every
    observer's state and each rank's random state; of the frozen weights only their hash. It names tensors
    as the bare model does, so any number of processes under any engine can go on from it.
    """

    key = "Checkpointer"

    def __init__(self, config: CheckpointConfig) -> None:
        self.config = config
        self._frozen = ""
        self._shapes: dict[str, torch.Size] = {}
        self._figure: float | None = None
        self._planned: int | None = None
        self._group: dist.ProcessGroup | None = None
        self._writer = CheckpointWriter(config.asynchronous)

    def store(self, run: Run) -> CheckpointStore:
        """The run's checkpoints."""
        return CheckpointStore(run.run_dir / "checkpoints", self.config.keep)

    def on_setup(self, run: Run) -> None:
        """Learn who the frozen weights are and what is trained, while all is whole."""
        self._frozen = frozen_identity(run.model)
        self._shapes = {name: tensor.shape for name, tensor in trained_tensors(run.model).items()}

    def on_fit_start(self, run: Run) -> None:
        """Go on from the newest whole checkpoint.

        Raises:
            ConfigError: ``resume`` is ``never`` and the folder holds a checkpoint.
            CheckpointError: the checkpoint belongs to another model or another order of rows.
        """
        self._group = self._group or host_group()  # every rank starts
        store = self.store(run)
        if run.config.resume == "never":
            # Unreadable ones too: they are somebody's run.
            there = on_main(lambda: [store.path(step).name for step in store.steps()], self._group)
            if there:
                raise ConfigError(
                    f"resume is 'never' but {run.run_dir} holds the checkpoint {there[-1]}: choose another "
                    "output_dir, delete the folder, or leave resume at 'auto'"
                )
        # Every rank must go on from the same checkpoint, so one looks and tells.
        found = on_main(store.recover, self._group)
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
            self._save(run, planned=bool(is_due), wait=result.interrupted)

    def on_rewind(self, run: Run) -> None:
        """Put weights, moments and observers' tensors back; nothing happens before the first checkpoint.

        Back to the last planned checkpoint: one that was saved because the run was asked to stop is not
        there in a run that was not, and both are to end alike.
        """
        self._writer.finish(run)
        store = self.store(run)
        planned, found = self._planned, None
        if planned is not None:
            # Every rank must go back to the same one, so one looks and tells.
            found = on_main(lambda: store.verified(planned) or store.newest(), self._group)
        if found is not None:
            self._load_tensors(run, StoredTensors(found), read_state(found))
        logger.warning("back to %s", found.name if found else "nothing: there is no checkpoint yet")

    def state_dict(self) -> dict[str, Any]:
        """Step of the last checkpoint that was not saved because the run was asked to stop."""
        return {"planned": self._planned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a :meth:`state_dict` over."""
        self._planned = state.get("planned")

    def on_validation_end(self, run: Run, metrics: dict[str, float], improved: bool) -> None:
        """Remember the monitored figure, to be found in the epoch's checkpoint."""
        self._figure = metrics[run.config.monitor.removeprefix("-")]

    def on_validation_interrupted(self, run: Run) -> None:
        """Save as behind the epoch's last step; who goes on validates first."""
        self._save(run, planned=False, wait=True)

    def on_epoch_end(self, run: Run) -> None:
        """Save with the validation behind it."""
        # Behind the last epoch there is nothing that could go on meanwhile; and who says that all is saved
        # has to know it.
        is_last = run.state.epoch == run.config.epochs or run.state.should_stop
        self._save(run, planned=True, wait=is_last or run.is_leaving)

    def on_fit_end(self, run: Run) -> None:
        """Give memory back; the last save was waited for."""
        self._writer.close()

    def on_exception(self, run: Run, error: BaseException) -> None:
        """Let a save in the background come to its end."""
        self._writer.abandon()

    def _save(self, run: Run, *, planned: bool, wait: bool) -> None:
        # Every rank reaches all of this: engines gather in their tensors, and every rank writes.
        self._writer.finish(run)  # before the state is taken: it tells figures
        started = time.perf_counter()
        if planned:
            self._planned = run.state.step
        step, state, rng = run.state.step, json.dumps(self._state(run), indent=1), capture_rng()
        store, planned_step = self.store(run), self._planned
        best = run.state.best_step if run.state.best is not None else None

        def write(tensors: Mapping[str, Tensor]) -> int:
            return store.save(
                step,
                lambda folder: _write(folder, tensors, state, rng, self._group),
                best_step=best,
                spared=planned_step,
                group=self._group,
            )

        self._writer.save(run, stored_tensors(run), write, started=started, wait=wait)

    def _state(self, run: Run) -> dict[str, Any]:
        figure, self._figure = self._figure, None
        return {
            "format": FORMAT,
            "frozen": self._frozen,
            "processes": world_size(),
            "engine": run.engine.name,
            "monitor": run.config.monitor.removeprefix("-"),
            "figure": figure,
            "optimizer": run.engine.optimizer_values(),
            **run.state_dict(),
        }

    def _load(self, run: Run, folder: Path) -> None:
        state = read_state(folder)
        if state["frozen"] != self._frozen:
            raise CheckpointError(
                f"{folder} was trained on other frozen weights (SHA-256 {state['frozen'][:12]}…, "
                f"now {self._frozen[:12]}…): use the same backbone weights, or another output_dir"
            )
        source = StoredTensors(folder)
        check_same_model(self._shapes, PrefixedSource("model/", source).shapes, folder)
        run.load_state_dict(state)
        self._load_tensors(run, source, state)
        self._load_rng(run, folder)

    def _load_tensors(self, run: Run, source: StoredTensors, state: Mapping[str, Any]) -> None:
        engine = run.engine
        engine.fill(engine.weights(), source, "model/")
        engine.weights_changed()
        PrefixedSource("model/", source).read(trained_buffers(run.model))
        engine.load_moments(source, "optimizer/", state.get("optimizer"))
        run.load_tensors(PrefixedSource("callbacks/", source))

    def _load_rng(self, run: Run, folder: Path) -> None:
        path = folder / _rng_file(rank())
        if path.exists():
            restore_rng(torch.load(path, map_location="cpu", weights_only=True))
        else:  # more processes than there were: this one draws from here on as no other does
            seed_everything(derive_seed(run.config.seed, "rank", rank(), "step", run.state.step))


def stored_tensors(run: Run) -> dict[str, Tensor]:
    """Everything a checkpoint stores of tensors, in stored form. All ranks call it together."""
    engine = run.engine
    tensors = {f"model/{name}": t for name, t in engine.stored(engine.weights()).items()}
    if rank() == 0:  # ranks may differ in theirs; all go on with rank 0's, as validation does
        tensors |= {f"model/{name}": t for name, t in trained_buffers(run.model).items()}
    tensors |= {f"optimizer/{name}": t for name, t in engine.moments().items()}
    return tensors | {f"callbacks/{name}": t for name, t in run.tensors().items()}


def read_state(folder: Path) -> dict[str, Any]:
    """The loop's state and what a checkpoint says of itself.

    Raises:
        CheckpointError: it cannot be read or is of another version.
    """
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text())
        version = state.get("format", 1)
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / STATE} cannot be read ({error})") from error
    if version != FORMAT:
        raise CheckpointError(
            f"{folder} has format {version!r}, expected {FORMAT}: it was written by another version of "
            "roadwork_dist; install that one, or train into another output_dir"
        )
    return state


def _write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    state: str,
    rng: RngState,
    group: dist.ProcessGroup | None,
) -> list[str]:
    files = write_tensors(folder, tensors, group)
    write_torch(folder / _rng_file(rank()), rng)
    files.append(_rng_file(rank()))
    if rank() == 0:
        (folder / STATE).write_text(state)
        files.append(STATE)
    return files


def _rng_file(rank: int) -> str:
    return f"rng-{rank:05d}.pt"
