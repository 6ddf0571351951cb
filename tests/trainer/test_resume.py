"""Killed at any moment and started again, a run ends as if nothing had happened."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from support.ranks import run, spawn
from support.toy import NoisyData, assert_same_tensors, lines, newest_tensors, toy_config, toy_data, toy_model

from roadwork_dist.common.errors import CheckpointError, ConfigError
from roadwork_dist.trainer.checkpoint import checkpoint_store
from roadwork_dist.trainer.events.callback import Callback
from roadwork_dist.trainer.task import ClassificationTask, TaskOutput
from roadwork_dist.trainer.trainer import Trainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillingTask(ClassificationTask):
    """Dies in the n-th forward pass in training, or in the m-th in validation."""

    def __init__(self, train_pass: int = -1, val_pass: int = -1) -> None:
        self.left = {True: train_pass, False: val_pass}

    def __call__(self, model: Any, batch: Any) -> TaskOutput:
        mode = model.training
        self.left[mode] -= 1
        if self.left[mode] == 0:
            die()
        return super().__call__(model, batch)


class KillBetweenEpochs(Callback):
    """Dies after the validation of an epoch, before its checkpoint."""

    def on_epoch_end(self, run: Any) -> None:
        if run.state.epoch == 2:
            die()


def train(run_dir: Path, moment: str = "") -> None:
    """Dropout, augmentation in workers, average, accumulation; dies at ``moment``."""
    task, callbacks = ClassificationTask(), []
    if moment == "in a step":
        task = KillingTask(train_pass=14)  # second micro-batch of a step of the second epoch
    elif moment == "in validation":
        task = KillingTask(val_pass=3)
    elif moment == "between epochs":
        callbacks = [KillBetweenEpochs()]
    elif moment == "while saving":
        seal, calls = checkpoint_store._seal, iter(range(99))
        checkpoint_store._seal = lambda *files: die() if next(calls) == 3 else seal(*files)
    elif moment == "before the first checkpoint":
        task = KillingTask(train_pass=2)
    config = toy_config(run_dir, epochs=3, batch_size=4, accumulation=2, workers=1)
    data, val = NoisyData(44), toy_data(20, seed=2)
    Trainer(toy_model(dropout=0.3), config, data, val, task=task, callbacks=callbacks).fit()


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(train, folder, world_size=request.param)
    return request.param, lines(folder), newest_tensors(folder)


@pytest.mark.parametrize(
    "moment",
    ["in a step", "while saving", "in validation", "between epochs", "before the first checkpoint"],
)
def test_killed_run_ends_like_an_undisturbed_one(undisturbed: Any, moment: str, tmp_path: Path) -> None:
    world_size, expected_lines, expected_tensors = undisturbed
    exits = spawn(train, tmp_path, moment, world_size=world_size)
    assert any(e.code == -signal.SIGKILL for e in exits), exits
    run(train, tmp_path, world_size=world_size)
    assert lines(tmp_path) == expected_lines
    assert_same_tensors(newest_tensors(tmp_path), expected_tensors)
    steps = [line["step"] for line in lines(tmp_path) if line["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))


def test_killed_at_random_moments_again_and_again(undisturbed: Any, tmp_path: Path) -> None:
    world_size, expected_lines, expected_tensors = undisturbed
    for delay in (0.13, 0.29, 0.41, 0.23):
        spawn(train_and_be_killed, tmp_path, delay, world_size=world_size)
    run(train, tmp_path, world_size=world_size)
    assert lines(tmp_path) == expected_lines
    assert_same_tensors(newest_tensors(tmp_path), expected_tensors)


def train_and_be_killed(run_dir: Path, delay: float) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process as abruptly as SIGKILL does
    signal.setitimer(signal.ITIMER_REAL, delay)
    train(run_dir)


def test_a_finished_run_started_again_changes_nothing(tmp_path: Path) -> None:
    run(train, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    run(train, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_resume_never_refuses_to_overwrite(tmp_path: Path) -> None:
    Trainer(toy_model(), toy_config(tmp_path, epochs=1), toy_data(16)).fit()
    again = Trainer(toy_model(), toy_config(tmp_path, epochs=1, resume="never"), toy_data(16))
    with pytest.raises(ConfigError, match=r"resume is 'never' but .* holds the checkpoint step-"):
        again.fit()
    for manifest in tmp_path.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    with pytest.raises(ConfigError, match=r"resume is 'never' but .* holds the checkpoint step-"):
        again.fit()


def test_another_order_of_rows_is_refused(tmp_path: Path) -> None:
    Trainer(toy_model(), toy_config(tmp_path, epochs=1), toy_data(16)).fit()
    with pytest.raises(CheckpointError, match="seed was 42, is 43"):
        Trainer(toy_model(), toy_config(tmp_path, epochs=2, seed=43), toy_data(16)).fit()


def test_other_frozen_weights_are_refused(tmp_path: Path) -> None:
    def frozen_model(value: float) -> Any:
        model = toy_model()
        model[0].requires_grad_(False).weight.data.fill_(value)
        return model

    Trainer(frozen_model(0.5), toy_config(tmp_path, epochs=1), toy_data(16)).fit()
    stored = newest_tensors(tmp_path)
    assert not any("model/0.weight" in name for name in stored)
    with pytest.raises(CheckpointError, match="other frozen weights"):
        Trainer(frozen_model(0.6), toy_config(tmp_path, epochs=2), toy_data(16)).fit()
