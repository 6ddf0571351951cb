"""Packs a sample into tar members: the photo's bytes, its metadata as JSON, its mask as a PNG."""

import json
from dataclasses import dataclass, replace
from io import BytesIO

import numpy as np
from PIL import Image

from roadwork_dist.common.errors import DataError
from roadwork_dist.photos.check import examine
from roadwork_dist.photos.images import BytesImage, photo_size
from roadwork_dist.photos.manifest import Sample
from roadwork_dist.photos.mask_images import MaskSource, PngMask
from roadwork_dist.storage.shards.compact import compact_photo
from roadwork_dist.storage.shards.plan import ShardOptions, known_fields

_PNG = b"\x89PNG\r\n\x1a\n"
_EXTENSIONS = {b"\xff\xd8\xff": "jpg", _PNG: "png", b"RIFF": "webp", b"BM": "bmp"}


@dataclass(frozen=True, slots=True)
class Packed:
    """The tar members of one sample."""

    image: bytes
    extension: str
    metadata: bytes
    mask: bytes | None
    width: int
    """Width of the upright original photo, in px."""
    height: int


def pack(sample: Sample, options: ShardOptions) -> Packed:
    """Read and check a sample, and build its tar members.

    Raises:
        DataError: the photo or its mask cannot be read; the message names it.
    """
    data = sample.image.read()
    image = BytesImage(sample.image.name, data)
    if options.decode:
        (height, width), problem = examine(replace(sample, image=image), options.max_pixels)
        if problem:
            raise DataError(problem)
    else:
        height, width = photo_size(image, max_pixels=options.max_pixels)
    if options.compact is not None:
        data = compact_photo(image, options.compact, options.quality, max_pixels=options.max_pixels)
    known = {**known_fields(sample), "width": width, "height": height}
    return Packed(
        data,
        extension_of(data),
        json.dumps(known, sort_keys=True, ensure_ascii=False).encode(),
        None if sample.mask is None else _mask_bytes(sample.mask),
        width,
        height,
    )


def extension_of(data: bytes) -> str:
    """File extension for WebDataset readers, from an image's first bytes."""
    return next(extension for magic, extension in _EXTENSIONS.items() if data.startswith(magic))


def _mask_bytes(mask: MaskSource) -> bytes:
    """The mask as a PNG; unchanged if it already is one."""
    if isinstance(mask, PngMask) and (data := mask.image.read()).startswith(_PNG):
        return data
    file = BytesIO()
    Image.fromarray(np.ascontiguousarray(mask.bits())).save(file, "PNG")
    return file.getvalue()
