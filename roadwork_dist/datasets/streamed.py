"""Training data set of photos on a server, which are not checked before training.

Local photos are all decoded once before training, and unreadable ones are left out. For photos on a server
that would mean reading the whole set before the first step. Here the row of an unreadable photo is kept, so
that every process still has the same number of batches, but it contributes nothing to the loss: no label, no
weather, no mask, and a single black view, which has no consistency target.
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

_MAX_NAMED = 5
"""Unreadable photos that a process names; after that it logs only their number, at each power of two."""


class StreamedDataset(RoadworkDataset):
    """Photos on a server, as views.

    Each process counts the photos that it and its loader processes could not read. If they clearly exceed its
    part of ``max_share``, the run ends. If the server is down altogether, the run ends at once.

    Args:
        manifest: the samples.
        views: how a photo becomes views.
        text: embeddings of the descriptions; ``None`` = all descriptions count as unknown.
        masks: rows include targets of the mask head, decoded when they are read.
        max_share: share of unreadable photos above which the run stops.
        processes: number of processes that train on the rows together.
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
        # In shared memory, since loader processes, which are restarted every epoch, count together.
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
        """Number of unreadable photos that one process may encounter.

        Its part of the total, plus three standard deviations (Poisson), since unreadable photos are spread
        unevenly over the processes.
        """
        part = self.max_share * len(self) / self.processes
        return part if self.processes == 1 else part + 3 * math.sqrt(part)

    def _count(self, index: int, error: DataError) -> None:
        if self._is_unreadable[index]:
            return
        self._is_unreadable[index] = 1
        count = int(self._is_unreadable.sum())
        if count <= _MAX_NAMED:
            logger.warning("%s: training without an unreadable photo: %s", self.manifest.name, error)
        elif count & (count - 1) == 0:
            logger.warning("%s: %d photos so far are unreadable for this process", self.manifest.name, count)
        if count > self.most_unreadable:
            raise DataError(
                f"{self.manifest.name}: {count} photos are unreadable for one of {self.processes} processes, "
                f"expected at most {self.max_share:.1%} of {len(self)} photos over all of them: fix or "
                f"remove them, or raise data.max_unreadable_share. {error}"
            )


def _no_mask() -> dict[str, Tensor | bool]:
    return {"mask": torch.zeros((len(MASK_CLASSES), MASK_SIDE, MASK_SIDE)), "mask_known": False}
