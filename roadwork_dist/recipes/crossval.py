"""Cross-validation: every photo is predicted once, by a model that was trained without it.

Labels of held-out photos decide nothing. Each fold trains for the configured number of epochs and predicts
with its last averaged weights, and the threshold is 0.5. The alternative, an inner validation set that
selects the epoch, would cost small data sets a fifth of their few positives, for a choice that depends on a
handful of photos.
"""

import shutil
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from roadwork_dist.common.errors import CheckpointError, ConfigError
from roadwork_dist.common.files import write_atomic
from roadwork_dist.common.yaml import to_yaml
from roadwork_dist.config.experiment import EvalConfig, ExperimentConfig
from roadwork_dist.config.io import load_experiment
from roadwork_dist.datasets.dataset import RoadworkDataset, collate
from roadwork_dist.datasets.subset import RowsOf
from roadwork_dist.detector.backbone import Backbone, load_backbone
from roadwork_dist.detector.pretrained import CONFIG_FILE, read_config, read_weights
from roadwork_dist.evaluation.predictions import OUT_OF_FOLD, write_predictions
from roadwork_dist.evaluation.report import report_from_run
from roadwork_dist.photos.manifest import Manifest
from roadwork_dist.recipes.data import DatasetBuilder, training_rows
from roadwork_dist.recipes.preflight import check_recipe
from roadwork_dist.recipes.pretrain import (
    ViewsById,
    build_model,
    build_task,
    is_synthetic,
    prediction_rows,
    wants_masks,
    write_evaluation,
)
from roadwork_dist.sources import load_manifest
from roadwork_dist.sources.splits import Ints, folds, groups_of, load_folds, save_folds
from roadwork_dist.trainer.config import CheckpointConfig, TrackingConfig
from roadwork_dist.trainer.engine.accelerator import build_accelerator
from roadwork_dist.trainer.engine.collectives import broadcast_object
from roadwork_dist.trainer.tracking.run_folder import make_run_folder
from roadwork_dist.trainer.trainer import Trainer

FOLDS_FILE = "folds.json"
BEST = "best"
"""Subfolder of a fold's run folder with the weights it predicts with: the last averaged ones."""


@dataclass(frozen=True)
class CrossValidation:
    """What all folds share: photos, their features and the fold of each photo."""

    config: ExperimentConfig
    accelerator: Accelerator
    backbone: Backbone
    train: RoadworkDataset
    """All photos, augmented."""
    plain: RoadworkDataset
    """The same photos without augmentation."""
    fold_of_row: Ints
    mask_head: bool


def run_crossval(config: ExperimentConfig) -> Path:
    """Train (or resume) one model per fold and evaluate its predictions for the held-out photos.

    Every rank runs this. The run folder gets ``folds.json``, a run folder ``fold-k`` for each fold with
    the weights it predicts with in ``best/``, and, by rank 0, ``predictions.parquet`` (split
    ``out-of-fold``), ``evaluation.json`` and ``report.html``; the figures are printed.

    Returns:
        The run folder.

    Raises:
        ConfigError: a setting cannot be used, or is incompatible with cross-validation.
        DataError: the data cannot be used, or has fewer groups of a label than folds.
        RoadworkError: whatever else stops training; see :meth:`Trainer.fit`.
    """
    crossval = build_crossval(config)
    run_dir = Path(config.output_dir)
    rows = [row for fold in range(config.data.folds) for row in run_fold(crossval, fold)]
    if crossval.accelerator.is_main_process:
        synthetic = is_synthetic(config)
        write_atomic(run_dir / "config.yaml", to_yaml(config).encode())
        write_predictions(run_dir / "predictions.parquet", rows, synthetic=synthetic)
        write_evaluation(run_dir, config, synthetic)
        if config.eval.report:
            print(f"report: {report_from_run(run_dir, views_of=ViewsById({OUT_OF_FOLD: crossval.plain}))}")
    crossval.accelerator.wait_for_everyone()
    return run_dir


def build_crossval(config: ExperimentConfig) -> CrossValidation:
    """Read the photos, compute missing features once for all folds, and assign the folds.

    Raises:
        ConfigError: see :func:`run_crossval`.
        DataError: see :func:`run_crossval`.
        BackboneError: the backbone or the text encoder cannot be loaded.
    """
    check_recipe(config)
    _check_settings(config)
    accelerator = build_accelerator(device=config.device)
    run_dir = Path(config.output_dir)
    if accelerator.is_main_process:
        make_run_folder(run_dir)
    manifest = load_manifest(config.data.train, config.data, name="train").labelled()
    backbone = load_backbone(config.backbone, device=accelerator.device)
    mask_head = wants_masks(config, manifest)
    builder = DatasetBuilder(config, backbone, accelerator, masks=mask_head)
    plain = builder.build(manifest, augment=False)
    augmented = replace(plain.manifest, name=f"{plain.manifest.name}, augmented")
    train = builder.build(augmented, augment=True)
    fold_of_row = deal_folds(config, plain.manifest, run_dir / FOLDS_FILE, accelerator)
    return CrossValidation(config, accelerator, backbone, train, plain, fold_of_row, mask_head)


def _check_settings(config: ExperimentConfig) -> None:
    """Refuse settings that would be ignored, overwrite a run, or leak what one fold learnt into the next."""
    if config.resume == "never" and any(Path(config.output_dir).glob("fold-*")):
        raise ConfigError(
            f"resume is 'never' but {config.output_dir} holds folds: choose another output_dir, delete the "
            "folder, or leave resume at 'auto'"
        )
    given = [name for name in ("val", "target") if getattr(config.data, name) is not None]
    if given:
        raise ConfigError(
            f"data.{given[0]} is {getattr(config.data, given[0])!r}, expected null: cross-validation holds "
            "out folds of data.train, and uses no other photos"
        )
    if config.backbone.trainable != "none":
        raise ConfigError(
            f"backbone.trainable is {config.backbone.trainable!r}, expected 'none': the folds of a "
            "cross-validation share one frozen backbone"
        )


def deal_folds(config: ExperimentConfig, manifest: Manifest, path: Path, accelerator: Accelerator) -> Ints:
    """Fold ``[N]`` of each photo: read from the run's file, or newly assigned and written there.

    A collective. Folds are stratified by label and never split a group (see
    :func:`~roadwork_dist.sources.splits.groups_of`).

    Raises:
        ConfigError: the file holds another number of folds.
        DataError: the file belongs to other photos, or a label has too few groups.
    """
    # Rank 0 checks for all: a late rank would find the file that rank 0 has just written.
    is_kept = broadcast_object(path.is_file() if accelerator.is_main_process else False)
    if not is_kept:
        dealt = folds(manifest.labels, groups_of(manifest), config.data.folds, config.seed)
        if accelerator.is_main_process:
            save_folds(path, manifest.ids, dealt)
        return dealt
    kept = load_folds(path, manifest.ids)
    numbers = np.unique(kept).tolist()
    if numbers != list(range(config.data.folds)):
        raise ConfigError(
            f"data.folds is {config.data.folds}, but {path} holds the folds {numbers}: set data.folds to "
            f"{len(numbers)}, or choose another output_dir"
        )
    return kept


def run_fold(crossval: CrossValidation, fold: int) -> list[dict[str, Any]]:
    """Train without a fold's photos, then predict them: rows of ``predictions.parquet``.

    A collective. A finished fold keeps only its weights, no training state; it predicts again, with
    bit-identical results.
    """
    trainer = fold_trainer(crossval, fold)
    is_main = crossval.accelerator.is_main_process
    # Rank 0 checks for all, since it also deletes the folder that is checked.
    is_finished = broadcast_object(_is_finished(trainer.run_dir) if is_main else False)
    if is_finished:
        _check_finished(crossval, trainer)
        trainer.load_weights(read_weights(trainer.run_dir / BEST))
    else:
        trainer.fit()
    held_out = np.flatnonzero(crossval.fold_of_row == fold).tolist()
    with nullcontext() if is_finished else trainer.averaged():
        answers = trainer.evaluate(RowsOf(crossval.plain, held_out)).rows
    crossval.accelerator.wait_for_everyone()  # no rank reads a checkpoint any more
    if is_main:
        _drop_checkpoints(trainer.run_dir)
    if is_main:
        figures = "  ".join(f"{name} {value:.4f}" for name, value in trainer.task.metrics(answers).items())
        print(f"fold {fold}: {len(held_out)} photos held out  {figures}", flush=True)
    rows = prediction_rows(crossval.plain.manifest, answers, OUT_OF_FOLD)
    return [{**row, "fold": fold} for row in rows]


def _is_finished(run_dir: Path) -> bool:
    return (run_dir / BEST / CONFIG_FILE).is_file() and not (run_dir / "checkpoints").exists()


def _drop_checkpoints(run_dir: Path) -> None:
    """Delete the training state of a finished fold; atomic, because the folder is renamed first."""
    folder, dropped = run_dir / "checkpoints", run_dir / ".checkpoints-dropped"
    shutil.rmtree(dropped, ignore_errors=True)
    if folder.exists():
        folder.rename(dropped)
        shutil.rmtree(dropped, ignore_errors=True)


def _check_finished(crossval: CrossValidation, trainer: Trainer) -> None:
    """Refuse weights of a finished fold that the current settings would not reproduce.

    Raises:
        ConfigError: settings that affect the weights have changed.
        CheckpointError: the backbone has changed.
    """
    was, now = _decisive(load_experiment(trainer.run_dir / "config.yaml")), _decisive(crossval.config)
    changed = [item.name for item in fields(now) if getattr(was, item.name) != getattr(now, item.name)]
    if changed:
        raise ConfigError(
            f"{trainer.run_dir} was finished with other settings of {', '.join(changed)}: restore them from "
            "its config.yaml, or choose another output_dir"
        )
    trained_on = read_config(trainer.run_dir / BEST).backbone.get("sha256")
    if trained_on != crossval.backbone.identity:
        raise CheckpointError(
            f"{trainer.run_dir} was finished on other weights of {crossval.backbone.name}: use the same "
            "ones, or choose another output_dir"
        )


def _decisive(config: ExperimentConfig) -> ExperimentConfig:
    """Settings with those reset to defaults that do not affect the weights."""
    return replace(
        config,
        output_dir="",
        resume="auto",
        workers=0,
        device="auto",
        checkpoint=CheckpointConfig(),
        tracking=TrackingConfig(),
        eval=EvalConfig(),
        features=replace(config.features, dir=""),
    )


def fold_trainer(crossval: CrossValidation, fold: int) -> Trainer:
    """A Trainer of a new head on all photos except a fold's, without validation, in its own run folder."""
    run_dir = Path(crossval.config.output_dir) / f"fold-{fold}"
    config = replace(crossval.config, output_dir=str(run_dir))
    learnt_from = np.flatnonzero(crossval.fold_of_row != fold).tolist()
    labels = crossval.train.manifest.labels[learnt_from].tolist()
    return Trainer(
        build_model(config, crossval.backbone, mask_head=crossval.mask_head),
        config,
        training_rows(RowsOf(crossval.train, learnt_from), labels, config),
        task=build_task(config, mask_head=crossval.mask_head),
        collate=collate,
    )
