"""Fast decoding of baseline JPEGs with libjpeg-turbo, in stored orientation, with Pillow as the fallback.

The fast path handles what ordinary cameras write: 8-bit baseline JPEGs in colour. They are decoded into a
reused buffer, at reduced size where that suffices, and are not rotated: rotating the resized image later is
cheaper. Everything else, and every JPEG that the decoder rejects, takes the slower path through Pillow,
which decides whether it is readable.
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
"""Largest pixel buffer that a thread keeps for its next photo (22 Mpx); larger ones are freed."""

_memory = threading.local()


@dataclass(frozen=True)
class StoredPixels:
    """Pixels as stored in the file, and what is needed to show them upright."""

    pixels: Tensor
    """[3, H, W] uint8, interleaved strides; valid until the thread decodes its next photo."""
    orientation: int
    """EXIF's, 1 (upright) to 8."""
    photo_size: tuple[int, int]
    """(width, height) of the upright photo at full size."""


def decode_for_views(
    data: bytes, geometry: ViewGeometry, *, name: str, max_pixels: int = MAX_PIXELS
) -> StoredPixels:
    """Decode a photo at the smallest size that its views need.

    Args:
        data: JPEG, PNG, WebP or BMP.
        geometry: which views will be cut; with quality ``exact`` every pixel is decoded.
        name: name of the photo in messages.
        max_pixels: photos with more pixels are refused.

    Raises:
        DataError: the bytes are not a complete photo within the limits.
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
    """A stored size (width, height) after EXIF's orientation is applied."""
    return size[::-1] if orientation >= 5 else size


def is_plain_jpeg(image: ImageFile) -> bool:
    """Whether an opened image is a JPEG in colour (not grey, not CMYK) and not progressive."""
    return isinstance(image, JpegImageFile) and image.mode == "RGB" and "progressive" not in image.info


def decode_baseline(data: bytes, size: tuple[int, int], reduction: int = 1) -> NDArray[np.uint8] | None:
    """Decode a JPEG with libjpeg-turbo.

    Args:
        data: the JPEG.
        size: its (width, height).
        reduction: 1, 2, 4 or 8: decode at that fraction of the size, rounded up.

    Returns:
        [H, W, 3] RGB in a buffer that the thread's next call overwrites; ``None`` if the decoder reports
        any problem (truncated or corrupt data, an unsupported kind of JPEG).
    """
    width, height = (-(-side // reduction) for side in size)
    memory = _memory_of(width * height * 3)
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, buffer=memory)
    except (ValueError, KeyError):  # KeyError: a header without a size
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def _memory_of(size: int) -> NDArray[np.uint8]:
    """``size`` bytes of this thread's buffer; reusing it saves allocating pages for each photo."""
    memory: NDArray[np.uint8] | None = getattr(_memory, "pixels", None)
    if memory is None or memory.size < size:
        memory = np.empty(size, np.uint8)
        if size <= KEPT_BYTES:
            _memory.pixels = memory
    return memory
