"""Adds the position of each view on the photo to the rows of a data set."""

from dataclasses import replace

import torch
from torch import Tensor

from roadwork_dist.datasets.dataset import RoadworkDataset, Row
from roadwork_dist.photos.images import photo_size
from roadwork_dist.photos.photo import PhotoViews
from roadwork_dist.photos.views import photo_boxes
from roadwork_dist.trainer.feed.dataset import WrappedDataset


class BoxedRows(WrappedDataset[Row]):
    """The rows of a data set with ``boxes``, which the crop selection needs.

    Args:
        dataset: the rows.
        views: how a photo becomes views.
    """

    dataset: RoadworkDataset

    def __init__(self, dataset: RoadworkDataset, views: PhotoViews) -> None:
        super().__init__(dataset)
        self.views = views

    def __getitem__(self, index: int) -> Row:
        """One row.

        Raises:
            DataError: the photo cannot be read.
        """
        row = self.dataset[index]
        height, width = photo_size(self.dataset.manifest[index].image, max_pixels=self.views.max_pixels)
        return {**row, "boxes": view_boxes(self.views, width, height)}


def view_boxes(views: PhotoViews, width: int, height: int) -> Tensor:
    """[V, 4] left, top, width and height of all views that a photo may have, as fractions of its size.

    Includes views that a small photo does not get, so all rows have the same shape.
    """
    boxes = photo_boxes(replace(views.geometry, policy="all"), width, height)
    return torch.tensor(boxes, dtype=torch.float32) / torch.tensor([width, height, width, height])
