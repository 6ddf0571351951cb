"""Evaluates a finished run again: on its own or other photos, or with another threshold."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from roadwork_dist.common.errors import ConfigError, DataError
from roadwork_dist.common.files import write_atomic
from roadwork_dist.config.experiment import ExperimentConfig
from roadwork_dist.config.io import load_experiment
from roadwork_dist.datasets.boxed import BoxedRows
from roadwork_dist.datasets.dataset import collate
from roadwork_dist.detector.backbone import Backbone
from roadwork_dist.evaluation.predictions import write_predictions
from roadwork_dist.inference.predictor import ALL_CROPS, Predictor, crops_to_select
from roadwork_dist.photos.manifest import Manifest
from roadwork_dist.recipes.data import DatasetBuilder, Manifests, load_manifests
from roadwork_dist.recipes.pretrain import (
    build_task,
    evaluate_splits,
    evaluated,
    is_synthetic,
    prediction_rows,
    write_evaluation,
)
from roadwork_dist.sources import is_synthetic as is_synthetic_source
from roadwork_dist.sources import load_manifest
from roadwork_dist.trainer.answers import answer_rows, summarize
from roadwork_dist.trainer.engine.accelerator import build_accelerator
from roadwork_dist.trainer.feed.loader import load_batches


@dataclass(frozen=True)
class EvaluationFiles:
    """Output files of an evaluation."""

    figures: Path
    predictions: Path


def evaluate_run(
    run_dir: Path,
    *,
    source: str | None = None,
    image_root: str | None = None,
    threshold: float | None = None,
    select: int | None = None,
    output: Path | None = None,
) -> EvaluationFiles:
    """Predict with the best weights of a run, then print and write the figures.

    Features are read from and added to the run's feature store if it used one. If crops are selected, photos
    are read instead, and only the global view and the selected crops go through the backbone.

    Args:
        run_dir: run folder; its ``config.yaml`` defines how photos are read.
        source: other photos with labels, in any form that ``data.train`` accepts; None = the run's own
            ``val`` and ``target``.
        image_root: base folder of relative image paths in ``source``; None = the folder of its table.
        threshold: decision threshold; None = the one chosen on ``val`` for this number of crops.
        select: number of crops used besides the global view; the number of crops or more = all; None =
            ``views.select`` of the run.
        output: JSON file for the figures; predictions are written next to it as Parquet. None = the run's
            ``evaluation.json`` and ``predictions.parquet`` if all views of its own photos are evaluated at
            its own threshold, else ``evaluations/`` in the run folder. Only None replaces the run's files.

    Raises:
        DataError: photos or labels cannot be used.
        CheckpointError: the best weights are missing or damaged, the backbone is another one, or no selector
            was distilled.
        ConfigError: the files cannot be written, or would replace a source or the run's own figures.
    """
    config = load_experiment(run_dir / "config.yaml")
    select = crops_to_select(config.views, select)
    own = output is None and source is None and threshold is None and select is None
    if output is not None:
        data = config.data
        _refuse_to_replace(output, run_dir, [source] if source else [data.train, data.val, data.target])
    files = _files(run_dir, source, threshold, select, output)
    if source is None:
        splits, synthetic = evaluated(_own_photos(config)), is_synthetic(config)
    else:
        data = replace(config.data, image_root=image_root)
        splits = {source: load_manifest(source, data, name="train", setting="--data").labelled()}
        synthetic = is_synthetic_source(source, data)
    device = "cpu" if config.device == "cpu" else "auto"
    predictor = Predictor.from_pretrained(
        run_dir / "best", device=device, max_pixels=config.data.max_pixels, select=select or ALL_CROPS
    )
    if select is not None:  # the selector needs feature maps of the global view, which no store keeps
        config = replace(config, features=replace(config.features, mode="online"))
    rows = _predict(config, predictor, splits)
    write_predictions(files.predictions, rows, synthetic=synthetic)
    if own:
        write_evaluation(run_dir, config, synthetic)
        return files
    if source is not None and threshold is None:
        threshold = predictor.threshold
    results = evaluate_splits(files.predictions, config, synthetic, threshold)
    write_atomic(files.figures, json.dumps(results, indent=1).encode())
    return files


def _own_photos(config: ExperimentConfig) -> Manifests:
    try:
        return load_manifests(config)
    except DataError as error:
        sources = (config.data.train, config.data.val, config.data.target)
        missing = any(s and not s.startswith("hf:") and not Path(s).exists() for s in sources)
        hint = f"; paths are relative to the folder the run was started in, the current one is {Path.cwd()}"
        raise DataError(f"{error}{hint if missing else ''}") from error


def _refuse_to_replace(output: Path, run_dir: Path, sources: Iterable[str | None]) -> None:
    """Refuse an output that would replace a source of photos, or the run's own figures.

    Raises:
        ConfigError: the output, or the predictions next to it, would.
    """
    read = {Path(source).resolve() for source in sources if source}
    own = {(run_dir / name).resolve() for name in ("evaluation.json", "predictions.parquet")}
    for path in (output, output.with_suffix(".parquet")):
        found = path.resolve()
        is_read = found in read or (found.parent in read and found.exists())  # tables and indexes in folders
        if is_read or found in own:
            what = "photos are read from it" if is_read else "it holds the run's own figures or predictions"
            raise ConfigError(
                f"--output {output} would replace {path}, but {what}: choose another file with --output"
            )


def _files(
    run_dir: Path, source: str | None, threshold: float | None, select: int | None, output: Path | None
) -> EvaluationFiles:
    """The output files, checked to be writable before anything is computed."""
    if output is not None:
        files = EvaluationFiles(output, output.with_suffix(".parquet"))
    elif source is None and threshold is None and select is None:
        files = EvaluationFiles(run_dir / "evaluation.json", run_dir / "predictions.parquet")
    else:
        name = "own" if source is None else "".join(c if c.isalnum() or c in "-_" else "_" for c in source)
        name += "" if select is None else f"-select-{select}"
        name += "" if threshold is None else f"-at-{threshold:g}"
        folder = run_dir / "evaluations"
        files = EvaluationFiles(folder / f"{name}.json", folder / f"{name}.parquet")
    try:
        if output is None:
            files.figures.parent.mkdir(exist_ok=True)
        write_atomic(files.predictions.with_suffix(".writable"), b"")
        files.predictions.with_suffix(".writable").unlink()
    except OSError as error:
        raise ConfigError(
            f"{files.figures} cannot be written ({error.strerror or error}): choose another file with "
            "--output, or fix its folder"
        ) from error
    return files


def _predict(
    config: ExperimentConfig, predictor: Predictor, splits: dict[str, Manifest]
) -> list[dict[str, Any]]:
    """Rows of ``predictions.parquet`` for every split."""
    backbone, head = predictor.model.backbone, predictor.model.head
    assert isinstance(backbone, Backbone)  # from_pretrained always gives one
    accelerator = build_accelerator(device=config.device)
    builder = DatasetBuilder(config, backbone, accelerator, masks=False)
    task = build_task(config, mask_head=head.mask_head is not None)
    rows: list[dict[str, Any]] = []
    for split, manifest in splits.items():
        dataset = builder.build(manifest, augment=False)
        rows_of = dataset if predictor.selection is None else BoxedRows(dataset, predictor.views)
        answers = answer_rows(
            lambda batch: task(predictor.forward, batch),
            rows_of,
            batch_size=config.batch_size,
            device=predictor.device,
            load=partial(load_batches, workers=config.workers, collate=collate),
        )
        rows += prediction_rows(dataset.manifest, summarize(task, answers, predictor.device).rows, split)
    return rows
