"""Assigns samples to tars by file size in advance, so writers need no communication."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from roadwork_dist.common.errors import ConfigError, DataError
from roadwork_dist.common.random import generator_for
from roadwork_dist.photos.images import MAX_PIXELS, BytesImage, FileImage, ImageSource
from roadwork_dist.photos.manifest import Manifest, Sample
from roadwork_dist.photos.mask_images import PngMask
from roadwork_dist.photos.views import ViewGeometry
from roadwork_dist.storage.shards.index import METADATA
from roadwork_dist.storage.shards.tar import LEAST_TAR, member_bytes, room_in, tar_bytes

KEY_DIGITS = 9
_COMPACT_BYTES_PER_PIXEL = 0.55
"""At quality 95, 4:4:4: 0.67 MB for 1280 x 960 px."""
_DECIDE_SIZE = ("size", "grid", "scale", "policy")
"""Fields of ``ViewGeometry`` that determine the size at which a photo is stored."""
_READERS = 16


@dataclass(frozen=True)
class ShardOptions:
    """How a set is written.

    Args:
        size: largest tar in bytes, unless a single photo is larger. Sizes of compact photos are estimated.
        name: prefix of the tars' names.
        shuffle: seed of the order of samples; None = the order of the source.
        compact: store the shared image of these views instead of the photo; None = the unchanged photo.
        quality: JPEG quality of compact photos, 1 to 100.
        decode: decode every photo and mask before it is written; False = read only headers.
        max_pixels: photos with more pixels count as unreadable.
        max_share: share of unreadable photos above which writing stops.
        synthetic: record that the photos are rendered by this package.

    Raises:
        ConfigError: a value is out of range.
    """

    size: int = 1_000_000_000
    name: str = "shard"
    shuffle: int | None = None
    compact: ViewGeometry | None = None
    quality: int = 95
    decode: bool = True
    max_pixels: int = MAX_PIXELS
    max_share: float = 0.01
    synthetic: bool = False

    def __post_init__(self) -> None:
        if self.size < LEAST_TAR:
            raise ConfigError(f"the size of a shard is {self.size} bytes, expected at least {LEAST_TAR}")
        if not self.name.isidentifier():
            raise ConfigError(f"the name of shards is {self.name!r}, expected letters, digits and _ only")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"the quality of compact photos is {self.quality}, expected 1 to 100")

    @property
    def kind(self) -> Literal["original", "compact"]:
        """As in ``shards.json``."""
        return "original" if self.compact is None else "compact"

    def settings(self) -> dict[str, Any]:
        """Settings that determine the content of the tars, as in ``shards.json``."""
        return {
            "size": self.size,
            "shuffle": self.shuffle,
            "views": None if self.compact is None else {k: getattr(self.compact, k) for k in _DECIDE_SIZE},
            "quality": None if self.compact is None else self.quality,
        }


@dataclass(frozen=True)
class ShardJob:
    """One tar to write."""

    number: int
    file: str
    first: int
    """Index of the first sample in the set."""
    samples: tuple[Sample, ...]
    plan: str
    """Hex digest of the samples in the tar and their form."""
    expected_bytes: int
    """Expected size of the tar; an estimate for compact photos."""
    source_bytes: int
    """Total size of its source photos."""


def plan_shards(manifest: Manifest, options: ShardOptions) -> list[ShardJob]:
    """Assign the samples of a manifest, in order, to tars of at most ``options.size`` bytes.

    File sizes come from the file system; photos inside other containers are read to get theirs.

    Raises:
        DataError: the source is a compact set instead of original photos.
    """
    if any(getattr(sample.image, "original_size", None) for sample in manifest):
        raise DataError(
            f"{manifest.name}: is a set of compact shards, expected original photos: make the new shards "
            "from the source of that set"
        )
    if options.shuffle is not None:
        order = generator_for(options.shuffle, "shards").permutation(len(manifest))
        manifest = manifest.subset(order.tolist())
    with ThreadPoolExecutor(_READERS) as pool:  # on a mounted file system each takes about a millisecond
        lengths = list(pool.map(_lengths, manifest.samples))
    sizes = [_members_bytes(sample, *both, options) for sample, both in zip(manifest, lengths, strict=True)]
    starts = _starts(sizes, room_in(options.size))
    ends = [*starts[1:], len(manifest)]
    jobs = []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        samples = manifest.samples[start:end]
        plan = _digest(start, samples, lengths[start:end], options)
        name = f"{options.name}-{number:06d}.tar"
        expected = tar_bytes(sum(sizes[start:end]))
        photos = sum(image for image, _ in lengths[start:end])
        jobs.append(ShardJob(number, name, start, samples, plan, expected, photos))
    return jobs


def _starts(sizes: Sequence[int], room: int) -> list[int]:
    starts, filled = [0], 0
    for row, size in enumerate(sizes):
        if filled and filled + size > room:
            starts.append(row)
            filled = 0
        filled += size
    return starts


def key_of(number: int) -> str:
    """Key of a sample by its index in the set; zero-padded, so names sort in the order of samples."""
    return f"{number:0{KEY_DIGITS}d}"


def known_fields(sample: Sample) -> dict[str, Any]:
    """Known metadata of a sample, without its images."""
    return {name: value for name in METADATA if (value := getattr(sample, name)) is not None}


def _lengths(sample: Sample) -> tuple[int, int]:
    """Bytes of the photo and of its mask; 0 if unreadable, or if the mask is drawn only when written."""
    mask = sample.mask
    return _length(sample.image), _length(mask.image) if isinstance(mask, PngMask) else 0


def _length(source: ImageSource) -> int:
    try:
        if isinstance(source, FileImage):
            return source.path.stat().st_size
        if isinstance(source, BytesImage):
            return len(source.data)
        own = getattr(source, "length", None)
        return len(source.read()) if own is None else int(own)
    except (OSError, ValueError, DataError):
        return 0  # reported as unreadable when it is written


def _members_bytes(sample: Sample, image: int, mask: int, options: ShardOptions) -> int:
    if options.compact is not None:
        side = options.compact.scale * options.compact.size
        image = min(image, int(_COMPACT_BYTES_PER_PIXEL * 0.75 * side**2))
    text = len(json.dumps(known_fields(sample), ensure_ascii=False).encode()) + 40  # for width and height
    return member_bytes(image) + member_bytes(text) + (member_bytes(mask) if sample.mask else 0)


def _digest(
    first: int, samples: Sequence[Sample], lengths: Sequence[tuple[int, int]], options: ShardOptions
) -> str:
    sha = hashlib.sha256(json.dumps([options.kind, options.settings(), first], sort_keys=True).encode())
    for sample, both in zip(samples, lengths, strict=True):
        line = [known_fields(sample), *both, sample.mask is not None]
        sha.update(json.dumps(line, sort_keys=True).encode() + b"\n")
    return sha.hexdigest()
