"""What a run is resumed with: its own recipe and its own rows, on all ranks the same."""

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import run
from support.toy import lines, toy_config, toy_data, toy_model, weights
from torch.utils.data import ConcatDataset, Subset, TensorDataset, random_split

from roadwork_dist import OptimConfig, ScheduleConfig, TrackingConfig, TrainConfig, Trainer
from roadwork_dist.common.errors import CheckpointError, ConfigError
from roadwork_dist.config.experiment import ExperimentConfig
from roadwork_dist.trainer.feed.dataset import rows_digest
from roadwork_dist.trainer.recipe import recipe_of


def config_of(run_dir: Path, **changes: Any) -> TrainConfig:
    return toy_config(run_dir, tracking=TrackingConfig(progress=False), **changes)


def fit(run_dir: Path, data: Any = None, **changes: Any) -> Trainer:
    rows = toy_data(32) if data is None else data
    return Trainer(toy_model(), config_of(run_dir, **changes), rows, toy_data(16, seed=2)).fit()


def test_another_recipe_is_refused_setting_by_setting(tmp_path: Path) -> None:
    first = weights(fit(tmp_path))
    settings = (tmp_path / "config.yaml").read_text()
    optim = OptimConfig(lr=0.1, weight_decay=0.5)
    with pytest.raises(CheckpointError) as refused:
        fit(tmp_path, optim=optim, precision="bf16", epochs=4)
    for told in (
        "optim.lr was 0.01, is 0.1",
        "optim.weight_decay was 0.01, is 0.5",
        "precision was 'fp32', is 'bf16'",
    ):
        assert told in str(refused.value)
    assert "epochs" not in str(refused.value)
    assert (tmp_path / "config.yaml").read_text() == settings
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights(fit(tmp_path)).items())


def test_another_recipe_is_taken_where_the_user_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path)
    with caplog.at_level(logging.WARNING):
        trainer = fit(tmp_path, optim=OptimConfig(lr=0.1), epochs=3, resume="force")
    assert "with another recipe: optim.lr was 0.01, is 0.1" in caplog.text
    assert trainer.state.epoch == 3
    assert "lr: 0.1" in (tmp_path / "config.yaml").read_text()


def test_a_finished_run_says_so_and_keeps_its_settings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path)
    before, settings = lines(tmp_path), (tmp_path / "config.yaml").read_text()
    with caplog.at_level(logging.WARNING):
        fit(tmp_path, workers=1)
    assert "is finished (2 epochs, 4 steps, best mcc" in caplog.text
    assert "nothing is trained: raise epochs, or choose another output_dir" in caplog.text
    assert lines(tmp_path) == before
    assert (tmp_path / "config.yaml").read_text() == settings


@pytest.mark.parametrize("epochs", [4, 1])
def test_another_number_of_epochs_is_told_with_both_rates(
    tmp_path: Path, epochs: int, caplog: pytest.LogCaptureFixture
) -> None:
    schedule = ScheduleConfig(warmup_steps=0)
    fit(tmp_path, schedule=schedule)
    with caplog.at_level(logging.WARNING):
        fit(tmp_path, schedule=schedule, epochs=epochs)
    assert f"epochs was 2, is {epochs}: the schedule now ends at step {2 * epochs}" in caplog.text
    if epochs == 4:
        assert "continues at 0.005, where it would have been 0" in caplog.text
    else:
        assert "is finished" in caplog.text


def test_other_labels_of_the_same_rows_are_refused(tmp_path: Path) -> None:
    inputs, labels = toy_data(32).tensors
    fit(tmp_path, TensorDataset(inputs, labels))
    with pytest.raises(CheckpointError, match="digest of the training data was"):
        fit(tmp_path, TensorDataset(inputs, 1 - labels), epochs=3)


def test_the_digest_of_rows_knows_tensors_indices_and_parts() -> None:
    data = toy_data(8)
    same = [data, toy_data(8)]
    assert len({rows_digest(each) for each in same}) == 1
    others = [
        *(data, toy_data(8, seed=2), Subset(data, [0, 1]), Subset(data, [1, 0]), ConcatDataset([data, data])),
        *(
            ConcatDataset([data, toy_data(8, seed=2)]),
            Subset(Subset(data, [3, 1, 2]), [0, 1]),
            [1, 2, 3],
            [1, 2],
        ),
    ]
    assert len({rows_digest(each) for each in others}) == len(others)


def test_what_no_weight_depends_on_is_free(tmp_path: Path) -> None:
    config = ExperimentConfig(output_dir=str(tmp_path))
    recipe = recipe_of(config)
    assert {
        "optim.lr",
        "schedule.name",
        "precision",
        "model.width",
        "loss.alpha",
        "augment.strength",
    } <= recipe.keys()
    for name in (
        "output_dir",
        "workers",
        "data.train",
        "features.dir",
        "eval.worst",
        "checkpoint.keep",
        "epochs",
    ):
        assert name not in recipe
    assert recipe_of(replace(config, workers=3, epochs=9)) == recipe


def differing(run_dir: Path, what: str) -> str:
    rank = int(os.environ["RANK"])
    changes: dict[str, Any] = {}
    data: Any = toy_data(32)
    model = toy_model()
    if what == "seed":
        changes["seed"] = rank
    elif what == "output_dir":
        run_dir = run_dir / str(rank)
    elif what == "split":
        torch.manual_seed(rank)
        data = random_split(data, [16, 16])[0]
    elif what == "length":
        data = toy_data(32 + rank)
    elif what == "model" and rank:
        model = torch.nn.Sequential(model, torch.nn.Linear(2, 2))
    val = toy_data(8) if what == "val" and rank == 0 else None
    with pytest.raises(ConfigError) as refused:
        Trainer(model, config_of(run_dir, **changes), data, val).fit()
    return str(refused.value)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("seed", "seed differs between ranks (0 on rank 0, 1 on rank 1)"),
        ("output_dir", "output_dir differs between ranks"),
        ("split", "rows of train_data differs between ranks"),
        ("length", "rows of train_data differs between ranks"),
        ("val", "rows of val_data differs between ranks"),
        ("model", "names and shapes of the parameters differs between ranks"),
    ],
)
def test_ranks_that_differ_stop_at_the_start_on_all_of_them(tmp_path: Path, what: str, told: str) -> None:
    for message in run(differing, tmp_path, what, world_size=2):
        assert told in message
