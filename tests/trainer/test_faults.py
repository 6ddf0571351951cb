"""Losses that are not finite, disks that are full, data that stops."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import run, spawn
from support.toy import lines, toy_config, toy_data, toy_model
from torch.utils.data import TensorDataset

from roadwork_dist.common.errors import CheckpointError, ConfigError, NonFiniteLossError
from roadwork_dist.trainer.checkpoint import checkpoint_store
from roadwork_dist.trainer.checkpoint.checkpoint_store import CheckpointStore
from roadwork_dist.trainer.config import OptimConfig
from roadwork_dist.trainer.trainer import Trainer


class NamedData(TensorDataset):
    """Rows with ids."""

    def sample_id(self, index: int) -> str:
        return f"photo-{index}"


def poisoned_data(rows: int, bad: list[int]) -> NamedData:
    inputs, labels = toy_data(rows).tensors
    inputs[bad] = float("nan")
    return NamedData(inputs, labels)


def train_poisoned(run_dir: Path, world_size: int) -> list[torch.Tensor]:
    config = toy_config(run_dir, epochs=1, batch_size=8 // world_size)
    trainer = Trainer(toy_model(), config, poisoned_data(40, [5])).fit()
    return [p.detach() for p in trainer.model.parameters()]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_nan_on_one_rank_skips_the_step_on_all(tmp_path: Path, world_size: int) -> None:
    results = run(train_poisoned, tmp_path, world_size, world_size=world_size)
    skipped = [line for line in lines(tmp_path) if line["kind"] == "skip"]
    assert len(skipped) == 1
    assert "photo-5" in skipped[0]["samples"]
    # Only the micro-batch of the rank that holds the row is named.
    assert len(skipped[0]["samples"]) == 8 // world_size
    assert skipped[0]["loss"] == "nan"
    assert [line["kind"] for line in lines(tmp_path)].count("train") == 4
    for parameters in results:
        for parameter, other in zip(parameters, results[0], strict=True):
            assert parameter.isfinite().all()
            assert torch.equal(parameter, other)


def test_too_many_skips_in_a_row_stop_with_the_samples(tmp_path: Path) -> None:
    config = toy_config(tmp_path, batch_size=4, max_nonfinite_steps=3)
    trainer = Trainer(toy_model(), config, poisoned_data(32, list(range(32))))
    with pytest.raises(
        NonFiniteLossError, match=r"not finite in 3 steps in a row .*photo-\d+.* lower optim.lr"
    ):
        trainer.fit()
    assert len(lines(tmp_path)) == 3
    assert CheckpointStore(tmp_path / "checkpoints").newest() is None


def test_an_infinite_gradient_is_skipped_too(tmp_path: Path) -> None:
    model = toy_model()
    model[0].weight.register_hook(lambda gradient: gradient * float("inf"))
    trainer = Trainer(model, toy_config(tmp_path, max_nonfinite_steps=2), toy_data(64))
    before = model[4].weight.detach().clone()
    with pytest.raises(NonFiniteLossError):
        trainer.fit()
    assert torch.equal(model[4].weight, before)


def fill_the_disk_after(saves: int) -> None:
    seal, calls = checkpoint_store._seal, iter(range(99))

    def full(folder: Path, files: checkpoint_store.Files) -> None:
        if next(calls) >= saves:
            raise OSError(errno.ENOSPC, "No space left on device")
        seal(folder, files)

    checkpoint_store._seal = full


def train_on_a_full_disk(run_dir: Path) -> str:
    fill_the_disk_after(2)
    trainer = Trainer(toy_model(), toy_config(run_dir, epochs=9), toy_data(16))
    with pytest.raises(CheckpointError) as caught:
        trainer.fit()
    return str(caught.value)


def test_a_full_disk_while_saving_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    (message,) = run(train_on_a_full_disk, tmp_path)
    assert "No space left on device" in message
    assert "the last good one is step-00000002" in message
    newest = CheckpointStore(tmp_path / "checkpoints").newest()
    assert newest is not None
    assert newest.name == "step-00000002"
    assert not list((tmp_path / "checkpoints").glob(".tmp*"))


def test_an_unwritable_folder_is_told_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trainer = Trainer(toy_model(), toy_config(tmp_path / "file" / "run"), toy_data(16))
    with pytest.raises(ConfigError, match=r"output_dir .*file/run cannot be written to \(Not a directory\)"):
        trainer.fit()


def test_unknown_figures_nothing_trainable_and_no_rows_are_told_at_once(tmp_path: Path) -> None:
    config = toy_config(tmp_path, monitor="mc")
    with pytest.raises(ConfigError, match="monitor is 'mc', but this task's figures are loss, mcc, accuracy"):
        Trainer(toy_model(), config, toy_data(8), toy_data(8))
    with pytest.raises(ConfigError, match="no parameter that requires a gradient"):
        Trainer(toy_model().requires_grad_(False), toy_config(tmp_path), toy_data(8))
    with pytest.raises(ConfigError, match="has 0 rows"):
        Trainer(toy_model(), toy_config(tmp_path), [])
    with pytest.raises(ConfigError, match="unknown optimizer 'adamv': did you mean 'adamw'"):
        Trainer(toy_model(), toy_config(tmp_path, optim=OptimConfig(name="adamv")), toy_data(8))


def test_early_stopping_counts_validations_without_a_better_figure(tmp_path: Path) -> None:
    config = toy_config(tmp_path, epochs=30, patience=3, optim=OptimConfig(lr=1e-12))
    trainer = Trainer(toy_model(), config, toy_data(16), toy_data(16)).fit()
    assert trainer.state.epoch == 4  # the first is the best, three are not better


def die_in_rank_one(run_dir: Path) -> None:
    class Fails(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            if os.environ["RANK"] == "1":
                raise RuntimeError("this rank's disk is gone")
            return super().__getitem__(index)

    import os

    Trainer(toy_model(), toy_config(run_dir), Fails(*toy_data(16).tensors)).fit()


def test_a_failing_rank_is_an_error_not_a_hang(tmp_path: Path) -> None:
    exits = spawn(die_in_rank_one, tmp_path, world_size=2)
    assert all(e.code != 0 for e in exits)
    assert "this rank's disk is gone" in exits[1].error
