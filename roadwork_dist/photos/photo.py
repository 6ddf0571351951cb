"""The pipeline from a photo's bytes to its (augmented) views: decode, cut, augment.

The feature store, the online dataset and the predictor all use it, so they see the same pixels for the
same random draws.
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
    """Decode a photo at the smallest sufficient size and cut its views.

    Args:
        source: source of the photo, or its encoded bytes.
        geometry: which views.
        name: name of the photo in messages; None = the source's name.
        max_pixels: photos with more pixels are refused.

    Returns:
        [V, 3, S, S] uint8.

    Raises:
        ConfigError: decoding on a GPU is configured, but there is none.
        DataError: the photo cannot be read; the message names it.
    """
    original_size = getattr(
        source, "original_size", None
    )  # of a compact photo's original, which sets the layout
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
    return views.cpu()  # the next steps (mixing, page-locked buffers) expect views on the CPU


@dataclass(frozen=True)
class PhotoViews:
    """How a photo becomes views: geometry, augmentation and the size limit.

    Args:
        geometry: which views.
        augmenter: ``None`` = no augmentation.
        max_pixels: photos with more pixels are refused.
        on_device: training rows hold plain views and their draws, and are augmented in batches after the
            copy to the device; otherwise rows hold augmented views.
    """

    geometry: ViewGeometry
    augmenter: Augmenter | None = None
    max_pixels: int = MAX_PIXELS
    on_device: bool = False

    def copies(self) -> list[int | None]:
        """The augmented copies of each photo that a feature store keeps; ``[None]`` without augmentation."""
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
        """Augment plain views: [V, 3, S, S] uint8; ``copy`` comes from :meth:`copy_of_epoch`."""
        if self.augmenter is None or copy is None:
            return views
        return self.augmenter(views, sample_id, copy)

    def draws(self, views: Tensor, sample_id: str, copy: int | None) -> list[ViewDraws]:
        """The draws of a copy's views; ``augmented_on_device`` with them equals :meth:`augmented`."""
        if self.augmenter is None or copy is None:
            return [{} for _ in views]
        return self.augmenter.draws(sample_id, copy, len(views), views.shape[-1])

    def row(self, source: ImageSource | bytes, sample_id: str, copy: int | None) -> dict[str, Any]:
        """A training row: its views as ``views`` and, with ``on_device``, their draws as ``draws``.

        Raises:
            DataError: the photo cannot be read.
        """
        plain = self.plain(source)
        if self.on_device and self.augmenter is not None:
            return {"views": plain, "draws": self.draws(plain, sample_id, copy)}
        return {"views": self.augmented(plain, sample_id, copy)}
