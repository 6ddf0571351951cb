"""Compact shards for an experiment: the views they are made for, and their effect on the features.

V views of a photo · D width of the backbone
"""

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from roadwork_dist.config.experiment import ExperimentConfig
from roadwork_dist.detector.backbone import Backbone, load_backbone
from roadwork_dist.inference.predictor import plain_views
from roadwork_dist.photos.manifest import Manifest
from roadwork_dist.photos.photo import PhotoViews
from roadwork_dist.photos.views import ViewGeometry, geometry_for
from roadwork_dist.recipes.progress import progress_bar
from roadwork_dist.sources.shards import read_shards


class Compaction:
    """The views that compact shards are made for.

    Args:
        config: views and backbone.
        samples: number of photos that :meth:`loss` measures; 0 = none, then the backbone is loaded only if
            ``views.size`` is ``auto``.

    Raises:
        BackboneError: the backbone cannot be loaded.
    """

    def __init__(self, config: ExperimentConfig, *, samples: int) -> None:
        self.config, self.samples = config, samples
        self._backbone: Backbone | None = None
        if samples or config.views.size == "auto":
            device = None if config.device == "auto" else torch.device(config.device)
            self._backbone = load_backbone(config.backbone, device=device)

    @property
    def geometry(self) -> ViewGeometry:
        """The views; without a backbone, the padding colour (which is not stored) is the default."""
        if self._backbone is None:
            return geometry_for(self.config.views, 0, ViewGeometry.pad_colour)
        return self._views(self._backbone).geometry

    def loss(self, originals: Manifest, folder: Path) -> list[str]:
        """Cosine similarity of the features of original and compact photos, as lines to print.

        Args:
            originals: the source of the shard set.
            folder: the finished shard set.
        """
        backbone = self._backbone
        if backbone is None or not self.samples:
            return []
        compact = read_shards(folder, self.config.data)
        rows = np.linspace(0, len(compact) - 1, min(self.samples, len(compact))).round().astype(int)
        by_id = {sample.id: sample for sample in originals}
        found: dict[str, list[float]] = defaultdict(list)
        views = self._views(backbone)
        with progress_bar("features of originals and compact photos") as advance:
            for done, row in enumerate(rows.tolist()):
                features = [
                    backbone(views.plain(sample.image)).float().cpu()  # V D
                    for sample in (by_id[compact[row].id], compact[row])
                ]
                for kind, value in zip(view_kinds(len(features[0])), cosines(*features), strict=True):
                    found[kind].append(value)
                advance(done + 1, len(rows))
        name = f"{backbone.name}, {self.config.backbone.dtype}, {len(rows)} photos"
        return [
            f"cosine similarity of features, original against compact ({name}):",
            *(
                f"  {kind:<7} mean {np.mean(values):.4f}, least {min(values):.4f}"
                for kind, values in found.items()
            ),
        ]

    def _views(self, backbone: Backbone) -> PhotoViews:
        return plain_views(self.config.views, backbone, self.config.data.max_pixels)


def view_kinds(count: int) -> list[str]:
    """Kind of each view of a photo: the whole photo, a tile, or one of the two squares."""
    return ["global"] if count == 1 else ["global", *["tiles"] * (count - 3), *["squares"] * 2]


def cosines(left: Tensor, right: Tensor) -> list[float]:
    """Cosine similarity of two [V, D] tensors, per view."""
    values: list[float] = torch.nn.functional.cosine_similarity(left, right, dim=1).tolist()
    return values
