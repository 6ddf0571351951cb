"""Compact photos: downscaled to the shared image that views are cut from."""

import math

import numpy as np
from torch.nn import functional as F

from roadwork_dist.photos.images import MAX_PIXELS, BytesImage, decode
from roadwork_dist.photos.views import ViewGeometry, layout_of

_LEAST_SIDE = 64
"""As in :func:`~roadwork_dist.photos.images.decode`, which rejects smaller images."""


def compact_size(geometry: ViewGeometry, width: int, height: int) -> tuple[int, int]:
    """Width and height in px at which an upright photo of ``width`` x ``height`` px is stored.

    This is the size of the shared image, so views are cut from it without another resize. Photos are never
    enlarged. Where only the global view is cut, the short side is S px.
    """
    layout = layout_of(geometry, width, height)
    stored = layout.shared
    if not layout.tiles:
        scale = geometry.size / min(width, height)
        stored = (math.ceil(width * scale), math.ceil(height * scale))
    shrinks = stored[0] < width and stored[1] < height and min(stored) >= _LEAST_SIDE
    return stored if shrinks else (width, height)


def compact_photo(
    photo: BytesImage, geometry: ViewGeometry, quality: int = 95, *, max_pixels: int = MAX_PIXELS
) -> bytes:
    """Encode a photo as an upright JPEG (4:4:4) of :func:`compact_size`, without EXIF.

    Args:
        photo: the encoded photo, in any supported format.
        geometry: geometry of the views that will be cut from it.
        quality: JPEG quality, 1 to 100.
        max_pixels: photos with more pixels are refused.

    Returns:
        The JPEG, or the photo's own bytes if it is not downscaled and they are no more than the JPEG's.

    Raises:
        DataError: the photo cannot be read.
    """
    import simplejpeg

    pixels = decode(photo, max_pixels=max_pixels)
    height, width = pixels.shape[1:]
    stored = compact_size(geometry, width, height)
    if stored != (width, height):
        pixels = F.interpolate(pixels[None], size=stored[::-1], mode="lanczos", antialias=True)[0]
    interleaved = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    compact: bytes = simplejpeg.encode_jpeg(interleaved, quality=quality, colorsubsampling="444")
    return photo.data if stored == (width, height) and len(photo.data) <= len(compact) else compact
