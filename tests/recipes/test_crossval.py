"""Cross-validation on small generated photos: who is held out, from whom, and what a restart leaves."""

import csv
import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from support.ranks import run, spawn
from support.toy import assert_same_tensors, lines

from roadwork_dist.common.errors import ConfigError, DataError
from roadwork_dist.common.random import generator_for
from roadwork_dist.config.experiment import ExperimentConfig
from roadwork_dist.config.io import load_experiment, parse_experiment
from roadwork_dist.evaluation.predictions import read_predictions
from roadwork_dist.recipes import crossval
from roadwork_dist.trainer.events.callback import Callback

FOLDS, PHOTOS = 3, 24
OTHERS = ("--epochs=3", "--optim.lr=1e-5", "--workers=1", "--eval.bootstrap=200", "--checkpoint.keep=2")
ONE_OR_TWO = ("--model.dropout=0",)  # processes draw other masks than one process


def write_photos(folder: Path, flipped: set[str] = frozenset()) -> None:
    """24 photos of 12 things, a quarter of class 1; the labels of ``flipped`` are wrong."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(PHOTOS):
        label, name = int(number % 8 < 2), f"photo-{number:02d}"
        generator = generator_for("photo", number)
        pixels = generator.integers(60, 200, (80, 96, 3))
        pixels[20:60, 20:60] += np.array([55, -20, -60] if label else [-60, -20, 55])
        if not (folder / "images" / f"{name}.jpg").exists():
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{name}.jpg")
        wrong = name in flipped
        rows.append(
            {"id": name, "image": f"images/{name}.jpg", "label": label ^ wrong, "group": f"{number // 2}"}
        )
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    (folder / "metadata.csv").write_text(text.getvalue())


def config_of(photos: Path, run_dir: Path, *overrides: str) -> ExperimentConfig:
    settings = {
        "output_dir": run_dir,
        "data.train": photos / "metadata.csv",
        "data.folds": FOLDS,
        "features.dir": photos / "features",
        "views.size": 64,
        "augment.copies": 1,
        "model.width": 64,
        "model.heads": 4,
        "batch_size": 8,
        "epochs": 2,
        "device": "cpu",
        "eval.bootstrap": 100,
        "checkpoint.every_steps": 2,
    }
    given = [f"--{name}={value}" for name, value in settings.items()]
    return parse_experiment(["--config", "demo_real", *given, *overrides])


def cross_validate(photos: Path, run_dir: Path, *overrides: str) -> None:
    crossval.run_crossval(config_of(photos, run_dir, *overrides))


class DieInFold(Callback):
    def on_step_end(self, run: Any, result: Any) -> None:
        if run.run_dir.name == "fold-1" and run.state.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def cross_validate_and_die(photos: Path, run_dir: Path, *overrides: str) -> None:
    trainer = crossval.Trainer
    crossval.Trainer = lambda *args, **named: trainer(*args, callbacks=[DieInFold()], **named)
    cross_validate(photos, run_dir, *overrides)


def logits(run_dir: Path) -> pd.DataFrame:
    frame = read_predictions(run_dir / "predictions.parquet").set_index("id").sort_index()
    return frame[["fold", "logit_0", "logit_1"]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder)
    return folder


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("finished")
    run(cross_validate, photos, run_dir)
    return run_dir


@pytest.fixture(scope="module")
def pair(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished by two processes."""
    run_dir = tmp_path_factory.mktemp("pair")
    run(cross_validate, photos, run_dir, *ONE_OR_TWO, "--batch_size=4", world_size=2)
    return run_dir


def test_every_photo_is_answered_once_and_no_group_is_parted(photos: Path, finished: Path) -> None:
    frame = read_predictions(finished / "predictions.parquet")
    table = pd.read_csv(photos / "metadata.csv").set_index("id")
    assert sorted(frame["id"]) == sorted(table.index)
    assert set(frame["split"]) == {"out-of-fold"}
    assert frame["label"].tolist() == table.loc[frame["id"], "label"].tolist()
    assert np.isfinite(frame[["logit_0", "logit_1", "probability"]].to_numpy()).all()
    fold_of = json.loads((finished / "folds.json").read_text())["folds"]
    assert dict(zip(frame["id"], frame["fold"].tolist(), strict=True)) == fold_of
    groups = table["group"].to_frame().assign(fold=pd.Series(fold_of))
    assert (groups.groupby("group")["fold"].nunique() == 1).all()
    assert frame.groupby("fold")["label"].apply(lambda labels: set(labels.tolist()) == {0, 1}).all()


def test_figures_and_report_are_out_of_fold(photos: Path, finished: Path) -> None:
    result = json.loads((finished / "evaluation.json").read_text())
    assert list(result) == ["out-of-fold"]
    assert result["out-of-fold"]["scored"] == PHOTOS
    assert result["out-of-fold"]["threshold"] == 0.5
    assert {"value", "low", "high"} <= set(result["out-of-fold"]["metrics"]["mcc"])
    assert "MCC <strong>out of fold</strong>" in (finished / "report.html").read_text()
    assert load_experiment(finished / "config.yaml") == config_of(photos, finished)


def average_third_fold(photos: Path, run_dir: Path) -> None:
    trainer = crossval.fold_trainer(crossval.build_crossval(config_of(photos, run_dir)), 2).fit()
    with trainer.averaged():
        save_file(dict(trainer.model.named_parameters()), run_dir / "average.safetensors")


def test_a_fold_answers_with_its_averaged_last_weights(photos: Path, finished: Path, tmp_path: Path) -> None:
    run(average_third_fold, photos, tmp_path)
    average = load_file(tmp_path / "average.safetensors")
    kept = load_file(finished / "fold-2" / "best" / "model.safetensors")
    assert_same_tensors({name: kept[name] for name in average}, average)


def test_held_out_labels_change_nothing_that_is_said_of_their_photos(
    photos: Path, finished: Path, tmp_path: Path
) -> None:
    before = logits(finished)
    flipped = set(before.index[before["fold"] == 1])
    other = tmp_path / "photos"
    shutil.copytree(photos, other)
    write_photos(other, flipped)
    (tmp_path / "run").mkdir()
    shutil.copy(finished / "folds.json", tmp_path / "run" / "folds.json")
    run(cross_validate, other, tmp_path / "run")
    after = logits(tmp_path / "run")
    labels = read_predictions(tmp_path / "run" / "predictions.parquet").set_index("id")["label"]
    was = read_predictions(finished / "predictions.parquet").set_index("id")["label"]
    assert {name for name in flipped if labels[name] != was[name]} == flipped
    assert before[before["fold"] == 1].equals(after[after["fold"] == 1])
    for fold in (0, 2):
        assert not before[before["fold"] == fold].equals(after[after["fold"] == fold])


@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_in_a_fold_and_started_again_it_ends_the_same(
    photos: Path, tmp_path: Path, world_size: int, request: pytest.FixtureRequest
) -> None:
    reference: Path = request.getfixturevalue("finished" if world_size == 1 else "pair")
    overrides = () if world_size == 1 else (*ONE_OR_TWO, "--batch_size=4")
    exits = spawn(cross_validate_and_die, photos, tmp_path, *overrides, world_size=world_size)
    assert any(e.code == -signal.SIGKILL for e in exits), exits
    assert not (tmp_path / "predictions.parquet").exists()
    assert not (tmp_path / "fold-2").exists()
    first_fold = {p: p.stat().st_mtime_ns for p in (tmp_path / "fold-0").rglob("*")}
    run(cross_validate, photos, tmp_path, *overrides, world_size=world_size)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "fold-0").rglob("*")} == first_fold
    for fold in range(FOLDS):
        ours, theirs = tmp_path / f"fold-{fold}", reference / f"fold-{fold}"
        assert lines(ours) == lines(theirs)
        names = [f"{name}/best/model.safetensors" for name in (ours, theirs)]
        assert_same_tensors(*map(load_file, names))
    assert logits(tmp_path).equals(logits(reference))


def test_a_finished_one_started_again_changes_nothing(photos: Path, finished: Path) -> None:
    def content() -> dict[Path, bytes]:
        files = [p for p in finished.rglob("*") if p.is_file() and p.name != "report.html"]
        return {path: path.read_bytes() for path in files}

    before = content()
    run(cross_validate, photos, finished)
    assert content() == before


def test_a_finished_fold_keeps_one_copy_of_its_weights_and_no_training_state(finished: Path) -> None:
    for fold in range(FOLDS):
        files = {p.relative_to(finished / f"fold-{fold}") for p in (finished / f"fold-{fold}").rglob("*")}
        assert [path for path in map(str, files) if path.endswith((".safetensors", ".pt"))] == [
            "best/model.safetensors"
        ]
        assert not any("checkpoint" in str(path) for path in files)


def test_two_processes_answer_like_one(photos: Path, pair: Path, tmp_path: Path) -> None:
    run(cross_validate, photos, tmp_path, *ONE_OR_TWO)
    one, two = logits(tmp_path), logits(pair)
    assert one["fold"].equals(two["fold"])
    np.testing.assert_allclose(two.to_numpy(float), one.to_numpy(float), atol=1e-5)


def test_settings_that_contradict_are_refused(photos: Path, finished: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, run_dir: Path, *overrides: str) -> None:
        with pytest.raises(error, match=match):
            cross_validate(photos, run_dir, *overrides)

    refused(ConfigError, "data.val is 'v.csv', expected null", tmp_path, "--data.val=v.csv")
    refused(ConfigError, "data.target is 't.csv'", tmp_path, "--data.target=t.csv")
    unfrozen = ("--backbone.trainable=all", "--features.mode=online")
    refused(ConfigError, "backbone.trainable is 'all'", tmp_path, *unfrozen)
    refused(ConfigError, "data.folds is 4, but .* holds the folds .0, 1, 2.", finished, "--data.folds=4")
    refused(DataError, "label 1 has photos of 3 places only", tmp_path / "many", "--data.folds=4")
    refused(ConfigError, "resume is 'never'", finished, "--resume=never")
    refused(ConfigError, "fold-0 was finished with other settings of epochs, optim:", finished, *OTHERS)
