"""Feature extraction for an experiment's photos, as a separate step before training."""

import time
from dataclasses import dataclass

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.config.experiment import ExperimentConfig
from roadwork_dist.detector.backbone import load_backbone
from roadwork_dist.recipes.data import DatasetBuilder, load_manifests
from roadwork_dist.recipes.pretrain import evaluated
from roadwork_dist.trainer.engine.accelerator import build_accelerator, share_cores


@dataclass(frozen=True)
class ExtractedSet:
    """Result for one set of photos, of all ranks together."""

    name: str
    photos: int
    copies: int
    computed: int
    found: int
    unreadable: int
    seconds: float
    folder: str

    def __str__(self) -> str:
        copies = f" × {self.copies} augmented copies" if self.copies > 1 else ""
        speed = f" at {self.computed / self.seconds:.1f} images/s" if self.computed else ""
        unreadable = f", {self.unreadable} photos unreadable" if self.unreadable else ""
        return (
            f"{self.name}: {self.photos} photos{copies}: {self.computed} computed{speed}, {self.found} found"
            f"{unreadable}; in {self.folder}"
        )


def extract_features(config: ExperimentConfig) -> list[ExtractedSet]:
    """Compute the features that ``pretrain`` with these settings would compute before its first step.

    A collective: under a launcher every rank computes its share, and all return the same result.

    Raises:
        ConfigError: the settings cache no features, or the store cannot be written.
        DataError: the data cannot be used.
        BackboneError: the backbone cannot be loaded.
    """
    if not config.keeps_features:
        raise ConfigError(
            f"features.mode is {config.features.mode!r}, backbone.trainable {config.backbone.trainable!r}, "
            f"augment.copies {config.augment.copies}: with these settings no features are cached; expected a "
            "frozen backbone and at least one copy, or set features.mode to cached"
        )
    share_cores(config.workers)
    accelerator = build_accelerator(device=config.device)
    manifests = load_manifests(config)
    backbone = load_backbone(config.backbone, device=accelerator.device)
    builder = DatasetBuilder(config, backbone, accelerator, masks=False)
    sets = [(manifests.train, True), *((manifest, False) for manifest in evaluated(manifests).values())]
    done = []
    for manifest, augment in sets:
        started = time.monotonic()
        kept = builder.features(manifest, augment=augment)
        done.append(
            ExtractedSet(
                manifest.name,
                len(manifest),
                len(kept.views.copies()),
                kept.done.computed,
                kept.done.found,
                len(kept.done.unreadable),
                time.monotonic() - started,
                str(kept.store.folder),
            )
        )
    return done
