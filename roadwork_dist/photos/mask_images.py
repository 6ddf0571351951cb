"""Six-class masks: their sources, and their conversion to targets of the mask head.

M is the number of classes.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from roadwork_dist.common.errors import DataError
from roadwork_dist.config.batch import MASK_CLASSES, MASK_SIDE
from roadwork_dist.photos.images import MAX_PIXELS, ImageSource, load_pixels, open_picture


class MaskSource(Protocol):
    """Source of a six-class mask; picklable."""

    @property
    def name(self) -> str:
        """Name of the mask in messages."""
        ...

    def content(self) -> bytes:
        """Bytes that determine the result of :meth:`bits`; they form the key under which it is stored.

        Raises:
            DataError: it cannot be read.
        """
        ...

    def bits(self) -> NDArray[np.uint8]:
        """``[H, W]`` uint8: bit i is set where class i of ``MASK_CLASSES`` is present; classes may overlap.

        The mask covers the upright photo (EXIF orientation applied), at any resolution.

        Raises:
            DataError: it cannot be read.
        """
        ...


@dataclass(frozen=True, slots=True)
class PngMask:
    """A mask stored as a greyscale 8-bit PNG: bit i of a pixel is class i of ``MASK_CLASSES``.

    Masks are stored upright: as the photo is shown, not in the orientation of its stored pixels.
    """

    image: ImageSource
    max_pixels: int = MAX_PIXELS

    @property
    def name(self) -> str:
        """Name of the image."""
        return self.image.name

    def content(self) -> bytes:
        """The PNG itself."""
        return self.image.read()

    def bits(self) -> NDArray[np.uint8]:
        """The pixels, ``[H, W]`` uint8.

        Raises:
            DataError: the PNG cannot be read, is not 8-bit greyscale or has bits above the sixth.
        """
        image = open_picture(self.image.read(), self.name, max_pixels=self.max_pixels, min_side=1)
        load_pixels(image, self.name)
        if image.mode not in ("L", "P"):
            raise DataError(
                f"{self.name}: mask has pixels of mode {image.mode!r}, expected an 8-bit greyscale PNG with "
                f"one bit a class ({', '.join(MASK_CLASSES)}): write it again in that form"
            )
        # Pillow's histogram (256 bins) is cheaper than a check in numpy for 12 Mpx.
        if any(image.histogram()[1 << len(MASK_CLASSES) :]):
            raise DataError(
                f"{self.name}: mask has values above {(1 << len(MASK_CLASSES)) - 1}, expected one bit a "
                f"class ({', '.join(MASK_CLASSES)}): write it again in that form"
            )
        return np.asarray(image)


def refuse_turned(name: str, mask_size: tuple[int, int], photo_size: tuple[int, int]) -> None:
    """Reject a landscape mask of a portrait photo or vice versa: it lacks the photo's EXIF orientation.

    Args:
        name: name of the mask.
        mask_size: height and width of the mask in px.
        photo_size: height and width of the upright photo in px.

    Raises:
        DataError: the orientations differ.
    """
    (mask_height, mask_width), (height, width) = mask_size, photo_size
    if (mask_width - mask_height) * (width - height) < 0:
        raise DataError(
            f"{name}: mask has {mask_width}x{mask_height} px but the upright photo "
            f"{width}x{height}, expected the same orientation: store the mask upright"
        )


def decode_mask(
    source: MaskSource, *, side: int = MASK_SIDE, photo_size: tuple[int, int] | None = None
) -> Tensor:
    """The target of the mask head: the share of each cell that each class covers.

    The mask of the whole photo is resized to ``side`` × ``side`` cells without keeping the aspect ratio, as
    the global view is. Each cell is the mean over its area, to 1/255: a cone of 25 px in 4032 px still shows.

    Args:
        source: the mask.
        side: cells along each side.
        photo_size: height and width of the upright photo, to check the mask's orientation; None = no check.

    Returns:
        ``[M, side, side]`` float32 in [0, 1].

    Raises:
        DataError: the mask cannot be read, or its orientation differs from the photo's.
    """
    bits = source.bits()
    if photo_size is not None:
        refuse_turned(source.name, bits.shape, photo_size)
    present = int(np.bitwise_or.reduce(bits, axis=None))
    image = Image.fromarray(np.ascontiguousarray(bits))
    target = np.zeros((len(MASK_CLASSES), side, side), dtype=np.float32)
    for index in range(len(MASK_CLASSES)):
        if present >> index & 1:
            plane = image.point([255 * (value >> index & 1) for value in range(256)])
            cells = plane.resize((side, side), Image.Resampling.BOX)  # BOX = mean over the area
            target[index] = np.asarray(cells, dtype=np.float32) / 255
    return torch.from_numpy(target)
