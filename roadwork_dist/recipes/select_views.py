"""Training the view selector of a finished run on its own training photos.

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
"""Share of the training photos' places and groups that only say when to stop."""


MOST_PHOTOS = 5_000
"""Training photos that a selector learns from: it has few weights, and each photo is read again."""


@dataclass(frozen=True)
class TrainedSelector:
    """What :func:`train_view_selector` did."""

    path: Path
    figures: SelectorFigures


def train_view_selector(run_dir: Path) -> TrainedSelector:
    """Teach a selector which crops the best weights of a run look at, and write it beside them.

    The teacher sees the run's training photos un-augmented: their features are read from the run's store, or
    computed once and kept there. (Of a flipped global view left is right, so the augmented copies that the
    head learns from would teach the wrong crops.) Validation photos choose a threshold for every number of
    crops, as they do for all views; target photos take no part.

    Collective where there are several ranks: each computes its share of missing features; all train alike,
    and rank 0 writes.

    Raises:
        ConfigError: the model has no gates that say which views matter, or photos have one view only.
        DataError: the training photos cannot be used, or are too few.
        CheckpointError: the best weights are absent or damaged, or the backbone is another.
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
        raise ConfigError("views.policy is 'global': photos have no crops to select among")
    if not FUSIONS[fusion_name(config.model)].gates_views and config.model.prune_keep == 1:
        raise ConfigError(
            f"model.view_fusion is {config.model.view_fusion!r} and model.prune_keep is 1: the model has no "
            "gates that say which views matter; train with one of them"
        )


@dataclass(frozen=True)
class Seen:
    """A batch with the features of all views, and what the global views show inside the crops' frames."""

    batch: Batch
    regions: Tensor  # [B, K, C]


@torch.no_grad()
def teach(predictor: Predictor, dataset: RoadworkDataset, config: ExperimentConfig) -> Teaching:
    """What the full model says about the photos of a data set that have crops."""
    regions: list[Tensor] = []
    gates: list[Tensor] = []
    rows: list[Tensor] = []
    for seen in seen_batches(predictor, dataset, config):
        with_crops = seen.batch["view_mask"].sum(dim=1) > 1
        if bool(with_crops.any()):  # else the batch has no place for crops
            gates.append(predictor.forward(seen.batch).view_gates[with_crops, 1:].float().cpu())
            regions.append(seen.regions[with_crops].cpu())
            rows.append(seen.batch["index"][with_crops].cpu())
    if not rows:
        raise DataError(f"{dataset.manifest.name}: no photo is large enough to have crops to select among")
    held_out = hold_out(dataset.manifest, config.seed)[torch.cat(rows)]
    return Teaching(torch.cat(regions), torch.cat(gates), held_out)


@torch.no_grad()
def thresholds_of(
    predictor: Predictor, selector: ViewSelector, dataset: RoadworkDataset, config: ExperimentConfig
) -> dict[int, float]:
    """The best decision threshold on labelled photos for every number of crops.

    A model that sees less is less sure, so the threshold for all views is not the best one for some.
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
    """The photos of a data set, all views of them, on the device.

    Features come from the data set's store where it has one; what the global view shows is kept nowhere, so
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
    """[N] bool: photos of a fifth of the places and groups (at least one), drawn by the seed."""
    groups = torch.from_numpy(groups_of(manifest))
    distinct = groups.unique()  # type: ignore[no-untyped-call]
    order = torch.from_numpy(generator_for(seed, "distil-hold-out").permutation(len(distinct)))
    taken = distinct[order[: max(1, round(HELD_OUT * len(distinct)))]]
    return torch.isin(groups, taken)
