"""Loads views of a run's photos for pictures in a report, without loading its backbone."""

import logging
from functools import cached_property
from typing import Any

from roadwork_dist.common.errors import DataError
from roadwork_dist.config.experiment import ExperimentConfig, ViewsConfig
from roadwork_dist.evaluation.predictions import OUT_OF_FOLD
from roadwork_dist.photos.manifest import Sample
from roadwork_dist.photos.photo import PhotoViews
from roadwork_dist.photos.views import ViewGeometry
from roadwork_dist.sources import load_manifest

logger = logging.getLogger(__name__)


class PicturesOfRun:
    """Views of a run's photos by split and id, decoded on demand; tables are read on first use.

    Very elongated photos are padded with ImageNet's mean colour, not with the backbone's.

    Args:
        config: settings of the run.
        views: how the run cut its photos, with ``size`` in px.

    Raises:
        ConfigError: the tiles would leave gaps.
        ValueError: ``size`` is ``auto``.
    """

    def __init__(self, config: ExperimentConfig, views: ViewsConfig) -> None:
        if views.size == "auto":
            raise ValueError("views.size is 'auto', expected the size of a view in px")
        self._config = config
        self._views = PhotoViews(
            ViewGeometry(views.size, views.grid, views.scale, views.policy), None, config.data.max_pixels
        )

    def __call__(self, split: str, sample_id: str) -> Any:
        """[V, 3, S, S] uint8.

        Raises:
            DataError: the photo is not available; the message says why.
        """
        is_of_train = split == OUT_OF_FOLD or (split == "val" and self._config.data.val is None)
        sample = self._samples.get(("train" if is_of_train else split, sample_id))
        if sample is None:
            raise DataError(f"{sample_id} is not in the run's sources")
        return self._views.plain(sample.image).numpy()

    @cached_property
    def _samples(self) -> dict[tuple[str, str], Sample]:
        """By source and id; ids are unique within a source only."""
        data = self._config.data
        found: dict[tuple[str, str], Sample] = {}
        for name, source in (("val", data.val), ("target", data.target), ("train", data.train)):
            if source is None or (name == "train" and data.val is not None):
                continue
            try:
                manifest = load_manifest(source, data, name=name)
            except DataError as error:
                logger.warning("no pictures of %s: %s", name, error)
                continue
            found |= {(name, sample.id): sample for sample in manifest}
        return found
