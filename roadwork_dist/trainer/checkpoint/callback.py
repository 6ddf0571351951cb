"""Saves the complete training state and resumes from it."""

import json
import logging
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from roadwork_dist.common.errors import CheckpointError, ConfigError
from roadwork_dist.common.random import capture_rng, derive_seed, restore_rng, seed_everything
from roadwork_dist.common.undisturbed import write_buffer
from roadwork_dist.trainer.checkpoint.checkpoint_store import CheckpointStore
from roadwork_dist.trainer.checkpoint.module_state import ModuleState
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
"""Version of a checkpoint's contents; increased when an older reader would misread them."""
STATE = "state.json"


class Checkpointer(Callback):
    """Saves at the end of each epoch and every ``every_steps`` steps; resumes when training starts.

    A checkpoint holds what training changes (weights, optimizer, average), the state of the loop and of every
    callback, and each rank's random state; of the frozen weights only their hash. It names tensors as the
    bare model does, so any number of processes under any engine can resume from it.
    """

    key = "Checkpointer"

    def __init__(self, config: CheckpointConfig) -> None:
        self.config = config
        self._frozen = ""
        self._shapes: dict[str, torch.Size] = {}
        self._figure: float | None = None
        self._buffers: list[str] = []
        self._modules: ModuleState | None = None
        self._planned: int | None = None
        self._group: dist.ProcessGroup | None = None
        self._writer = CheckpointWriter(config.asynchronous)

    def store(self, run: Run) -> CheckpointStore:
        """The run's checkpoints."""
        return CheckpointStore(run.run_dir / "checkpoints", self.config.keep)

    def on_setup(self, run: Run) -> None:
        """Record the hash of the frozen weights and the shapes of the trained ones, before any sharding."""
        self._frozen = frozen_identity(run.model)
        self._shapes = {name: tensor.shape for name, tensor in trained_tensors(run.model).items()}
        self._buffers = list(trained_buffers(run.model))  # by the modes of now: parts may change theirs

    def on_fit_start(self, run: Run) -> None:
        """Resume from the newest intact checkpoint.

        Raises:
            ConfigError: ``resume`` is ``never`` and the folder holds a checkpoint.
            CheckpointError: the checkpoint belongs to another model or another order of rows.
        """
        self._group = self._group or host_group()  # a collective, which every rank reaches here
        if self._modules is None:  # what the run started with, also for a second fit()
            run.engine.weights_changed()  # drops what an evaluation before has gathered
            self._modules = ModuleState(run.model, run.engine, self._shapes)
        store = self.store(run)
        if run.config.resume == "never":
            # Unreadable ones too: they belong to somebody's run.
            there = on_main(lambda: [store.path(step).name for step in store.steps()], self._group)
            if there:
                raise ConfigError(
                    f"resume is 'never' but {run.run_dir} holds the checkpoint {there[-1]}: choose another "
                    "output_dir, delete the folder, or leave resume at 'auto'"
                )
        # Every rank must resume from the same checkpoint, so one rank finds it for all.
        found = on_main(store.recover, self._group)
        if found is not None:
            self._load(run, found)
            logger.info("resuming from %s", found)

    def on_step_end(self, run: Run, result: StepResult) -> None:
        """Save every ``every_steps`` steps, and when the run was asked to stop.

        The periodic save is omitted at the epoch's end, which saves anyway, and after a skipped step.
        """
        every = self.config.every_steps
        is_epoch_end = run.state.step_in_epoch == run.steps_per_epoch
        is_due = every and run.state.step % every == 0 and not is_epoch_end and not result.skipped
        if is_due or result.interrupted:
            self._save(run, planned=bool(is_due), wait=result.interrupted)

    def on_rewind(self, run: Run) -> None:
        """Restore weights, moments and callbacks' tensors; before the first checkpoint do nothing.

        They are restored from the last planned checkpoint. One saved because the run was asked to stop does
        not exist in an uninterrupted run, and both must give the same result.
        """
        self._writer.finish(run)
        store = self.store(run)
        planned, found = self._planned, None
        if planned is not None:
            # Every rank must restore the same one, so one rank finds it for all.
            found = on_main(lambda: store.verified(planned) or store.newest(), self._group)
        if found is not None:
            self._load_tensors(run, StoredTensors(found), read_state(found))
        logger.warning("restored %s", found.name if found else "nothing: there is no checkpoint yet")

    def state_dict(self) -> dict[str, Any]:
        """Step of the last planned checkpoint (one not saved because the run was asked to stop)."""
        return {"planned": self._planned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a :meth:`state_dict`."""
        self._planned = state.get("planned")

    def on_validation_end(self, run: Run, metrics: dict[str, float], improved: bool) -> None:
        """Remember the monitored metric for the epoch's checkpoint."""
        self._figure = metrics[run.config.monitor.removeprefix("-")]

    def on_validation_interrupted(self, run: Run) -> None:
        """Save as after the epoch's last step; a resumed run validates first."""
        self._save(run, planned=False, wait=True)

    def on_epoch_end(self, run: Run) -> None:
        """Save, with the validation already done."""
        # After the last epoch there is no training to overlap with, and a caller that reports the state as
        # saved has to be sure of it.
        is_last = run.state.epoch == run.config.epochs or run.state.should_stop
        self._save(run, planned=True, wait=is_last or run.is_leaving)

    def on_fit_end(self, run: Run) -> None:
        """Free memory; the last save has already finished."""
        self._writer.close()

    def on_exception(self, run: Run, error: BaseException) -> None:
        """Wait for a background save to finish."""
        self._writer.abandon()

    def _save(self, run: Run, *, planned: bool, wait: bool) -> None:
        # Every rank runs all of this: engines gather their tensors, and every rank writes.
        self._writer.finish(run)  # before the state is taken: it reports figures to callbacks
        started = time.perf_counter()
        if planned:
            self._planned = run.state.step
        step, state, rng = run.state.step, json.dumps(self._state(run), indent=1), self._random_states()
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

        assert self._modules is not None  # made when training starts
        tensors = stored_tensors(run, self._buffers) | self._modules.parameters()
        self._writer.save(run, tensors, write, started=started, wait=wait)

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
        for name in self._buffers:
            owner, _, attribute = name.rpartition(".")
            write_buffer(run.model.get_submodule(owner), attribute, source.whole(f"model/{name}"))
        if self._modules is not None:
            self._modules.load_parameters(source)
        engine.load_moments(source, "optimizer/", state.get("optimizer"))
        run.load_tensors(PrefixedSource("callbacks/", source))

    def _random_states(self) -> dict[str, Any]:
        """Of this process's generators, and what modules keep that is no tensor."""
        assert self._modules is not None  # made when training starts
        return {**capture_rng(), "modules": self._modules.objects()}

    def _load_rng(self, run: Run, folder: Path) -> None:
        states = [_read_rng(folder / _rng_file(number)) for number in (rank(), 0)]
        own, main = states
        if own is not None:
            restore_rng(own)  # type: ignore[arg-type]
        else:  # more processes than when it was saved: give this one a random stream of its own
            seed_everything(derive_seed(run.config.seed, "rank", rank(), "step", run.state.step))
        if self._modules is not None and main is not None:
            self._modules.load_objects(
                None if own is None else own.get("modules", {}), main.get("modules", {})
            )


def _read_rng(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def stored_tensors(run: Run, buffers: Collection[str]) -> dict[str, Tensor]:
    """All tensors of a checkpoint, in stored form. All ranks call it together."""
    engine = run.engine
    tensors = {f"model/{name}": t for name, t in engine.stored(engine.weights()).items()}
    if rank() == 0:  # ranks' buffers may differ; all resume with rank 0's, which validation uses too
        tensors |= {f"model/{name}": run.model.get_buffer(name).detach() for name in buffers}
    tensors |= {f"optimizer/{name}": t for name, t in engine.moments().items()}
    return tensors | {f"callbacks/{name}": t for name, t in run.tensors().items()}


def read_state(folder: Path) -> dict[str, Any]:
    """The loop's state and the checkpoint's description of itself.

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
    rng: Mapping[str, Any],
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
