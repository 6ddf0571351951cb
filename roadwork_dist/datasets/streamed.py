"""Training rows of photos on a server, which nobody has looked at before.

Photos on this machine are all decoded once before training, and unreadable ones are left out. Of a set on a
server that would be a pass over all of it before the first step. Here a row whose photo cannot be read
stays in its place, so that every process goes on to have the same number of batches, and counts for
nothing: no label, no weather, no mask, and a single black view, which needs to agree with none.
"""

import logging
import math
from typing import Any

import torch
from torch import Tensor

from roadwork_dist.common.errors import DataError
from roadwork_dist.config.batch import MASK_CLASSES, MASK_SIDE, UNLABELLED, WEATHER
from roadwork_dist.datasets.dataset import RoadworkDataset
from roadwork_dist.features.text import TextEmbeddings
from roadwork_dist.photos.manifest import Manifest, Sample
from roadwork_dist.photos.mask_images import decode_mask
from roadwork_dist.photos.photo import PhotoViews
from roadwork_dist.storage.remote.retry import ServerDownError

logger = logging.getLogger(__name__)

_TOLD = 5
"""Unreadable photos that a process names; of the others it tells the number, at each power of two."""


class StreamedDataset(RoadworkDataset):
    """Photos of a server, as views.

    Each process counts the photos that it and its loader processes could not read; clearly more than its part
    of ``max_share`` end the run. A server that is down altogether ends it at once: there is nothing to go on
    with.

    Args:
        manifest: the samples.
        views: how a photo becomes views.
        text: embeddings of the descriptions; ``None`` = every description counts as null.
        masks: rows bring targets of the mask head, decoded when they are read.
        max_share: share of unreadable photos above which the run stops.
        processes: that train on the rows together.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        views: PhotoViews,
        text: TextEmbeddings | None = None,
        masks: bool = False,
        max_share: float = 0.01,
        processes: int = 1,
    ) -> None:
        super().__init__(manifest, views=views, text=text)
        self.reads_masks, self.max_share, self.processes = masks, max_share, processes
        # In shared memory: loader processes, which are new ones in every epoch, count together.
        counts = torch.zeros(len(manifest), dtype=torch.uint8)
        self._is_unreadable: Tensor = counts.share_memory_()  # type: ignore[no-untyped-call]

    def _pixels_or_features(self, sample: Sample, index: int) -> dict[str, Any]:
        try:
            row: dict[str, Any] = super()._pixels_or_features(sample, index)
            return row | self._mask(sample) if self.reads_masks else row
        except ServerDownError:
            raise
        except DataError as error:
            self._count(index, error)
        side = self.views.geometry.size
        blank = {"views": torch.zeros((1, 3, side, side), dtype=torch.uint8)}
        row = blank | {"label": UNLABELLED, "weather": len(WEATHER)}
        return row | _no_mask() if self.reads_masks else row

    def _mask(self, sample: Sample) -> dict[str, Tensor | bool]:
        if sample.mask is None:
            return _no_mask()
        return {"mask": decode_mask(sample.mask), "mask_known": True}

    @property
    def unreadable(self) -> list[int]:
        """Rows that this process and its loader processes could not read."""
        return [int(row) for row in self._is_unreadable.nonzero().flatten()]

    @property
    def most_unreadable(self) -> float:
        """Unreadable photos that one of the processes may meet.

        Its part of all, and three standard deviations, for chance deals photos out unevenly (Poisson).
        """
        part = self.max_share * len(self) / self.processes
        return part if self.processes == 1 else part + 3 * math.sqrt(part)

    def _count(self, index: int, error: DataError) -> None:
        if self._is_unreadable[index]:
            return
        self._is_unreadable[index] = 1
        count = int(self._is_unreadable.sum())
        if count <= _TOLD:
            logger.warning("%s: trains without a photo that is unreadable: %s", self.manifest.name, error)
        elif count & (count - 1) == 0:
            logger.warning("%s: %d photos so far are unreadable for this process", self.manifest.name, count)
        if count > self.most_unreadable:
            raise DataError(
                f"{self.manifest.name}: {count} photos are unreadable for one of {self.processes} processes, "
                f"expected at most {self.max_share:.1%} of {len(self)} photos over all of them: mend or "
                f"remove them, or raise data.max_unreadable_share. {error}"
            )


def _no_mask() -> dict[str, Tensor | bool]:
    return {"mask": torch.zeros((len(MASK_CLASSES), MASK_SIDE, MASK_SIDE)), "mask_known": False}
