"""Mixing of photos in whole runs: real decoding, real backbone, real processes."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ranks import run, spawn
from support.tiny_run import tiny_arguments, tiny_set
from support.toy import assert_same_tensors, lines, newest_tensors

from roadwork_dist.config.io import parse_experiment
from roadwork_dist.datasets.mix import MixedRows
from roadwork_dist.demo.synthetic.dataset import SyntheticSet
from roadwork_dist.recipes import crossval
from roadwork_dist.recipes.pretrain import build_experiment
from roadwork_dist.trainer.events.callback import Callback

KINDS = {
    "views exchanged": ("--augment.mix=cutmix",),
    "pixels blended": ("--augment.mix=mixup", "--features.mode=online"),
}
SAME_MATHS = ("--model.dropout=0", "--features.dtype=fp32", "--backbone.dtype=fp32")
PARTS = ("loss", "loss/focal", "loss/consistency", "loss/weather", "loss/dice")


class DieAt(Callback):
    """SIGKILL after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, run: Any, result: Any) -> None:
        if run.state.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(data: SyntheticSet, folder: Path, *overrides: str, die_at: int | None = None) -> Path:
    """Two epochs of two steps of four rows each, drawn by place with replacement."""
    given = [*tiny_arguments(data, folder), f"--features.dir={Path(data.train).parent / 'features'}"]
    given += ["--views.policy=all", "--views.size=64", "--epochs=2", "--checkpoint.every_steps=1"]
    given += ["--augment.mix_alpha=1", *SAME_MATHS, *overrides]
    trainer = build_experiment(parse_experiment(given)).trainer
    if die_at is not None:
        trainer.callbacks.insert(0, DieAt(die_at))
    trainer.fit()
    return folder / "run"


def train_and_die(data: SyntheticSet, folder: Path, *overrides: str) -> None:
    train(data, folder, *overrides, die_at=3)


def figures(run_dir: Path) -> list[dict[str, Any]]:
    """Figures of training and validation, step by step."""
    return [line for line in lines(run_dir) if line["kind"] in ("train", "val")]


def losses(run_dir: Path) -> torch.Tensor:
    """Every loss of training, parts and all, step by step."""
    steps = [line for line in figures(run_dir) if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    return torch.tensor([[line.get(part, 0.0) for part in PARTS] for line in steps])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SyntheticSet:
    return tiny_set(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module", params=KINDS)
def mixed(
    request: pytest.FixtureRequest, data: SyntheticSet, tmp_path_factory: pytest.TempPathFactory
) -> tuple[tuple[str, ...], Path]:
    """How photos are mixed, and an undisturbed run of one process."""
    overrides = KINDS[request.param]
    (run_dir,) = run(train, data, tmp_path_factory.mktemp("mixed"), *overrides)
    return overrides, run_dir


def test_processes_accumulation_and_workers_change_nothing(
    data: SyntheticSet, tmp_path: Path, mixed: tuple[tuple[str, ...], Path]
) -> None:
    overrides, whole = mixed
    dealt = ("--batch_size=1", "--accumulation=2", "--workers=1")
    parts, _ = run(train, data, tmp_path, *overrides, *dealt, world_size=2)
    torch.testing.assert_close(losses(parts), losses(whole), rtol=0, atol=5e-6)


def test_killed_while_mixing_and_started_again_it_ends_the_same(
    data: SyntheticSet, tmp_path: Path, mixed: tuple[tuple[str, ...], Path]
) -> None:
    overrides, whole = mixed
    (killed,) = spawn(train_and_die, data, tmp_path, *overrides)
    assert killed.code == -signal.SIGKILL, killed.error
    (torn,) = run(train, data, tmp_path, *overrides)
    assert figures(torn) == figures(whole)
    assert_same_tensors(newest_tensors(torn), newest_tensors(whole))


def test_training_photos_are_mixed_and_no_others(data: SyntheticSet, tmp_path: Path) -> None:
    config = parse_experiment([*tiny_arguments(data, tmp_path), "--augment.mix=mixup"])
    experiment = build_experiment(config)
    rows = experiment.trainer.train_data
    assert isinstance(rows, MixedRows)
    chances = np.diff(rows._cumulative, prepend=0.0)
    np.testing.assert_allclose(chances, experiment.trainer.sampler.weights)  # partners by place, too
    assert len(set(chances)) > 1
    assert not any(isinstance(dataset, MixedRows) for dataset in experiment.datasets.values())
    assert experiment.trainer.val_data is experiment.datasets["val"]


def test_a_fold_mixes_none_of_the_photos_it_holds_out(data: SyntheticSet, tmp_path: Path) -> None:
    given = [*tiny_arguments(data, tmp_path), "--data.val=null", "--data.target=null", "--data.folds=2"]
    config = parse_experiment([*given, "--augment.mix=mixup"])
    whole = crossval.build_crossval(config)
    for fold in range(2):
        rows = crossval.fold_trainer(whole, fold).train_data
        assert isinstance(rows, MixedRows)
        read = [rows.dataset[k]["index"] for k in range(len(rows))]
        assert (whole.fold_of_row[read] != fold).all()
        assert sorted(read) == (whole.fold_of_row != fold).nonzero()[0].tolist()
