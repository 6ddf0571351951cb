"""Trains the view selector of a finished run on the run's training photos.

B batch · N photos · K crops · C channels of the backbone's last map
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from roadwork_dist.common.errors import ConfigError, DataError
from roadwork_dist.common.random import generator_for
from roadwork_dist.config.batch import Batch
from roadwork_dist.config.experiment import ExperimentConfig
from roadwork_dist.config.io import load_experiment
from roadwork_dist.datasets.boxed import BoxedRows
from roadwork_dist.datasets.dataset import RoadworkDataset, collate
from roadwork_dist.detector.backbone import Backbone
from roadwork_dist.detector.fusions import FUSIONS, fusion_name
from roadwork_dist.detector.pretrained import read_config
from roadwork_dist.detector.selector_training import (
    SELECTOR_FILE,
    KeptSelector,
    SelectorFigures,
    Teaching,
    identity_of,
    train_selector,
    write_selector,
)
from roadwork_dist.detector.view_selection import ViewSelector, region_means, select_views
from roadwork_dist.inference.predictor import ALL_CROPS, Predictor, weights_folder
from roadwork_dist.metrics.classification import best_threshold
from roadwork_dist.photos.manifest import Manifest
from roadwork_dist.recipes.data import DatasetBuilder, load_manifests
from roadwork_dist.sources.splits import groups_of
from roadwork_dist.trainer.answers import answer_rows
from roadwork_dist.trainer.engine.accelerator import build_accelerator
from roadwork_dist.trainer.feed.loader import load_batches

HELD_OUT = 0.2
"""Share of the training photos' places and groups that is held out for early stopping."""


MOST_PHOTOS = 5_000
"""Maximum number of training photos: a selector has few weights, and every photo must be read again."""


@dataclass(frozen=True)
class TrainedSelector:
    """Result of :func:`train_view_selector`."""

    path: Path
    figures: SelectorFigures


def train_view_selector(run_dir: Path) -> TrainedSelector:
    """Train a selector to predict which crops the best weights of a run use, and write it next to them.

    The teacher sees the run's training photos without augmentation: their features are read from the run's
    store, or computed once and added to it. (In a flipped global view left is right, so the augmented copies
    that the head is trained on would teach the wrong crops.) A threshold for every number of crops is chosen
    on the validation photos, as it is for all views; target photos are not used.

    A collective: each rank computes its share of missing features, all train the same selector, and rank 0
    writes it.

    Raises:
        ConfigError: the model has no gates that rate the views, or photos have one view only.
        DataError: the training photos cannot be used, or are too few.
        CheckpointError: the best weights are missing or damaged, or the backbone is another one.
    """
    config = load_experiment(run_dir / "config.yaml")
    _check_gates(config)
    folder = weights_folder(run_dir)
    predictor = Predictor.from_pretrained(
        folder,
        device="cpu" if config.device == "cpu" else "auto",
        max_pixels=config.data.max_pixels,
        select=ALL_CROPS,
    )
    backbone = predictor.model.backbone
    assert isinstance(backbone, Backbone)  # from_pretrained always gives one
    accelerator = build_accelerator(device=config.device)
    builder = DatasetBuilder(config, backbone, accelerator, masks=False)
    manifests = load_manifests(config)
    manifests = replace(manifests, train=_some(manifests.train, config.seed))
    train, val = (builder.build(photos, augment=False) for photos in (manifests.train, manifests.val))
    selector, figures = train_selector(teach(predictor, train, config), seed=config.seed)
    kept = KeptSelector(selector, thresholds_of(predictor, selector, val, config))
    if accelerator.is_main_process:
        write_selector(folder, kept, identity_of(read_config(folder)))
    return TrainedSelector(folder / SELECTOR_FILE, figures)


def _some(manifest: Manifest, seed: int) -> Manifest:
    """At most :data:`MOST_PHOTOS` photos of a manifest, drawn by the seed."""
    if len(manifest) <= MOST_PHOTOS:
        return manifest
    drawn = generator_for(seed, "distil-photos").permutation(len(manifest))[:MOST_PHOTOS]
    return manifest.subset(sorted(drawn.tolist()), name=manifest.name)


def _check_gates(config: ExperimentConfig) -> None:
    if config.views.policy == "global":
        raise ConfigError("views.policy is 'global': photos have no crops to select from")
    if not FUSIONS[fusion_name(config.model)].gates_views and config.model.prune_keep == 1:
        raise ConfigError(
            f"model.view_fusion is {config.model.view_fusion!r} and model.prune_keep is 1: the model has no "
            "gates that rate the views; train with gated fusion or with model.prune_keep below 1"
        )


@dataclass(frozen=True)
class Seen:
    """A batch with the features of all views, and the global views' mean features in the crops' regions."""

    batch: Batch
    regions: Tensor  # [B, K, C]


@torch.no_grad()
def teach(predictor: Predictor, dataset: RoadworkDataset, config: ExperimentConfig) -> Teaching:
    """The full model's view gates for the photos of a data set that have crops."""
    regions: list[Tensor] = []
    gates: list[Tensor] = []
    rows: list[Tensor] = []
    for seen in seen_batches(predictor, dataset, config):
        with_crops = seen.batch["view_mask"].sum(dim=1) > 1
        if bool(with_crops.any()):  # else the batch may have no axis for crops
            gates.append(predictor.forward(seen.batch).view_gates[with_crops, 1:].float().cpu())
            regions.append(seen.regions[with_crops].cpu())
            rows.append(seen.batch["index"][with_crops].cpu())
    if not rows:
        raise DataError(f"{dataset.manifest.name}: no photo is large enough to have crops to select from")
    held_out = hold_out(dataset.manifest, config.seed)[torch.cat(rows)]
    return Teaching(torch.cat(regions), torch.cat(gates), held_out)


@torch.no_grad()
def thresholds_of(
    predictor: Predictor, selector: ViewSelector, dataset: RoadworkDataset, config: ExperimentConfig
) -> dict[int, float]:
    """The best decision threshold on labelled photos for every number of crops.

    A model that sees fewer views is less confident, so the threshold for all views is not the best for fewer.
    """
    selector = selector.to(predictor.device)
    answers: dict[int, list[Tensor]] = {count: [] for count in range(1, selector.crops)}
    labels: list[Tensor] = []
    for seen in seen_batches(predictor, dataset, config):
        labels.append(seen.batch["label"].cpu())
        scores = selector.of_regions(seen.regions)
        for count, found in answers.items():
            logits = predictor.forward(select_views(seen.batch, scores, count)).logits
            found.append(logits.double().softmax(dim=1)[:, 1].cpu())
    truth = torch.cat(labels).numpy()
    return {count: best_threshold(truth, torch.cat(found).numpy()) for count, found in answers.items()}


def seen_batches(predictor: Predictor, dataset: RoadworkDataset, config: ExperimentConfig) -> Iterator[Seen]:
    """All views of the photos of a data set, on the device.

    Features come from the data set's store if it has one. Feature maps of the global view are not stored, so
    every photo is read, and its global view goes through the backbone.
    """
    backbone = predictor.model.backbone
    assert isinstance(backbone, Backbone)  # from_pretrained always gives one
    photos = RoadworkDataset(dataset.manifest, views=dataset.views, text=dataset.text)

    def look(batch: Batch) -> Seen:
        views, mask = batch.pop("views"), batch["view_mask"]
        _, cells = backbone.forward_cells(views[:, 0])
        if dataset.store is None:
            batch["features"] = predictor.model.features(views, mask)
        else:
            batch["features"] = dataset.batch(batch["index"].tolist())["features"].to(predictor.device)
        return Seen(batch, region_means(cells, batch["boxes"][:, 1 : mask.shape[1]]))

    answers = answer_rows(
        look,
        BoxedRows(photos, dataset.views),
        batch_size=config.batch_size,
        device=predictor.device,
        load=partial(load_batches, workers=config.workers, collate=collate),
    )
    return (answer.output for answer in answers)


def hold_out(manifest: Manifest, seed: int) -> Tensor:
    """[N] bool: photos of a random fifth of the places and groups (at least one), drawn by the seed."""
    groups = torch.from_numpy(groups_of(manifest))
    distinct = groups.unique()  # type: ignore[no-untyped-call]
    order = torch.from_numpy(generator_for(seed, "distil-hold-out").permutation(len(distinct)))
    taken = distinct[order[: max(1, round(HELD_OUT * len(distinct)))]]
    return torch.isin(groups, taken)
