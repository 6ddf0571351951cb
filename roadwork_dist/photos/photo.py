"""From the bytes of a photo to its (augmented) views: decode, cut, augment.

The feature store, the online data set and the predictor all go through here, so they see the same
pixels for the same draws.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from roadwork_dist.photos.augment import Augmenter
from roadwork_dist.photos.augment.batched import ViewDraws
from roadwork_dist.photos.images import MAX_PIXELS, ImageSource
from roadwork_dist.photos.jpeg import decode_for_views
from roadwork_dist.photos.views import ViewGeometry, make_views


def views_of_photo(
    source: ImageSource | bytes,
    geometry: ViewGeometry,
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Decode a photo no larger than needed and cut its views.

    Args:
        source: where the photo is, or its bytes.
        geometry: which views.
        name: what messages call the photo; None = the source's name.
        max_pixels: photos with more pixels are refused.

    Returns:
        [V, 3, S, S] uint8.

    Raises:
        ConfigError: the GPU is to decode, and there is none.
        DataError: the photo cannot be read; the message names it.
    """
    original_size = getattr(source, "original_size", None)  # of a compact photo: views lie as in its original
    if not isinstance(source, bytes):
        name = name or source.name
        source = source.read()
    if geometry.decoder == "nvjpeg" and original_size is None:
        return _from_gpu(source, geometry, name or "photo", max_pixels)
    stored = decode_for_views(source, geometry, name=name or "photo", max_pixels=max_pixels)
    return make_views(stored.pixels, geometry, original_size or stored.photo_size, stored.orientation)


def _from_gpu(data: bytes, geometry: ViewGeometry, name: str, max_pixels: int) -> Tensor:
    from roadwork_dist.photos.nvjpeg import check_nvjpeg, views_on_gpu

    check_nvjpeg()
    device = torch.device("cuda", torch.cuda.current_device())
    (views,) = views_on_gpu([data], geometry, device=device, names=[name], max_pixels=max_pixels)
    return views.cpu()  # what follows (mixing, page-locked buffers) works with views of the CPU


@dataclass(frozen=True)
class PhotoViews:
    """How a photo becomes views: geometry, augmentation and the limit of its size.

    Args:
        geometry: which views.
        augmenter: ``None`` for views as they are.
        max_pixels: photos with more pixels are refused.
        on_device: training rows bring plain views and what these drew, and are augmented behind the copy
            to the device, in batches; otherwise they bring augmented views.
    """

    geometry: ViewGeometry
    augmenter: Augmenter | None = None
    max_pixels: int = MAX_PIXELS
    on_device: bool = False

    def copies(self) -> list[int | None]:
        """The copies that a feature store keeps of each photo; ``[None]`` without augmentation."""
        return [None] if self.augmenter is None else list(range(self.augmenter.config.copies))

    def copy_of_epoch(self, epoch: int) -> int | None:
        """The copy that ``epoch`` uses; ``None`` without augmentation."""
        return None if self.augmenter is None else self.augmenter.draw_epoch(epoch)

    def plain(self, source: ImageSource | bytes, *, name: str | None = None) -> Tensor:
        """The un-augmented views, [V, 3, S, S] uint8.

        Raises:
            DataError: the photo cannot be read.
        """
        return views_of_photo(source, self.geometry, name=name, max_pixels=self.max_pixels)

    def augmented(self, views: Tensor, sample_id: str, copy: int | None) -> Tensor:
        """A copy of un-augmented views: [V, 3, S, S] uint8; ``copy`` as of :meth:`copy_of_epoch`."""
        if self.augmenter is None or copy is None:
            return views
        return self.augmenter(views, sample_id, copy)

    def draws(self, views: Tensor, sample_id: str, copy: int | None) -> list[ViewDraws]:
        """What the views of a copy draw, for ``augmented_on_device``: there they become :meth:`augmented`."""
        if self.augmenter is None or copy is None:
            return [{} for _ in views]
        return self.augmenter.draws(sample_id, copy, len(views), views.shape[-1])

    def row(self, source: ImageSource | bytes, sample_id: str, copy: int | None) -> dict[str, Any]:
        """The views of a training row as ``views``, and with ``on_device`` what they drew as ``draws``.

        Raises:
            DataError: the photo cannot be read.
        """
        plain = self.plain(source)
        if self.on_device and self.augmenter is not None:
            return {"views": plain, "draws": self.draws(plain, sample_id, copy)}
        return {"views": self.augmented(plain, sample_id, copy)}
