"""The compact form of a photo: what its views are cut from, instead of all its pixels."""

import math

import numpy as np
from torch.nn import functional as F

from roadwork_dist.photos.images import MAX_PIXELS, BytesImage, decode
from roadwork_dist.photos.views import ViewGeometry, layout_of

_LEAST_SIDE = 64
"""As of :func:`~roadwork_dist.photos.images.decode`, which refuses smaller pictures."""


def compact_size(geometry: ViewGeometry, width: int, height: int) -> tuple[int, int]:
    """Width and height in px in which an upright photo of ``width`` x ``height`` px is stored.

    That of the shared image, so views are cut from it without another resize. Photos are never enlarged;
    where only the global view is cut, the short side keeps the S px that it is squeezed to.
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
    """A photo as a JPEG (4:4:4) of :func:`compact_size`, upright, without EXIF.

    Args:
        photo: encoded, of any supported format.
        geometry: the views it is meant for.
        quality: of the JPEG, 1 to 100.
        max_pixels: photos with more are refused.

    Returns:
        The JPEG; the photo's own bytes where it is not larger than its compact form.

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
