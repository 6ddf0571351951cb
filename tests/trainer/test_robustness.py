"""Unusual models, data sets, tasks and moments."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.ranks import run
from support.toy import (
    NoisyData,
    Stop,
    StopAt,
    assert_same_tensors,
    lines,
    newest_tensors,
    toy_config,
    toy_data,
    toy_model,
)
from torch import Tensor, nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from roadwork_dist.common.errors import CheckpointError, ConfigError, LoaderWorkerError
from roadwork_dist.trainer.callbacks.averaging import EmaCallback
from roadwork_dist.trainer.checkpoint.weights import frozen_identity
from roadwork_dist.trainer.config import (
    CheckpointConfig,
    EmaConfig,
    OptimConfig,
    TrackingConfig,
    WandbConfig,
)
from roadwork_dist.trainer.engine.accelerator import build_accelerator
from roadwork_dist.trainer.engine.base import TensorSource, trained_parameters
from roadwork_dist.trainer.events.callback import Callback
from roadwork_dist.trainer.feed.loader import load_batches
from roadwork_dist.trainer.optim.ema import ExponentialMovingAverage
from roadwork_dist.trainer.task import ClassificationTask
from roadwork_dist.trainer.trainer import Trainer


def assert_interrupted_equals_whole(
    folder: Path, stop: int, fit: Callable[..., Trainer]
) -> tuple[Path, Path]:
    """Run folders of a run that crashed and went on, and of one that never did."""
    with pytest.raises(Stop):
        fit(folder / "cut", StopAt(stop))
    fit(folder / "cut")
    fit(folder / "whole")
    assert lines(folder / "cut") == lines(folder / "whole")
    assert_same_tensors(newest_tensors(folder / "cut"), newest_tensors(folder / "whole"))
    return folder / "cut", folder / "whole"


# --- Resume ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [2, 4, 5, 6, 8])
def test_saving_every_few_steps_need_not_divide_the_epoch(tmp_path: Path, stop: int) -> None:
    def fit(run_dir: Path, *callbacks: Callback) -> Trainer:
        config = toy_config(run_dir, batch_size=8, checkpoint=CheckpointConfig(every_steps=3))
        data = NoisyData(40)  # 5 steps an epoch, saved after 3, 5, 6, 9 and 10
        return Trainer(toy_model(0.3), config, data, toy_data(9), callbacks=callbacks).fit()

    assert_interrupted_equals_whole(tmp_path, stop, fit)


def test_random_collation_resumes_exactly(tmp_path: Path) -> None:
    def mix(rows: list[Any]) -> Any:
        inputs, labels = default_collate(rows)
        return inputs + torch.randn(6) + random.random() + np.random.rand(), labels

    def fit(run_dir: Path, *callbacks: Callback) -> Trainer:
        config = toy_config(run_dir, batch_size=8, workers=1, ema=EmaConfig(enabled=False))
        data = toy_data(40)
        return Trainer(toy_model(), config, data, collate=mix, callbacks=callbacks).fit()

    assert_interrupted_equals_whole(tmp_path, 4, fit)


class Counts(Callback):
    """Remembers a number of its own."""

    def __init__(self, by: int, key: str = "") -> None:
        self.by, self.value, self.seen, self.key = by, 0, torch.zeros(1), key

    def on_step_end(self, run: Any, result: Any) -> None:
        self.value += self.by
        self.seen += self.by

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state.get("value", 0)

    def tensors(self) -> dict[str, Tensor]:
        return {"seen": self.seen}

    def load_tensors(self, source: TensorSource) -> None:
        source.read({"seen": self.seen})


def test_two_callbacks_of_one_class_keep_their_own_state(tmp_path: Path) -> None:
    def fit(epochs: int) -> list[Counts]:
        own = [Counts(1), Counts(10, key="tenfold")]
        Trainer(toy_model(), toy_config(tmp_path, epochs=epochs), toy_data(32), callbacks=own).fit()
        return own

    fit(1)
    once, tenfold = fit(2)
    assert (once.value, tenfold.value) == (4, 40)
    assert (once.seen.item(), tenfold.seen.item()) == (4, 40)


def test_early_stopping_counts_on_over_a_resume(tmp_path: Path) -> None:
    def fit(run_dir: Path, *callbacks: Callback) -> Trainer:
        config = toy_config(run_dir, epochs=9, patience=2)
        return Trainer(toy_model(), config, toy_data(16), AllNan(), task=NanTask(), callbacks=callbacks).fit()

    assert_interrupted_equals_whole(tmp_path, 2, fit)
    finished = fit(tmp_path / "cut")
    assert finished.state.epoch == 2
    assert finished.state.should_stop


def test_a_refused_start_leaves_the_folder_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Trainer(toy_model(), toy_config(tmp_path, epochs=1), toy_data(16)).fit()
    before = (tmp_path / "config.yaml").read_bytes()
    capsys.readouterr()
    tracking = TrackingConfig(wandb=WandbConfig(mode="offline"))
    for changes in ({"resume": "never"}, {"seed": 1}):
        config = toy_config(tmp_path, epochs=2, tracking=tracking, **changes)
        with pytest.raises((ConfigError, CheckpointError)):
            Trainer(toy_model(), config, toy_data(16)).fit()
        assert (tmp_path / "config.yaml").read_bytes() == before
        assert not (tmp_path / "wandb").exists()
        assert "training" not in capsys.readouterr().out


def test_other_sampling_weights_are_another_order_of_rows(tmp_path: Path) -> None:
    def trainer(weights: list[float] | None) -> Trainer:
        return Trainer(toy_model(), toy_config(tmp_path, epochs=1), toy_data(4), sample_weights=weights)

    trainer([1.0, 2.0, 3.0, 4.0]).fit()
    trainer([1.0, 2.0, 3.0, 4.0]).fit()
    for other in ([1.0, 2.0, 3.0, 5.0], None):
        with pytest.raises(CheckpointError, match="sampling weights"):
            trainer(other).fit()


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_weights_that_cannot_be_drawn_from_are_told_at_once(tmp_path: Path, weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="sampling weight"):
        Trainer(toy_model(), toy_config(tmp_path), toy_data(2), sample_weights=weights)


# --- Models ---------------------------------------------------------------------------------------


def batch_norm_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 2))


def test_batch_statistics_resume_exactly(tmp_path: Path) -> None:
    def fit(run_dir: Path, *callbacks: Callback) -> Trainer:
        config = toy_config(run_dir, batch_size=8)
        return Trainer(batch_norm_model(), config, toy_data(40), toy_data(9), callbacks=callbacks).fit()

    assert_interrupted_equals_whole(tmp_path, 4, fit)


def test_a_skipped_step_leaves_batch_statistics_alone(tmp_path: Path) -> None:
    inputs, labels = toy_data(32).tensors
    inputs[5] = float("nan")
    model = batch_norm_model()
    Trainer(model, toy_config(tmp_path, epochs=1), TensorDataset(inputs, labels), toy_data(8)).fit()
    assert [line["kind"] for line in lines(tmp_path)].count("skip") == 1
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert model[1].num_batches_tracked == 1


class Centred(nn.Module):
    """Puts a new tensor in the place of its running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 2)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * inputs.mean(0)
        return self.dense(inputs - self.mean)


def test_a_skipped_step_leaves_a_buffer_that_the_model_replaces_alone(tmp_path: Path) -> None:
    inputs, labels = toy_data(64).tensors
    inputs[5] = float("nan")
    model = Centred()
    Trainer(model, toy_config(tmp_path, epochs=1), TensorDataset(inputs, labels)).fit()
    assert [line["kind"] for line in lines(tmp_path)].count("skip") == 1
    assert model.mean.isfinite().all()
    assert model.mean.any()


class ValidationOf(Callback):
    """Remembers figures and batch statistics at the end of validation."""

    def on_validation_end(self, run: Any, metrics: dict[str, float], improved: bool) -> None:
        self.metrics = metrics
        self.buffers = {name: buffer.clone() for name, buffer in run.model.named_buffers()}


def validate_batch_norm(run_dir: Path) -> dict[str, Tensor]:
    seen = ValidationOf()
    config = toy_config(run_dir, epochs=1, batch_size=4)
    Trainer(batch_norm_model(), config, toy_data(24), toy_data(9), callbacks=[seen]).fit()
    return seen.buffers


def test_all_ranks_validate_with_the_same_batch_statistics(tmp_path: Path) -> None:
    first, second = run(validate_batch_norm, tmp_path, world_size=2)
    assert_same_tensors(first, second)


class Tied(nn.Module):
    """Input and output weights are one, and two parts share a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.last.weight = self.first.weight
        shared = torch.ones(6)
        self.first.register_buffer("scale", shared)
        self.last.register_buffer("scale", shared)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.first(inputs) * self.first.scale)[:, :2]


def test_shared_weights_and_buffers_are_saved_and_resumed(tmp_path: Path) -> None:
    def fit(run_dir: Path, *callbacks: Callback) -> Trainer:
        return Trainer(Tied(), toy_config(run_dir), toy_data(48), toy_data(9), callbacks=callbacks).fit()

    _, whole = assert_interrupted_equals_whole(tmp_path, 4, fit)
    fresh = Tied()
    fresh.load_state_dict(load_file(whole / "best" / "model.safetensors"))


def test_shared_weights_that_learn_are_not_taken_for_frozen_ones() -> None:
    model = Tied()
    before = frozen_identity(model)
    with torch.no_grad():
        model.first.weight.add_(1)
    assert frozen_identity(model) == before


def test_averaging_bf16_weights_keeps_the_fp32_average_through_validation() -> None:
    model = toy_model().bfloat16()
    average = ExponentialMovingAverage(trained_parameters(model), EmaConfig(decay=0.9, warmup=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    average.update()
    shadow = {name: tensor.clone() for name, tensor in average.shadow().items()}
    raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with average.average_parameters():
        assert_same_tensors(average.shadow(), shadow)
    assert_same_tensors(average.shadow(), shadow)
    assert_same_tensors(dict(model.state_dict()), raw)


def test_a_model_that_keeps_a_part_in_eval_mode_is_respected(tmp_path: Path) -> None:
    class KeepsStatistics(nn.Sequential):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self[1].eval()
            return self

    model = KeepsStatistics(*batch_norm_model())
    Trainer(model, toy_config(tmp_path), toy_data(32), toy_data(8)).fit()
    assert model[1].num_batches_tracked == 0
    assert not any("running" in name for name in newest_tensors(tmp_path) if "/model/" in name)


# --- Data -----------------------------------------------------------------------------------------


class Epochs:
    """A row is the epoch it is read in."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return self.epoch

    def sample_id(self, row: int) -> str:
        return f"photo-{row}"


def test_wrapped_data_sets_are_told_the_epoch() -> None:
    wrapped = ConcatDataset([Subset(Subset(Epochs(), [5, 6, 7]), [2]), Epochs()])  # type: ignore[arg-type]
    (batch,) = load_batches(wrapped, [[0, 1]], epoch=3)
    assert batch.tolist() == [3, 3]


def test_rows_of_a_part_are_told_by_the_ids_of_the_whole(tmp_path: Path) -> None:
    part = Subset(Subset(Epochs(), [5, 6, 7]), [2, 0])  # type: ignore[arg-type]
    trainer = Trainer(toy_model(), toy_config(tmp_path), part)
    assert trainer.sample_ids([0, 1]) == ["photo-7", "photo-5"]


class Named(TensorDataset):
    """Rows with ids of their own."""

    def __init__(self, ids: list[str]) -> None:
        super().__init__(*toy_data(len(ids)).tensors)
        self.ids = ids

    def sample_id(self, row: int) -> str:
        return self.ids[row]


def test_other_rows_of_the_same_number_are_noticed(tmp_path: Path) -> None:
    def fit(data: Any) -> None:
        Trainer(toy_model(), toy_config(tmp_path, epochs=1), data).fit()

    fit(Named(list("abcd")))
    fit(Subset(Named(list("xabcd")), [1, 2, 3, 4]))
    others = Named(list("abce")), Named(list("abdc")), Subset(Named(list("abcd")), [1, 0, 2, 3])
    for other in (*others, toy_data(4)):
        with pytest.raises(CheckpointError, match="digest of the rows' ids was"):
            fit(other)


def train_few_rows(run_dir: Path, rows: int) -> tuple[dict[str, Tensor], list[int]]:
    config = toy_config(run_dir, batch_size=2, accumulation=2, epochs=2)
    trainer = Trainer(toy_model(), config, toy_data(rows), toy_data(1)).fit()
    return {n: t.detach() for n, t in trainer.model.named_parameters()}, [trainer.state.step]


@pytest.mark.parametrize("rows", [1, 2])
def test_fewer_rows_than_processes(tmp_path: Path, rows: int) -> None:
    ((alone, _),) = run(train_few_rows, tmp_path / "one", rows)
    for got, steps in run(train_few_rows, tmp_path / "three", rows, world_size=3):
        assert steps == [2]
        for name, tensor in alone.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-6, msg=name)


class Endless(IterableDataset[Any]):
    """A stream."""

    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.parametrize("data", [Endless(), DataLoader(toy_data(8)), iter([1])])
def test_data_without_numbered_rows_are_refused(tmp_path: Path, data: Any) -> None:
    told = f"is of type {type(data).__name__}, expected a map-style data set"
    with pytest.raises(ConfigError, match=f"train_data {told}"):
        Trainer(toy_model(), toy_config(tmp_path), data)
    with pytest.raises(ConfigError, match=f"val_data {told}"):
        Trainer(toy_model(), toy_config(tmp_path), toy_data(8), data)


def test_an_empty_validation_set_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="validation data set has 0 rows"):
        Trainer(toy_model(), toy_config(tmp_path), toy_data(8), toy_data(0))


class Dies(TensorDataset):
    """Its worker is killed, as by a machine without memory."""

    def __getitem__(self, index: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_worker_is_an_error_not_a_hang(tmp_path: Path) -> None:
    trainer = Trainer(toy_model(), toy_config(tmp_path, workers=1), Dies(*toy_data(16).tensors))
    with pytest.raises(LoaderWorkerError, match="loader process"):
        trainer.fit()


# --- Figures --------------------------------------------------------------------------------------


class AllNan(TensorDataset):
    """Rows that no model can say anything of."""

    def __init__(self) -> None:
        inputs, labels = toy_data(8).tensors
        super().__init__(inputs, labels)


class NanTask(ClassificationTask):
    """A figure that is never a number."""

    def metrics(self, rows: Any) -> dict[str, float]:
        return {"mcc": float("nan"), "accuracy": float("nan")}


class NumpyTask(ClassificationTask):
    """Figures as numpy and torch give them."""

    def metrics(self, rows: Any) -> dict[str, Any]:
        return {"mcc": np.float32(0.25), "accuracy": torch.tensor(0.5)}


def test_figures_of_numpy_and_torch_are_numbers(tmp_path: Path) -> None:
    Trainer(toy_model(), toy_config(tmp_path, epochs=1), toy_data(16), toy_data(8), task=NumpyTask()).fit()
    assert [(line["mcc"], line["accuracy"]) for line in lines(tmp_path) if line["kind"] == "val"] == [
        (0.25, 0.5)
    ]


class NoTargets(ClassificationTask):
    """Validation rows have no target."""

    def count(self, batch: Any) -> dict[str, int]:
        return {"cross_entropy": len(batch[1]) if len(batch[1]) == 16 else 0}


def test_a_validation_loss_without_any_target_is_not_the_best(tmp_path: Path) -> None:
    config = toy_config(tmp_path, epochs=1, monitor="-loss")
    trainer = Trainer(toy_model(), config, toy_data(16), toy_data(8), task=NoTargets()).fit()
    assert [line["loss"] for line in lines(tmp_path) if line["kind"] == "val"] == ["nan"]
    assert trainer.state.best is None


@pytest.mark.parametrize("validated", [False, True], ids=["no validation", "figures are never numbers"])
def test_without_a_best_the_last_average_is_kept(tmp_path: Path, validated: bool) -> None:
    trainer = Trainer(
        toy_model(),
        toy_config(tmp_path),
        toy_data(32),
        toy_data(8) if validated else None,
        task=NanTask() if validated else None,
    )
    trainer.fit()
    stored = load_file(tmp_path / "best" / "model.safetensors")
    (average,) = [c.average for c in trainer.callbacks if isinstance(c, EmaCallback)]
    assert average is not None
    shadow = {name: tensor for name, tensor in average.shadow().items() if name in stored}
    assert_same_tensors(stored, shadow)
    assert any(not torch.equal(stored[n], p) for n, p in trainer.model.named_parameters())


def test_a_figure_that_is_no_number_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Trainer(toy_model(), toy_config(tmp_path, epochs=1), toy_data(16), toy_data(8), task=NanTask()).fit()
    assert "mcc of the validation at step 1 is not a number" in caplog.text


# --- Ends -----------------------------------------------------------------------------------------


class InterruptedTask(ClassificationTask):
    """Ctrl-C in validation."""

    def metrics(self, rows: Any) -> dict[str, float]:
        raise KeyboardInterrupt


def test_an_interrupted_validation_gives_the_weights_back(tmp_path: Path) -> None:
    class Keep(Callback):
        def on_step_end(self, run: Any, result: Any) -> None:
            self.weights = {n: p.detach().clone() for n, p in run.model.named_parameters()}

    keep = Keep()
    data = toy_data(32), toy_data(8)
    trainer = Trainer(toy_model(), toy_config(tmp_path), *data, task=InterruptedTask(), callbacks=[keep])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert_same_tensors(dict(trainer.model.named_parameters()), keep.weights)


class FailsOnce(ClassificationTask):
    """Its n-th forward pass fails, in the middle of an optimizer step."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.calls_left = call

    def __call__(self, *arguments: Any) -> Any:
        self.calls_left -= 1
        if self.calls_left == 0:
            raise Stop
        return super().__call__(*arguments)


def test_fit_again_behind_an_error_goes_on_exactly(tmp_path: Path) -> None:
    def trainer(run_dir: Path, call: int = 0) -> Trainer:
        config = toy_config(run_dir, batch_size=8, accumulation=2)
        return Trainer(toy_model(0.1), config, toy_data(64), toy_data(9), task=FailsOnce(call))

    whole, cut = trainer(tmp_path / "whole").fit(), trainer(tmp_path / "cut", call=8)
    with pytest.raises(Stop):
        cut.fit()
    cut.fit()
    assert_same_tensors(dict(cut.model.named_parameters()), dict(whole.model.named_parameters()))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_fit_again_without_a_checkpoint_is_refused_and_cuts_nothing(tmp_path: Path) -> None:
    trainer = Trainer(toy_model(), toy_config(tmp_path), toy_data(64), callbacks=[StopAt(1)])
    with pytest.raises(Stop):
        trainer.fit()
    before = lines(tmp_path)
    assert [line["step"] for line in before] == [1]
    for _ in range(2):
        with pytest.raises(ConfigError, match="stopped behind step 1, before its first checkpoint"):
            trainer.fit()
    assert lines(tmp_path) == before


class SeesTheLock(Callback):
    """Looks for the run's lock when the run has failed."""

    locked = False

    def on_exception(self, run: Any, error: BaseException) -> None:
        self.locked = (run.run_dir / "run.lock").exists()


def test_the_lock_is_given_back_behind_everything_else(tmp_path: Path) -> None:
    sees = SeesTheLock()
    with pytest.raises(Stop):
        Trainer(toy_model(), toy_config(tmp_path), toy_data(64), callbacks=[StopAt(1), sees]).fit()
    assert sees.locked  # a save in the background still wrote into the folder
    assert not (tmp_path / "run.lock").exists()


class FailsToClose(Callback):
    """Its end fails too."""

    def on_exception(self, run: Any, error: BaseException) -> None:
        raise OSError("cannot close")


def test_an_observer_that_fails_at_the_end_hides_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Closed(Callback):
        is_told = False

        def on_exception(self, run: Any, error: BaseException) -> None:
            self.is_told = True

    closed = Closed()
    own = [StopAt(1), FailsToClose(), closed]
    with pytest.raises(Stop):
        Trainer(toy_model(), toy_config(tmp_path), toy_data(32), callbacks=own).fit()
    assert closed.is_told
    assert "cannot close" in caplog.text


# --- Devices --------------------------------------------------------------------------------------


def test_another_device_in_the_same_process_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import AcceleratorState, PartialState

    build_accelerator(device="cpu")
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        monkeypatch.setitem(shared, "device", torch.device("cuda", 0))  # as after training on a GPU
        monkeypatch.setitem(shared, "_cpu", False)
    assert build_accelerator(device="cpu").device.type == "cpu"


def test_a_larger_patience_goes_on_after_an_early_stop(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 6, "optim": OptimConfig(lr=1e-12)}
    first = Trainer(
        toy_model(), toy_config(tmp_path, patience=1, **settings), toy_data(16), toy_data(16)
    ).fit()
    assert first.state.epoch == 2
    again = Trainer(
        toy_model(), toy_config(tmp_path, patience=3, **settings), toy_data(16), toy_data(16)
    ).fit()
    assert again.state.epoch == 4


class Enough(Callback):
    """Says in an event of the first epoch that the run has trained enough."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self.stop)

    def stop(self, run: Any, *_: Any) -> None:
        run.state.should_stop = True


@pytest.mark.parametrize("event", ["on_step_end", "on_validation_end", "on_epoch_end"])
def test_an_observer_may_end_the_run_behind_the_epoch(tmp_path: Path, event: str) -> None:
    config = toy_config(tmp_path, epochs=3)
    trainer = Trainer(toy_model(), config, toy_data(16), toy_data(8), callbacks=[Enough(event)]).fit()
    assert trainer.state.epoch == 1
