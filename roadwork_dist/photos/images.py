"""Image sources, and decoding of their bytes into tensors.

Sources are pickled to loader workers, so they hold a path or a reference, not pixels.
"""

import hashlib
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ExifTags import Base as ExifTag
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

from roadwork_dist.common.errors import DataError

MAX_PIXELS = 200_000_000
"""Default limit of an image's pixels, as in ``DataConfig.max_pixels``."""

# Opening with the format's class instead of Image.open avoids three things: unwanted formats (EPS starts
# Ghostscript), the process-wide MAX_IMAGE_PIXELS, and the additional images of an MPO.
_FORMATS: dict[bytes, type[ImageFile]] = {
    b"\xff\xd8\xff": JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"RIFF": WebPImageFile,
    b"BM": BmpImageFile,
}

# Value of the EXIF tag -> transpose that turns the stored pixels upright (EXIF 2.32, tag 0x0112).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@runtime_checkable
class ImageSource(Protocol):
    """Source of an image's encoded bytes; picklable."""

    @property
    def name(self) -> str:
        """Name of the image in messages: its path, or its dataset and row."""
        ...

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            DataError: they cannot be read.
        """
        ...


@dataclass(frozen=True, slots=True)
class FileImage:
    """An image in a file."""

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def read(self) -> bytes:
        """The content of the file.

        Raises:
            DataError: the file is missing or cannot be read.
        """
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            raise DataError(
                f"{self.path}: there is no such file, expected a photo: "
                "fix the path in the table, or set data.image_root to the folder that the paths start from"
            ) from None
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.path}: cannot be read ({error}), expected a readable file: check path and permissions"
            ) from error


@dataclass(frozen=True, slots=True)
class BytesImage:
    """An image that is already in memory."""

    name: str
    data: bytes

    def read(self) -> bytes:
        """The bytes."""
        return self.data


def as_image_source(cell: Any, *, root: Path | None, name: str) -> ImageSource:
    """The image source that a table cell describes.

    Args:
        cell: a source, a path, bytes, or a mapping with ``bytes`` and ``path`` (Hugging Face's format).
        root: folder that relative paths start from; None = the working directory.
        name: name in messages of bytes that have no path.

    Raises:
        DataError: the cell is none of these.
    """
    if isinstance(cell, ImageSource):
        return cell
    if isinstance(cell, Mapping):
        data, path = cell.get("bytes"), cell.get("path")
        if data is not None:
            return BytesImage(f"{name} ({path})" if path else name, data)
        cell = path
    if isinstance(cell, bytes):
        return BytesImage(name, cell)
    if isinstance(cell, str | Path):
        return FileImage((root or Path()) / cell)
    raise DataError(
        f"{name}: image is a {type(cell).__name__}, expected a path or the bytes of a JPEG or PNG: "
        "set data.columns.image to the column that holds them"
    )


def content_hash(data: bytes) -> str:
    """Hex SHA-256 of a photo's encoded bytes; its key in the feature store."""
    return hashlib.sha256(data).hexdigest()


def decode(
    source: ImageSource | bytes,
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    min_side: int = 64,
    reduction: int = 1,
) -> Tensor:
    """Decode a photo, upright and in RGB.

    EXIF orientation is applied. Greyscale, palette, CMYK (with Adobe's inverted polarity) and 16-bit
    images (by their high byte) are converted; transparent parts become white.

    Args:
        source: a source or encoded bytes (JPEG, PNG, WebP or BMP).
        name: name of the photo in messages; None = the source's name.
        max_pixels: larger photos are refused before decoding.
        min_side: smallest width and height in px.
        reduction: decode JPEGs at 1/2, 1/4 or 1/8 (2, 4 or 8) of their size, which is several times faster;
            sides are rounded up. Other formats are not reduced.

    Returns:
        ``[3, H, W]`` uint8 with the strides of an interleaved image (channels last), for which torch's
        resize of uint8 is fastest; call ``contiguous()`` for planes.

    Raises:
        DataError: the bytes are not a complete photo within the limits.
    """
    data, name = _bytes_and_name(source, name)
    image = open_picture(data, name, max_pixels=max_pixels, min_side=min_side)
    _reduce(image, reduction)
    pixels = np.array(_to_rgb(_load_upright(image, name)))  # H W 3, a copy: Pillow's memory is read-only
    return torch.from_numpy(pixels).permute(2, 0, 1)


def photo_size(
    source: ImageSource | bytes, *, name: str | None = None, max_pixels: int = MAX_PIXELS, min_side: int = 64
) -> tuple[int, int]:
    """Height and width in px of the upright photo at full size, from the header where that suffices.

    For a reduced copy that records the size of its original, this is the original's size.

    Raises:
        DataError: the header cannot be read, or the size is outside the limits.
    """
    original_size: tuple[int, int] | None = getattr(source, "original_size", None)
    if original_size is not None:
        return original_size[1], original_size[0]
    data, name = _bytes_and_name(source, name)
    image = open_picture(data, name, max_pixels=max_pixels, min_side=min_side)
    if isinstance(image, PngImageFile) and "exif" not in image.info:
        load_pixels(image, name)  # a PNG may carry its EXIF after the pixels
    width, height = image.size
    return (width, height) if orientation_of(image) >= 5 else (height, width)


def verify(
    source: ImageSource | bytes, *, max_pixels: int = MAX_PIXELS, min_side: int = 64
) -> tuple[int, int]:
    """Decode a photo completely, as cheaply as its format allows, and discard the pixels.

    Returns:
        Height and width in px of the upright photo at full size.

    Raises:
        DataError: :func:`decode` would fail.
    """
    data, name = _bytes_and_name(source, None)
    image = open_picture(data, name, max_pixels=max_pixels, min_side=min_side)
    width, height = image.size
    _reduce(image, 8)  # still reads every coded byte, but computes an eighth of the rows and columns
    load_pixels(image, name)
    return (width, height) if orientation_of(image) >= 5 else (height, width)


def _bytes_and_name(source: ImageSource | bytes, name: str | None) -> tuple[bytes, str]:
    if isinstance(source, bytes):
        return source, name or "photo"
    return source.read(), name or source.name


_quiet_lock = threading.Lock()


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress a library's warnings (such as Pillow's about odd EXIF).

    Python's warning filters are process-wide, hence the lock: keep the work inside short.
    """
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_picture(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS, min_side: int = 64) -> ImageFile:
    """Read the header and check the size; no pixel is decoded.

    Raises:
        DataError: it is not an image, or its size is outside the limits.
    """
    if not data:
        raise DataError(
            f"{name}: the file is empty (0 bytes), expected a JPEG or PNG: restore it or remove its row"
        )
    opener = next((cls for magic, cls in _FORMATS.items() if data.startswith(magic)), None)
    if opener is None:
        raise DataError(
            f"{name}: is not an image (it starts with {data[:12]!r}), expected a JPEG, PNG, WebP or BMP: "
            "restore the file or remove its row"
        )
    try:
        with quiet():
            image = opener(BytesIO(data), name)
    except Exception as error:  # Pillow's parsers may raise almost anything on broken bytes
        raise _broken(name, error) from error
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(
            f"{name}: has {width}x{height} px, expected at most {max_pixels:,} px in total (is it a "
            "decompression bomb?): remove its row, or raise data.max_pixels if the photo is real"
        )
    if min(width, height) < min_side:
        raise DataError(
            f"{name}: has {width}x{height} px, expected at least {min_side} px on each side: "
            "use a larger version of the photo or remove its row"
        )
    return image


def _broken(name: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(
        f"{name}: is broken ({reason}), expected a complete image: restore the file or remove its row"
    )


def load_pixels(image: ImageFile, name: str) -> None:
    """Decode an opened image.

    Raises:
        DataError: it is broken.
    """
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # as above: OSError, SyntaxError, struct.error, zlib.error, …
        raise _broken(name, error) from error


def _reduce(image: ImageFile, reduction: int) -> None:
    """Let libjpeg decode at 1/2, 1/4 or 1/8 (its DCT scaling)."""
    if reduction > 1:
        width, height = image.size
        image.draft(None, (max(1, width // reduction), max(1, height // reduction)))


def orientation_of(image: ImageFile) -> int:
    """EXIF orientation, 1 (upright) to 8; 1 if the EXIF block cannot be read."""
    try:
        with quiet():
            value = image.getexif().get(ExifTag.Orientation, 1)
    except Exception:  # a broken EXIF block does not make the pixels unreadable
        return 1
    return int(value) if value in _UPRIGHT else 1


def _load_upright(image: ImageFile, name: str) -> Image.Image:
    load_pixels(image, name)
    method = _UPRIGHT.get(orientation_of(image))
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I;16"):
        # The high byte, as Pillow does for 16-bit RGB; its conversion of I;16 clips instead.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        background = Image.new("RGBA", colours.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, colours).convert("RGB")
    return image.convert("RGB")
