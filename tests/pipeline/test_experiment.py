"""Complete experiments on synthetic photos: real decoding, backbone, text encoder and processes."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import train_with
from support.photos import small_experiment, write_small_set
from support.ranks import run, spawn
from support.toy import assert_same_tensors, lines, newest_tensors

from roadwork_dist.detector.detector import RoadworkModel
from roadwork_dist.detector.pretrained import read_config
from roadwork_dist.evaluation.predictions import read_predictions
from roadwork_dist.recipes import pretrain
from roadwork_dist.trainer.events.callback import Callback

SAME_MATHS = (
    "--model.dropout=0",
    "--model.metadata_dropout=0",
    "--features.dtype=fp32",
    "--backbone.dtype=fp32",
)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("photos"))


def train(photos: Path, run_dir: Path, *overrides: str) -> None:
    pretrain.run_experiment(small_experiment(photos, run_dir, *overrides))


class DieAt(Callback):
    """SIGKILL after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, run: Any, result: Any) -> None:
        if run.state.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(photos: Path, run_dir: Path, moment: str) -> None:
    if moment == "while features are computed":
        from roadwork_dist.features.store import FeatureStore

        put, calls = FeatureStore.put, iter(range(999))

        def put_or_die(*arguments: Any) -> None:
            if next(calls) == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            put(*arguments)

        FeatureStore.put = put_or_die  # type: ignore[method-assign]
        train(photos, run_dir, f"--features.dir={run_dir / 'features'}")
    config = small_experiment(photos, run_dir, f"--features.dir={run_dir / 'features'}")
    built = pretrain.build_experiment(config)
    built.trainer.callbacks.insert(0, DieAt(int(moment.removeprefix("step "))))
    built.trainer.fit()


@pytest.fixture(scope="session")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("finished")
    run(train, photos, run_dir)
    return run_dir


def test_a_run_folder_holds_everything(photos: Path, finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "best",
        "predictions.parquet",
        "report.html",
        "tensorboard",
    } <= names
    assert list(finished.glob("tensorboard/events.*"))
    train_lines = [line for line in lines(finished) if line["kind"] == "train"]
    assert [line["step"] for line in train_lines] == list(range(1, 7))
    parts = {"loss", "loss/focal", "loss/consistency", "loss/dice", "lr", "grad_norm"}
    assert parts <= train_lines[0].keys()
    frame = read_predictions(finished / "predictions.parquet")
    assert frame["split"].value_counts().to_dict() == {"val": 12, "target": 6}
    assert frame.attrs["synthetic"]
    assert set(map(len, frame["view_gates"])) == {12}
    assert json.loads((finished / "evaluation.json").read_text()).keys() == {"val", "target"}
    assert "synthetic" in (finished / "report.html").read_text()
    assert (finished / "best" / "decision.json").is_file()


def test_the_best_weights_load_and_name_their_backbone(finished: Path) -> None:
    model = RoadworkModel.from_pretrained(finished / "best")
    config = read_config(finished / "best")
    assert config.backbone["name"] == "efficientnet_lite0"
    assert len(config.backbone["sha256"]) == 64
    assert config.extra["views"]["size"] == 64
    assert not model.training


def test_a_checkpoint_is_small_beside_its_head(finished: Path) -> None:
    head = (finished / "best" / "model.safetensors").stat().st_size
    newest = max((finished / "checkpoints").glob("step-*"))
    assert sum(path.stat().st_size for path in newest.iterdir()) < 10 * head


@pytest.mark.parametrize("moment", ["while features are computed", "step 1", "step 5"])
def test_killed_experiment_ends_like_an_undisturbed_one(
    photos: Path, finished: Path, tmp_path: Path, moment: str
) -> None:
    (killed,) = spawn(train_and_die, photos, tmp_path, moment)
    assert killed.code == -signal.SIGKILL, killed.error
    run(train, photos, tmp_path, f"--features.dir={tmp_path / 'features'}")
    assert lines(tmp_path) == lines(finished)
    assert_same_tensors(newest_tensors(tmp_path), newest_tensors(finished))
    ours, theirs = (read_predictions(folder / "predictions.parquet") for folder in (tmp_path, finished))
    assert ours.equals(theirs)


def losses(run_dir: Path) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in lines(run_dir)])


@pytest.fixture(scope="session")
def one_process(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    run(train, photos, folder, *SAME_MATHS)
    return folder


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero1", "zero3"])
def test_two_processes_train_like_one(photos: Path, tmp_path: Path, one_process: Path, engine: str) -> None:
    run(train_with, engine, train, photos, tmp_path, *SAME_MATHS, "--batch_size=4", world_size=2)
    torch.testing.assert_close(losses(tmp_path), losses(one_process), rtol=0, atol=2e-6)
    one, two = (read_predictions(folder / "predictions.parquet") for folder in (one_process, tmp_path))
    assert one["id"].tolist() == two["id"].tolist()
    assert abs(one["logit_1"] - two["logit_1"]).max() < 1e-4


def test_online_features_give_the_losses_of_kept_ones(photos: Path, tmp_path: Path) -> None:
    for mode in ("cached", "online"):
        run(train, photos, tmp_path / mode, *SAME_MATHS, f"--features.mode={mode}")
    torch.testing.assert_close(losses(tmp_path / "online"), losses(tmp_path / "cached"), rtol=0, atol=2e-5)
    # Stored as bf16, a feature keeps 8 bits: the losses differ by the rounding and no more.
    run(train, photos, tmp_path / "bf16", *SAME_MATHS, "--features.dtype=bf16")
    torch.testing.assert_close(losses(tmp_path / "bf16"), losses(tmp_path / "cached"), rtol=0, atol=5e-3)
    assert not torch.equal(losses(tmp_path / "bf16"), losses(tmp_path / "cached"))


def test_an_unfrozen_backbone_learns(photos: Path, tmp_path: Path) -> None:
    overrides = ("--features.mode=online", "--backbone.trainable=last_n", "--backbone.last_n=1", "--epochs=1")
    more = ("--backbone.gradient_checkpointing=true", "--views.policy=global", "--model.prune_keep=1.0")
    run(train, photos, tmp_path, *overrides, *more)
    names = newest_tensors(tmp_path)
    assert any("backbone.network" in name for name in names)
    assert any("best" in name and "backbone" in name for name in names)
