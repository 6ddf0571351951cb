"""The training loop, for any model: fit → _train_epoch → OptimizerStep, three hops to ``optimizer.step()``.

Everything outside the loop (averaging, checkpoints, figures on disk and screen) is a callback.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from itertools import tee
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.random import seed_everything
from roadwork_dist.common.undisturbed import enter_train_mode, moving_buffers, undisturbed
from roadwork_dist.trainer.answers import PassInterrupted, PassResult, answer_rows, summarize
from roadwork_dist.trainer.callbacks import keyed_state
from roadwork_dist.trainer.config import TrainConfig
from roadwork_dist.trainer.defaults import all_callbacks
from roadwork_dist.trainer.engine.accelerator import build_accelerator
from roadwork_dist.trainer.engine.base import Engine, TensorSource, WholeTensors
from roadwork_dist.trainer.engine.build import build_engine, engine_class
from roadwork_dist.trainer.engine.collectives import broadcast_tensors, sum_over_ranks
from roadwork_dist.trainer.engine.conflicts import check_agreement
from roadwork_dist.trainer.events.callback import Callback
from roadwork_dist.trainer.events.state import TrainState
from roadwork_dist.trainer.feed.dataset import MapDataset, ids_digest, rows_digest, sample_id
from roadwork_dist.trainer.feed.loader import load_batches
from roadwork_dist.trainer.feed.order import ShardOrder
from roadwork_dist.trainer.feed.sampler import Sampler
from roadwork_dist.trainer.guards.explain import explained
from roadwork_dist.trainer.optim.optimizers import build_optimizer, check_needs
from roadwork_dist.trainer.optim.schedules import Schedule
from roadwork_dist.trainer.recipe import keep_recipe, recipe_of, report_epochs, report_finished
from roadwork_dist.trainer.row_plan import keep_row_plan, row_plan
from roadwork_dist.trainer.start_checks import (
    check_callbacks,
    check_data,
    check_kinds,
    check_model,
    check_ranks,
    check_task,
)
from roadwork_dist.trainer.step import LoadedBatch, OptimizerStep
from roadwork_dist.trainer.task import ClassificationTask, Task, operations_of
from roadwork_dist.trainer.validation import observe, weights_to_validate

logger = logging.getLogger(__name__)


class Trainer:
    """Trains a model on one process or many, under the engine that the launcher asks for.

    Started again with the same arguments it goes on where it was, to the bit.

    Args:
        model: any module. Parameters that require no gradient stay as they are, and so do parts in eval mode
            (their dropout and batch statistics); one that is in eval mode as a whole is put into train mode.
        config: recipe, run folder, what to write.
        train_data: map-style data set. Its random draws are made pure functions of
            (seed, epoch, rows); see :mod:`roadwork_dist.trainer.feed.loader`.
        val_data: map-style data set that chooses the best weights; None = no validation.
        task: loss and figures; None = classification of ``(inputs, labels)`` batches.
        sample_weights: chance of each training row, for drawing with replacement.
        shard_order: which shard each training row lies in, to keep each process to few of them at a time;
            None = rows are shuffled over the whole data set.
        collate: list of rows -> batch; None = torch's default.
        callbacks: observers besides the default ones (average, figures, checkpoints).

    Raises:
        ConfigError: nothing to train, no data, or a monitored figure that the task does not give.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        train_data: MapDataset,
        val_data: MapDataset | None = None,
        *,
        task: Task | None = None,
        sample_weights: Sequence[float] | None = None,
        shard_order: ShardOrder | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        check_kinds(
            model=(model, nn.Module, "Trainer(model, config, train_data)"),
            config=(config, TrainConfig, "TrainConfig(output_dir='runs/mine', epochs=5)"),
        )
        check_callbacks(callbacks)
        self.model, self.config = model, config
        self.task: Task = ClassificationTask() if task is None else task
        self.train_data, self.val_data, self.collate = train_data, val_data, collate
        check_model(model)
        check_data(train_data, val_data)
        enter_train_mode(model)
        self.run_dir = Path(config.output_dir)
        self.state = TrainState()
        self.interrupt_requested = self.is_leaving = False
        self._seeds_rows = True  # a run of version 0.1 keeps to its draws, which were seeded by batches
        self._is_off_record = False  # weights are neither the first ones nor those of a checkpoint
        self.batches_read = 0
        self.accelerator = build_accelerator(device=config.device)
        check_agreement(config, self.accelerator)
        self._engine: Engine | None = None
        self.sampler = Sampler(
            len(train_data),
            config.batch_size,
            config.accumulation,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            seed=config.seed,
            weights=sample_weights,
            shard_order=shard_order,
        )
        check_needs(config.optim, engine_class(self.accelerator))
        self.optimizer = build_optimizer(model, config.optim)
        self.schedule = self._schedule(config.epochs)
        self.callbacks = all_callbacks(config, callbacks)
        keyed_state.by_key(self.callbacks)  # refuses a key that is there twice
        check_task(self.task, model, None if val_data is None else config.monitor)

    @property
    def engine(self) -> Engine:
        """The model on its processes, made when it is first asked for; every rank has to ask."""
        if self._engine is None:
            check_ranks(self.config, self.model, {"train_data": self.train_data, "val_data": self.val_data})
            self._emit("on_setup")  # while the model is whole, whoever asks first
            self._engine = build_engine(self.accelerator, self.model, self.optimizer, self.config)
        return self._engine

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return self.sampler.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.state.epoch >= self.config.epochs or self.state.should_stop

    def _schedule(self, epochs: int) -> Schedule:
        return Schedule(self.config.optim.lr, epochs * self.steps_per_epoch, self.config.schedule)

    def fit(self) -> Self:
        """Train to the end of the configured epochs, or until the monitored figure is stale.

        The best weights lie in ``best/`` of the run folder (without a validation figure: the last
        averaged ones), the last ones in ``model``.

        Raises:
            ConfigError: this Trainer has trained already, and an error came before its first checkpoint.
            NonFiniteLossError: too many steps in a row had a loss that is not finite.
            LossSpikeError: the loss rose far above what it was, and ``spike.action`` says to stop.
            InterruptedRunError: some rank was asked to stop; its state is saved.
            CheckpointError: training state cannot be written.
            RunLockedError: another run uses the run folder.
            LoaderWorkerError: a loader process was killed.
            LostPeerError: another rank has ended.
        """
        # Ranks draw different dropout masks; what is shared (order, augmentation) has its own seeds.
        seed_everything(self.config.seed + self.accelerator.process_index)
        try:
            step = OptimizerStep(self.engine, self.task)
            self._emit("on_fit_start")
            self._check_weights()
            self._emit("on_train_start")
            if self.is_finished and self.state.step:
                report_finished(self.run_dir, self.state, self.config.monitor)
            while not self.is_finished:
                self._train_epoch(step)
                if self.val_data is not None:
                    self._validate(self.val_data)
                self.state.epoch += 1
                self.state.step_in_epoch = 0
                # A callback may have stopped the run on one rank only: all stop, or the others would wait.
                asked, stop = self._agreed(self.interrupt_requested, self.state.should_stop)
                self.is_leaving, self.state.should_stop = asked, stop
                self._emit("on_epoch_end")
            self._emit("on_fit_end")
        except BaseException as error:
            told = explained(error)
            self._tell_exception(told)
            if told is error:
                raise
            raise told from error
        return self

    def _check_weights(self) -> None:
        """An earlier ``fit`` that ended with an error may have left its trace."""
        if self._is_off_record:
            raise ConfigError(
                f"this Trainer stopped behind step {self.state.step}, before its first checkpoint, so there "
                "is nothing exact to go on from: make a new model and a new Trainer; "
                "checkpoint.every_steps saves more often"
            )
        if self._engine is not None:
            self._engine.forget_gradients()  # of a step that was not finished

    def _tell_exception(self, error: BaseException) -> None:
        # Backwards: the guards, which came first, hold the run's lock until a background save has ended.
        for callback in reversed(self.callbacks):
            try:
                callback.on_exception(self, error)
            except Exception:  # must hide neither the first error nor it from the other observers
                logger.warning("%s failed behind that error", type(callback).__name__, exc_info=True)

    def averaged(self) -> AbstractContextManager[None]:
        """Run a block with the averaged weights in ``model``; with its own where no average is kept."""
        return weights_to_validate(self, self.callbacks)

    def _train_epoch(self, step: OptimizerStep) -> None:
        state = self.state
        ahead, steps = tee(self.sampler.steps(state.epoch, start=state.step_in_epoch))
        indices = (micro.indices for micro_batches in ahead for micro in micro_batches)
        batches = iter(self._load(self.train_data, indices, state.epoch))
        for micro_batches in steps:
            started = time.perf_counter()
            loaded = [LoadedBatch(next(batches), m.indices, m.is_filler) for m in micro_batches]
            waited = time.perf_counter() - started
            self._is_off_record = True
            result = step(
                loaded, self.schedule.lr_at(state.step), lambda: self.interrupt_requested, self._is_vetoed
            )
            state.step += 1
            state.step_in_epoch += 1
            state.nonfinite_streak = state.nonfinite_streak + 1 if result.skipped and not result.vetoed else 0
            seconds = time.perf_counter() - started
            result = replace(
                result,
                seconds=seconds,
                data_wait=waited / seconds,
                operations=sum(operations_of(self.task, each.batch) for each in loaded if not each.is_filler),
            )
            self._emit("on_step_end", result)

    def _validate(self, data: MapDataset) -> None:
        # Each rank's rows have moved its own batch statistics; all validate with those that are saved.
        broadcast_tensors(moving_buffers(self.model))
        interrupted: PassInterrupted | None = None
        with self.averaged():
            self._emit("on_validation_start")
            try:
                outcome = self._evaluate(data, self._is_interrupted)
                improved = observe(self.state, outcome, data, self.config.monitor)
                self._emit("on_validation_end", outcome.metrics, improved)
            except PassInterrupted as error:  # on all ranks
                interrupted = error
        if interrupted is not None:
            self._emit("on_validation_interrupted")  # what is saved is the state after the epoch's last step
            raise interrupted
        self.state.should_stop |= self._is_stale()  # a callback may have said so before

    def evaluate(self, data: MapDataset) -> PassResult:
        """Loss, figures and per-row tensors of a data set by the weights as they are, in eval mode.

        A collective: every rank takes a share of the rows and gets all results. Modes, buffers and random
        states are afterwards what they were, so a callback may call it in the middle of an epoch.
        """
        return self._evaluate(data)

    def _evaluate(self, data: MapDataset, asked: Callable[[], bool] | None = None) -> PassResult:
        lockstep = self.engine.lockstep  # a first use of the engine looks at the model in train mode
        answers = answer_rows(
            lambda batch: self.task(self.engine.evaluate, batch),
            data,
            batch_size=self.config.batch_size,
            device=self.accelerator.device,
            load=self._load,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
            lockstep=lockstep,
            asked=asked,
        )
        with undisturbed(self.model):
            self.model.eval()
            return summarize(self.task, answers, self.accelerator.device)

    def use_micro_batches(self, batch_size: int) -> None:
        """Deal the rows of every step out in micro-batches of this size; before the engine is made.

        Raises:
            ValueError: it does not divide this rank's rows of a step.
        """
        accumulation, rest = divmod(self.config.batch_size * self.config.accumulation, batch_size)
        if rest:
            raise ValueError(f"micro-batches of {batch_size} rows do not divide a step's rows")
        self.config = replace(self.config, batch_size=batch_size, accumulation=accumulation)
        self.sampler = replace(self.sampler, batch_size=batch_size, accumulation=accumulation)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over whole tensors by name: all trained parameters, and buffers that are among them.

        A collective: every rank gives the same tensors.

        Raises:
            CheckpointError: a trained parameter is missing or has another shape.
        """
        source = WholeTensors(weights)
        self.engine.fill(self.engine.weights(), source, "")
        self.engine.weights_changed()
        source.read({name: b for name, b in self.model.named_buffers() if name in weights})

    def _is_interrupted(self) -> bool:
        """Whether some rank was asked to stop; a collective."""
        return self._agreed(self.interrupt_requested)[0]

    def _agreed(self, *flags: bool) -> list[bool]:
        """Which flags are set on some rank; a collective."""
        return [total > 0 for total in sum_over_ranks(list(map(float, flags)), self.accelerator.device)]

    def _is_stale(self) -> bool:
        return 0 < self.config.patience <= self.state.stale_validations

    def _load(self, data: MapDataset, batches: Iterable[list[int]], epoch: int = 0) -> Iterator[Any]:
        loaded = load_batches(
            data,
            batches,
            seed=self.config.seed,
            epoch=epoch,
            workers=self.config.workers,
            collate=self.collate,
            pin_memory=self.accelerator.device.type == "cuda",
            by_row=self._seeds_rows,
        )
        for batch in loaded:
            self.batches_read += 1
            yield batch

    def _is_vetoed(self, loss: float) -> bool:
        return True in [
            callback.vetoes(self, loss) for callback in self.callbacks
        ]  # every callback sees the loss

    def _emit(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)

    def tell(self, kind: str, figures: dict[str, Any]) -> None:
        """Hand figures to every observer."""
        self._emit("on_figures", kind, figures)

    def rewind(self) -> None:
        """Put weights, moments and averages back to the last checkpoint; all ranks call it together."""
        self._emit("on_rewind")

    def sample_ids(self, rows: Sequence[int]) -> list[str]:
        """Ids of rows of the training data."""
        return [sample_id(self.train_data, row) for row in rows]

    def state_dict(self) -> dict[str, Any]:
        """Loop state, what the order of rows depends on, and every callback's state; JSON-able."""
        return {
            "state": self.state.state_dict(),
            "rows": row_plan(self.sampler, *self._digests),
            "recipe": recipe_of(self.config),
            "epochs": self.config.epochs,
            "seeds_rows": self._seeds_rows,
            "callbacks": keyed_state.state_dicts(self.callbacks),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a :meth:`state_dict` over.

        Raises:
            CheckpointError: the order of rows was another one, so its place in the epoch means nothing.
        """
        keep_recipe(self.config, state.get("recipe"), self.run_dir)
        self.sampler = keep_row_plan(self.sampler, *self._digests, state["rows"], self.run_dir)
        self.state.load_state_dict(state["state"])
        self._seeds_rows = state.get("seeds_rows", False)
        self.schedule = self._schedule(self.config.epochs)
        epochs = state.get("epochs", self.config.epochs)
        report_epochs(epochs, self.config.epochs, self._schedule(epochs), self.schedule, self.state.step)
        self._is_off_record = False
        self.state.should_stop = self._is_stale()  # the patience may be another one now
        keyed_state.load_state_dicts(self.callbacks, state["callbacks"])

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of every callback, by ``key/name``."""
        return keyed_state.tensors(self.callbacks)

    def load_tensors(self, source: TensorSource) -> None:
        """Take :meth:`tensors` over."""
        keyed_state.load_tensors(self.callbacks, source)

    @cached_property
    def _digests(self) -> tuple[str, str]:
        return ids_digest(self.train_data), rows_digest(self.train_data)
