"""A complete experiment: builds the data and the model, trains, evaluates and writes the report."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from roadwork_dist.common.errors import DataError
from roadwork_dist.common.files import write_atomic
from roadwork_dist.config.batch import UNLABELLED
from roadwork_dist.config.experiment import ExperimentConfig
from roadwork_dist.datasets.dataset import RoadworkDataset, collate
from roadwork_dist.detector.backbone import Backbone, load_backbone
from roadwork_dist.detector.detector import RoadworkHead, RoadworkModel
from roadwork_dist.detector.losses.composite import RoadworkLoss
from roadwork_dist.detector.pretrained import read_weights
from roadwork_dist.detector.task import RoadworkTask
from roadwork_dist.evaluation.evaluator import evaluate_predictions, summary_lines
from roadwork_dist.evaluation.predictions import read_predictions, write_predictions
from roadwork_dist.evaluation.report import report_from_run, splits_of
from roadwork_dist.evaluation.report_section import EvaluatedSplit
from roadwork_dist.photos.images import photo_size
from roadwork_dist.photos.manifest import Manifest, Sample
from roadwork_dist.recipes.data import DatasetBuilder, Manifests, load_manifests, training_rows
from roadwork_dist.recipes.preflight import check_recipe
from roadwork_dist.sources import is_synthetic as is_synthetic_source
from roadwork_dist.sources.gps import gps_weights
from roadwork_dist.sources.shard_order import shard_order_of
from roadwork_dist.trainer.engine.accelerator import build_accelerator, share_cores
from roadwork_dist.trainer.tracking.run_folder import make_run_folder
from roadwork_dist.trainer.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experiment:
    """The objects of an experiment, ready to train."""

    config: ExperimentConfig
    trainer: Trainer
    task: RoadworkTask
    model: RoadworkModel
    datasets: dict[str, RoadworkDataset]
    """Data sets to evaluate at the end: ``val`` and, if the target photos have labels, ``target``."""
    is_synthetic: bool

    @property
    def accelerator(self) -> Accelerator:
        """Processes and device."""
        return self.trainer.accelerator


def build_experiment(config: ExperimentConfig) -> Experiment:
    """Read the data, compute missing features and build a Trainer.

    Raises:
        ConfigError: a setting cannot be used.
        DataError: the data cannot be used.
        BackboneError: the backbone or the text encoder cannot be loaded.
    """
    check_recipe(config)
    share_cores(config.workers)
    accelerator = build_accelerator(device=config.device)
    if accelerator.is_main_process:
        make_run_folder(Path(config.output_dir))
    manifests = load_manifests(config)
    backbone = load_backbone(config.backbone, device=accelerator.device)
    mask_head = wants_masks(config, manifests.train)
    builder = DatasetBuilder(config, backbone, accelerator, masks=mask_head)
    train = builder.build(manifests.train, augment=True)
    datasets = {
        split: builder.build(manifest, augment=False) for split, manifest in evaluated(manifests).items()
    }
    model = build_model(config, backbone, mask_head=mask_head)
    task = build_task(config, mask_head=mask_head)
    if not config.keeps_features:
        task.operations_per_view = count_backbone(backbone, backbone.view_size(config.views.size))
    weights = _sample_weights(config, train.manifest, manifests, accelerator)
    trainer = Trainer(
        model,
        config,
        training_rows(train, train.manifest.labels.tolist(), config, weights),
        datasets["val"],
        task=task,
        sample_weights=weights,
        shard_order=shard_order_of(
            [sample.image for sample in train.manifest],
            config.data,
            reads_photos=not config.keeps_features,
        ),
        collate=collate,
    )
    return Experiment(config, trainer, task, model, datasets, is_synthetic(config))


def evaluated(manifests: Manifests) -> dict[str, Manifest]:
    """The photos that a run is evaluated on, by split: ``val``, and ``target`` if it has labels."""
    splits = {"val": manifests.val}
    if manifests.target is not None and (manifests.target.labels != UNLABELLED).any():
        splits["target"] = manifests.target.labelled()
    return splits


def count_backbone(backbone: Backbone, size: int) -> float:
    """Floating-point operations of the backbone per training view.

    0, with a log message, if the network does not run on the meta device, as some hub networks do not.
    """
    try:
        return backbone.training_operations(size)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        logger.info("no backbone_mfu: the operations of %s cannot be counted: %s", backbone.name, error)
        return 0.0


def wants_masks(config: ExperimentConfig, manifest: Manifest) -> bool:
    """Whether the model gets a mask head: as configured, or for ``auto`` if the photos have masks."""
    return config.model.mask_head == "on" or (config.model.mask_head == "auto" and manifest.has_masks)


def build_task(config: ExperimentConfig, *, mask_head: bool) -> RoadworkTask:
    """The task: loss and validation figures."""
    return RoadworkTask(
        RoadworkLoss(config.loss, with_masks=mask_head, with_experts=config.model.experts > 0)
    )


def build_model(config: ExperimentConfig, backbone: Backbone, *, mask_head: bool) -> RoadworkModel:
    """The detector; with cached features it contains only the head and the identity of the backbone."""
    torch.manual_seed(config.seed)  # the same initial weights on every rank and after every restart
    head = RoadworkHead(backbone.width, config.model, mask_head=mask_head)
    model = RoadworkModel(head, None if config.keeps_features else backbone)
    settings = replace(config.backbone, name=backbone.name)
    model.backbone_identity = {"sha256": backbone.identity, **asdict(settings)}
    size = backbone.view_size(config.views.size)
    model.extra = {
        "views": asdict(replace(config.views, size=size, decoder="cpu")),  # its users may have no GPU
        "text_encoder": config.data.text_encoder,
        "precision": config.precision,
        "synthetic": is_synthetic(config),
    }
    return model


def _sample_weights(
    config: ExperimentConfig, train: Manifest, manifests: Manifests, accelerator: Accelerator
) -> list[float] | None:
    """GPS sampling weights, or None; prints the report about them."""
    if not config.gps.enabled:
        return None
    weights, report = gps_weights(train, manifests.target, config.gps, seed=config.seed)
    if accelerator.is_main_process:
        print("\n".join(report.lines()))
    values: list[float] = weights.tolist()
    return values if report.weighted else None


def is_synthetic(config: ExperimentConfig) -> bool:
    """Whether the training photos were made by this package's generator, which writes a marker."""
    return is_synthetic_source(config.data.train, config.data)


def run_experiment(config: ExperimentConfig) -> Path:
    """Train (or resume training), evaluate the best weights and write the report.

    Every rank runs this. Rank 0 writes ``predictions.parquet``, ``evaluation.json`` and
    ``report.html`` to the run folder and prints the figures.

    Returns:
        The run folder.

    Raises:
        RoadworkError: anything that stops the run; see :func:`build_experiment` and :meth:`Trainer.fit`.
    """
    experiment = build_experiment(config)
    experiment.trainer.fit()
    rows = predict_all(experiment)
    run_dir = Path(config.output_dir)
    if experiment.accelerator.is_main_process:
        write_predictions(run_dir / "predictions.parquet", rows, synthetic=experiment.is_synthetic)
        write_evaluation(run_dir, config, experiment.is_synthetic)
        if config.eval.report:
            print(f"report: {report_from_run(run_dir, views_of=ViewsById(experiment.datasets))}")
    experiment.accelerator.wait_for_everyone()
    return run_dir


def predict_all(experiment: Experiment) -> list[dict[str, Any]]:
    """Rows of ``predictions.parquet`` for every evaluated split, predicted with the best weights.

    A collective: every rank predicts a share of each split.
    """
    experiment.trainer.load_weights(read_weights(experiment.trainer.run_dir / "best"))
    rows: list[dict[str, Any]] = []
    for split, dataset in experiment.datasets.items():
        rows += prediction_rows(dataset.manifest, experiment.trainer.evaluate(dataset).rows, split)
    return rows


def prediction_rows(manifest: Manifest, rows: Mapping[str, Tensor], split: str) -> list[dict[str, Any]]:
    """Per-row output tensors as rows of ``predictions.parquet``, in the order of the manifest."""
    order = rows["index"].argsort()
    logits = rows["logits"].float()[order]
    probabilities = logits.double().softmax(dim=1)[:, 1]
    gates = rows["view_gates"].float()[order]
    result = []
    for number, index in enumerate(rows["index"][order].tolist()):
        sample = manifest[index]
        result.append(
            {
                "id": sample.id,
                "split": split,
                "label": sample.label,
                "logit_0": float(logits[number, 0]),
                "logit_1": float(logits[number, 1]),
                "probability": float(probabilities[number]),
                **_photo_size(sample),
                "view_gates": gates[number][~gates[number].isnan()].tolist(),
                **{
                    name: getattr(sample, name)
                    for name in ("latitude", "longitude", "weather", "daytime", "scene")
                },
            }
        )
    return result


def _photo_size(sample: Sample) -> dict[str, int | None]:
    """Size in px from the photo's header; None if the photo is gone (its features may still exist)."""
    try:
        height, width = photo_size(sample.image)
    except DataError:
        return {"width": None, "height": None}
    return {"width": width, "height": height}


def write_evaluation(run_dir: Path, config: ExperimentConfig, synthetic: bool) -> None:
    """Evaluate a run's predictions, print the figures, and write them and the decision threshold."""
    results = evaluate_splits(run_dir / "predictions.parquet", config, synthetic)
    write_atomic(run_dir / "evaluation.json", json.dumps(results, indent=1).encode())
    if "val" in results:
        decision = {"threshold": results["val"]["threshold"], "chosen_on": "val"}
        write_atomic(run_dir / "best" / "decision.json", json.dumps(decision).encode())


def evaluate_splits(
    predictions: Path, config: ExperimentConfig, synthetic: bool, threshold: float | None = None
) -> dict[str, Any]:
    """Evaluate every labelled split of a predictions file and print the figures.

    Args:
        predictions: the file.
        config: bootstrap and seed.
        synthetic: whether to state that the photos are synthetic.
        threshold: decision threshold; None = the best one on ``val``.

    Returns:
        Results of ``evaluate_predictions``, by split.
    """
    results = {}
    for split in splits_of(read_predictions(predictions), threshold):
        result = evaluate_predictions(
            split.frame, threshold=split.threshold, bootstrap=config.eval.bootstrap, seed=config.seed
        )
        results[split.name] = result
        print("\n".join(summary_lines(result, f"{split.name}{_chosen_on(split)}", synthetic)))
    return results


def _chosen_on(split: EvaluatedSplit) -> str:
    """A note about what was chosen with the labels of these photos."""
    if split.held_out:
        return ""
    chose_threshold = split.threshold_from == split.name
    what = "the threshold and the best epoch were" if chose_threshold else "the best epoch was"
    return f" ({what} chosen on these)"


class ViewsById:
    """Views of an evaluated photo by its split and id, for the report's pictures.

    Args:
        datasets: the photos by split; ids are unique only within a split.
    """

    def __init__(self, datasets: Mapping[str, RoadworkDataset]) -> None:
        self._samples = {
            (split, sample.id): (dataset, sample)
            for split, dataset in datasets.items()
            for sample in dataset.manifest
        }

    def __call__(self, split: str, sample_id: str) -> Any:
        """[V, 3, S, S] uint8."""
        dataset, sample = self._samples[split, sample_id]
        return dataset.views.plain(sample.image).numpy()
