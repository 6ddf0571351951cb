"""Validation of a manifest: decodes every photo once, so that a broken one does not stop training midway."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from roadwork_dist.common.errors import DataError
from roadwork_dist.config.batch import CLASSES, UNLABELLED
from roadwork_dist.photos.images import MAX_PIXELS, verify
from roadwork_dist.photos.manifest import Manifest, Sample, describe_unknown
from roadwork_dist.photos.mask_images import refuse_turned

logger = logging.getLogger(__name__)

_METADATA = ("weather", "daytime", "scene", "description", "mask")
_SIZES_SHOWN = 5


@dataclass(frozen=True)
class CheckReport:
    """Content of a manifest, after every photo and mask was decoded."""

    manifest: Manifest
    """All rows."""
    readable: Manifest
    """The rows whose photo and mask are readable; the others are dropped."""
    unreadable: tuple[tuple[str, str], ...]
    """Id and reason (one line, naming the file) of each dropped row."""
    sizes: NDArray[np.int64]
    """``[N, 2]`` height and width in px of the readable photos, upright."""

    def lines(self) -> list[str]:
        """The report as lines to print."""
        total, broken = len(self.manifest), len(self.unreadable)
        return [
            f"{self.manifest.name}: {total:,} photos, {total - broken:,} readable, {broken:,} unreadable",
            f"  labels: {self._labels()}",
            f"  null: {self._nulls()}",
            *([f"  sizes: {self._sizes()}"] if len(self.sizes) else []),
            *(f"  read as null: {text}" for text in describe_unknown(self.manifest.unknown_words)),
            *(f"  unreadable: {name}: {reason}" for name, reason in self.unreadable),
        ]

    def _labels(self) -> str:
        counts = Counter(self.manifest.labels.tolist())
        texts = [f"{counts[label]:,} {name}" for label, name in enumerate(CLASSES)]
        return " · ".join([*texts, f"{counts[UNLABELLED]:,} unlabelled"])

    def _nulls(self) -> str:
        shares = {"gps": np.isnan(self.manifest.coordinates).any(axis=1).mean()}
        for name in _METADATA:
            shares[name] = np.mean([getattr(sample, name) is None for sample in self.manifest])
        return " · ".join(f"{name} {share:.0%}" for name, share in shares.items())

    def _sizes(self) -> str:
        counts = Counter(map(tuple, self.sizes.tolist()))
        texts = [f"{width}x{height} ×{n:,}" for (height, width), n in counts.most_common(_SIZES_SHOWN)]
        rest = len(counts) - len(texts)
        sides = f"short side {self.sizes.min(axis=1).min()} to {self.sizes.min(axis=1).max()} px"
        return " · ".join([*texts, *([f"{rest} more sizes"] if rest else []), sides])


def check_images(
    manifest: Manifest,
    *,
    max_share: float = 0.01,
    max_pixels: int = MAX_PIXELS,
    workers: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Decode every photo (JPEGs at 1/8 of their size) and every mask.

    Args:
        manifest: rows to check.
        max_share: share of unreadable rows above which this raises; 1.0 = never.
        max_pixels: largest number of pixels of a photo.
        workers: number of threads; decoding releases Python's global lock, so no processes are needed.
        on_progress: called with (rows done, total rows) after each row, in the caller's thread.

    Raises:
        DataError: more rows than ``max_share`` are unreadable.
    """
    sizes, unreadable = [], {}
    for index, (size, problem) in enumerate(_examine_all(manifest, max_pixels, workers)):
        if problem:
            unreadable[index] = problem
        else:
            sizes.append(size)
        if on_progress is not None:
            on_progress(index + 1, len(manifest))
    return CheckReport(
        manifest,
        drop_unreadable(manifest, unreadable, max_share),
        tuple((manifest[index].id, problem) for index, problem in unreadable.items()),
        np.array(sizes, dtype=np.int64).reshape(-1, 2),
    )


def _examine_all(manifest: Manifest, max_pixels: int, workers: int) -> Iterator[tuple[tuple[int, int], str]]:
    if workers <= 1:
        yield from (examine(sample, max_pixels) for sample in manifest)
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda sample: examine(sample, max_pixels), manifest)


def examine(sample: Sample, max_pixels: int) -> tuple[tuple[int, int], str]:
    """Height and width in px of a sample's photo, and what is wrong with it or its mask ("" = nothing)."""
    try:
        height, width = verify(sample.image, max_pixels=max_pixels)
        if sample.mask is not None:
            refuse_turned(sample.mask.name, sample.mask.bits().shape, (height, width))
    except DataError as error:
        return (0, 0), str(error)
    return (height, width), ""


def drop_unreadable(manifest: Manifest, unreadable: Mapping[int, str], max_share: float) -> Manifest:
    """A manifest without its unreadable rows, which are logged.

    Args:
        manifest: all rows.
        unreadable: row -> reason (one line that names the file).
        max_share: share of unreadable rows above which this raises.

    Raises:
        DataError: more rows than ``max_share`` are unreadable.
    """
    if not unreadable:
        return manifest
    reasons = list(unreadable.values())
    refuse_too_many(manifest.name, reasons, len(manifest), max_share)
    logger.warning(
        "%s: left out %d of %d photos that are unreadable: %s",
        *(manifest.name, len(unreadable), len(manifest), _first_of(reasons)),
    )
    return manifest.subset(row for row in range(len(manifest)) if row not in unreadable)


def refuse_too_many(name: str, reasons: Sequence[str], total: int, max_share: float) -> None:
    """Raise if too many of ``total`` photos are unreadable.

    Raises:
        DataError: ``reasons`` (one per unreadable photo) exceed ``max_share`` of ``total``.
    """
    count = len(reasons)
    if count > max_share * total:
        raise DataError(
            f"{name}: {count} of {total} photos ({count / total:.1%}) are unreadable, "
            f"expected at most {max_share:.1%}: fix or remove them, or raise "
            f"data.max_unreadable_share. {_first_of(reasons)}"
        )


def _first_of(reasons: Sequence[str]) -> str:
    return "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
