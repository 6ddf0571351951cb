"""Builds the data sets of an experiment: loads and checks photos, cuts views, computes cached features."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from roadwork_dist.common.errors import RoadworkError
from roadwork_dist.config.experiment import ExperimentConfig
from roadwork_dist.datasets.dataset import RoadworkDataset
from roadwork_dist.datasets.mix import MixedRows
from roadwork_dist.datasets.streamed import StreamedDataset
from roadwork_dist.detector.backbone import Backbone
from roadwork_dist.features.content_hashes import content_hashes
from roadwork_dist.features.extract import Extraction, extract
from roadwork_dist.features.masks import faulty_masks, mask_targets
from roadwork_dist.features.store import FeatureSpace, FeatureStore
from roadwork_dist.features.text import TextCache, TextEmbeddings, embed_descriptions
from roadwork_dist.inference.predictor import plain_views
from roadwork_dist.photos.augment.policy import augmenter_for
from roadwork_dist.photos.check import check_images, drop_unreadable, refuse_too_many
from roadwork_dist.photos.manifest import Manifest
from roadwork_dist.photos.photo import PhotoViews
from roadwork_dist.recipes.progress import progress_bar
from roadwork_dist.sources import load_manifest
from roadwork_dist.sources.splits import groups_of, stratified_group_split
from roadwork_dist.storage.remote.image import are_on_server
from roadwork_dist.trainer.engine.collectives import gather_results
from roadwork_dist.trainer.feed.dataset import MapDataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Manifests:
    """The photos of an experiment."""

    train: Manifest
    val: Manifest
    target: Manifest | None


def load_manifests(config: ExperimentConfig) -> Manifests:
    """Read the sources; without a validation source, split validation photos off the training photos.

    Raises:
        DataError: a source cannot be used; the message names file and row.
    """
    data = config.data
    train = load_manifest(data.train, data, name="train").labelled()
    target = load_manifest(data.target, data, name="target") if data.target else None
    if data.val is not None:
        return Manifests(train, load_manifest(data.val, data, name="val").labelled(), target)
    return Manifests(*split_off(train, config), target)


def split_off(train: Manifest, config: ExperimentConfig) -> tuple[Manifest, Manifest]:
    """Training and validation photos, stratified by label and split by place and group.

    Raises:
        DataError: there are too few photos or groups of a label.
    """
    kept, held_out = stratified_group_split(
        train.labels, groups_of(train), config.data.val_share, config.seed
    )
    return train.subset(kept.tolist(), name="train"), train.subset(held_out.tolist(), name="val")


def photo_views(config: ExperimentConfig, backbone: Backbone, *, augment: bool) -> PhotoViews:
    """How photos become views for a backbone."""
    plain = plain_views(config.views, backbone, config.data.max_pixels)
    if not augment:
        return plain
    # Mixing needs augmented photos and runs in the loader, so then the augmentation must, too.
    can_wait = not config.keeps_features and config.augment.mix == "off"
    on_device = can_wait and next(backbone.buffers()).device.type == "cuda"
    return replace(plain, augmenter=augmenter_for(config.augment, config.seed), on_device=on_device)


def training_rows(
    rows: MapDataset,
    labels: Sequence[int],
    config: ExperimentConfig,
    weights: Sequence[float] | None = None,
) -> MapDataset:
    """The rows to train on, mixed with each other if configured.

    Args:
        rows: the augmented rows to train on; mixing partners are drawn from them only.
        labels: label of each row.
        config: the experiment.
        weights: sampling weight of each row; None = equal weights.
    """
    if config.augment.mix == "off" or not config.augment.enabled:
        return rows
    return MixedRows(rows, labels, config.augment, seed=config.seed, weights=weights)


@dataclass(frozen=True)
class KeptFeatures:
    """The readable photos of a manifest, and where their features are."""

    manifest: Manifest
    views: PhotoViews
    store: FeatureStore
    hashes: Sequence[str | None]
    done: Extraction
    """What all ranks together computed and found in the store."""


class DatasetBuilder:
    """Builds the data sets of one experiment; shared resources are loaded once.

    Args:
        config: the experiment.
        backbone: frozen, on its device; computes the missing features.
        accelerator: provides rank and device.
        masks: rows include targets of the mask head.
    """

    def __init__(
        self, config: ExperimentConfig, backbone: Backbone, accelerator: Accelerator, *, masks: bool
    ) -> None:
        self.config, self.backbone, self.accelerator, self.masks = config, backbone, accelerator, masks
        self.root = Path(config.features.dir)
        self._text_tools: tuple[Callable[[list[str]], Tensor], TextCache] | None = None

    def build(self, manifest: Manifest, *, augment: bool) -> RoadworkDataset:
        """A data set of the readable photos of a manifest.

        Raises:
            DataError: more photos are unreadable than ``data.max_unreadable_share`` allows.
            BackboneError: photos have descriptions and their encoder cannot be loaded.
        """
        if self._reads_text(manifest):
            self._text_encoder()  # fail before features are computed if it cannot be loaded
        if not self.config.keeps_features:
            views = photo_views(self.config, self.backbone, augment=augment)
            if augment and are_on_server(sample.image for sample in manifest):
                return self._streamed(manifest, views)
            return self._dataset(self._readable(manifest), views, None, None)
        kept = self.features(manifest, augment=augment)
        dataset = self._dataset(kept.manifest, kept.views, kept.store, kept.hashes)
        if self.config.features.on_device == "auto":
            # Mixing computes on single rows, on the CPU.
            mixes = augment and self.config.augment.mix != "off"
            dataset.make_resident(torch.device("cpu") if mixes else self.accelerator.device)
        return dataset

    def features(self, manifest: Manifest, *, augment: bool) -> KeptFeatures:
        """Compute the features of a manifest that are missing in the store, each rank its share.

        A collective: every rank returns when all shares are computed, or raises when one is not.

        Raises:
            DataError: more photos or masks are unreadable than ``data.max_unreadable_share`` allows.
            BackboneError: the backbone gave features that are not finite.
            ConfigError: the store cannot be written.
        """
        views = photo_views(self.config, self.backbone, augment=augment)
        store = FeatureStore(self.root, self._space(views))
        hashes = self._content(manifest)
        faulty = self._faulty_masks(manifest, hashes) if self.masks else {}
        most = self.config.data.max_unreadable_share
        refuse_too_many(manifest.name, list(faulty.values()), len(manifest), most)  # not hours later
        done = self._extract(manifest, hashes, views, store)
        done = replace(done, unreadable=dict(sorted((faulty | done.unreadable).items())))
        if self.accelerator.is_main_process:
            store.note(self.backbone.name, manifest.name, len(manifest))
        store.reload()
        readable = drop_unreadable(manifest, done.unreadable, most)
        hashes = [value for row, value in enumerate(hashes) if row not in done.unreadable]
        return KeptFeatures(readable, views, store, hashes, done)

    def _streamed(self, manifest: Manifest, views: PhotoViews) -> RoadworkDataset:
        """Training photos on a server; unreadable ones are found only when they are read."""
        return StreamedDataset(
            manifest,
            views=views,
            text=self._text(manifest) if self._reads_text(manifest) else None,
            masks=self.masks,
            max_share=self.config.data.max_unreadable_share,
            processes=self.accelerator.num_processes,
        )

    def _readable(self, manifest: Manifest) -> Manifest:
        with progress_bar(f"checking {manifest.name}", self.accelerator) as advance:
            return check_images(
                manifest,
                max_share=self.config.data.max_unreadable_share,
                max_pixels=self.config.data.max_pixels,
                workers=max(1, self.config.workers),
                on_progress=advance,
            ).readable

    def _content(self, manifest: Manifest) -> list[str | None]:
        """Content hash of each photo. A collective: every rank hashes a part, and all get the whole list."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        images = [sample.image for sample in manifest.samples[rank::ranks]]
        shares = gather_results(lambda: content_hashes(images, self.root))
        hashes: list[str | None] = [None] * len(manifest)
        for number, share in enumerate(shares):
            hashes[number::ranks] = share
        return hashes

    def _faulty_masks(self, manifest: Manifest, hashes: Sequence[str | None]) -> dict[int, str]:
        """Problems of masks, by row. A collective: every rank checks a part of them."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        samples, limit = manifest.samples[rank::ranks], self.config.data.max_pixels
        shares = gather_results(
            lambda: faulty_masks(samples, hashes[rank::ranks], self.root, max_pixels=limit)
        )
        return {n + row * ranks: fault for n, share in enumerate(shares) for row, fault in share.items()}

    def _extract(
        self, manifest: Manifest, hashes: Sequence[str | None], views: PhotoViews, store: FeatureStore
    ) -> Extraction:
        """Compute missing features, each rank its share; returns the result of all ranks together."""
        accelerator = self.accelerator

        def own_share() -> Extraction:
            try:
                with progress_bar(f"features of {manifest.name}", accelerator, unit="images") as advance:
                    return extract(
                        manifest.samples,
                        hashes,
                        views=views,
                        store=store,
                        encode=self.backbone,
                        batch_views=self.config.features.batch_views,
                        augment_on=accelerator.device if accelerator.device.type == "cuda" else None,
                        workers=self.config.workers,
                        share=(accelerator.process_index, accelerator.num_processes),
                        on_progress=advance,
                    )
            except RoadworkError as error:  # log it now, since the other ranks may compute for hours
                logger.error("features of %s: %s", manifest.name, error)
                raise

        # Gathering ensures that all shares are computed before a feature is read, and that all ranks leave
        # out the same photos.
        shares = gather_results(own_share)
        unreadable = {row: text for each in shares for row, text in each.unreadable.items()}
        computed, found = (sum(getattr(each, name) for each in shares) for name in ("computed", "found"))
        return Extraction(computed, found, unreadable)

    def _space(self, views: PhotoViews) -> FeatureSpace:
        augmenter, share = views.augmenter, self.config.backbone.token_merging
        merging = [f"token_merging {share}"] if share else []
        return FeatureSpace(
            views=views.geometry.identity(),
            augment=None if augmenter is None else augmenter.identity(),
            backbone=" ".join([self.backbone.identity, self.config.backbone.dtype, *merging]),
            dtype=self.config.features.dtype,
        )

    def _dataset(
        self,
        manifest: Manifest,
        views: PhotoViews,
        store: FeatureStore | None,
        hashes: Sequence[str | None] | None,
    ) -> RoadworkDataset:
        masks = mask_targets([s.mask for s in manifest], self.root, photos=hashes) if self.masks else None
        text = self._text(manifest) if self._reads_text(manifest) else None
        return RoadworkDataset(manifest, views=views, store=store, hashes=hashes, text=text, masks=masks)

    def _reads_text(self, manifest: Manifest) -> bool:
        return self.config.model.metadata and any(sample.description for sample in manifest)

    def _text(self, manifest: Manifest) -> TextEmbeddings:
        encode, cache = self._text_encoder()
        return embed_descriptions([sample.description for sample in manifest], encode, cache)

    def _text_encoder(self) -> tuple[Callable[[list[str]], Tensor], TextCache]:
        if self._text_tools is None:
            from roadwork_dist.detector.text import load_text_encoder

            encoder = load_text_encoder(self.config.data.text_encoder)
            self._text_tools = encoder, TextCache(self.root, encoder.identity)
        return self._text_tools
