"""The fast way from a photo's bytes to pixels: baseline JPEGs through libjpeg-turbo, as they are stored.

What ordinary cameras write goes this way: 8-bit baseline JPEGs in colour. They are decoded into memory
that is used again, at a fraction of their size where that suffices, and are not turned: turning
the small image behind it is cheaper. Everything else, and every JPEG that the decoder complains
about, goes the slower way through Pillow, which decides whether it can be read.
"""

import threading
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from roadwork_dist.photos.images import MAX_PIXELS, decode, open_picture, orientation_of, photo_size
from roadwork_dist.photos.views import ViewGeometry, reduction_of

KEPT_BYTES = 64 << 20
"""Largest memory for pixels that a thread keeps for the next photo (22 Mpx); larger ones are given back."""

_memory = threading.local()


@dataclass(frozen=True)
class StoredPixels:
    """Pixels as the file has them, and what is needed to show them upright."""

    pixels: Tensor
    """[3, H, W] uint8, interleaved strides; valid until the thread decodes its next photo."""
    orientation: int
    """EXIF's, 1 (upright) to 8."""
    photo_size: tuple[int, int]
    """(width, height) of the upright photo at full size."""


def decode_for_views(
    data: bytes, geometry: ViewGeometry, *, name: str, max_pixels: int = MAX_PIXELS
) -> StoredPixels:
    """Decode a photo no larger than its views need it.

    Args:
        data: JPEG, PNG, WebP or BMP.
        geometry: which views will be cut; with quality ``exact`` every pixel is decoded.
        name: what messages call the photo.
        max_pixels: photos with more pixels are refused.

    Raises:
        DataError: the bytes are no whole photo within the limits.
    """
    image = open_picture(data, name, max_pixels=max_pixels)
    if is_plain_jpeg(image):
        orientation = orientation_of(image)
        pixels = decode_baseline(data, image.size, reduction_of(geometry, *upright(image.size, orientation)))
        if pixels is not None:
            turned = upright(image.size, orientation)
            return StoredPixels(torch.from_numpy(pixels).permute(2, 0, 1), orientation, turned)
    height, width = photo_size(data, name=name, max_pixels=max_pixels)
    reduction = reduction_of(geometry, width, height)
    pixels_upright = decode(data, name=name, max_pixels=max_pixels, reduction=reduction)
    return StoredPixels(pixels_upright, 1, (width, height))


def upright(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """A stored size (width, height) as EXIF shows it."""
    return size[::-1] if orientation >= 5 else size


def is_plain_jpeg(image: ImageFile) -> bool:
    """Whether an opened picture is a JPEG in colour (not grey, not CMYK) and not progressive."""
    return isinstance(image, JpegImageFile) and image.mode == "RGB" and "progressive" not in image.info


def decode_baseline(data: bytes, size: tuple[int, int], reduction: int = 1) -> NDArray[np.uint8] | None:
    """Decode a JPEG with libjpeg-turbo.

    Args:
        data: the JPEG.
        size: its (width, height).
        reduction: 1, 2, 4 or 8: decode at that fraction of the size, rounded up.

    Returns:
        [H, W, 3] RGB in memory that the thread's next call uses again; ``None`` where the decoder has the
        least complaint (cut short, corrupt data, a kind of JPEG it does not know).
    """
    width, height = (-(-side // reduction) for side in size)
    memory = _memory_of(width * height * 3)
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, buffer=memory)
    except (ValueError, KeyError):  # KeyError: a header without any size
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def _memory_of(size: int) -> NDArray[np.uint8]:
    """``size`` bytes of this thread's memory, whose pages need not be asked for anew for each photo."""
    memory: NDArray[np.uint8] | None = getattr(_memory, "pixels", None)
    if memory is None or memory.size < size:
        memory = np.empty(size, np.uint8)
        if size <= KEPT_BYTES:
            _memory.pixels = memory
    return memory
