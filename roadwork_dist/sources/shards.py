"""Reader of shard sets: each row of the index is a sample, read by its offset in a tar."""

from collections.abc import Iterable
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roadwork_dist.common.errors import DataError
from roadwork_dist.config.batch import VOCABULARIES
from roadwork_dist.config.experiment import DataConfig
from roadwork_dist.photos.images import MAX_PIXELS
from roadwork_dist.photos.manifest import Manifest, Sample
from roadwork_dist.photos.mask_images import MaskSource, PngMask
from roadwork_dist.storage.shards.image import ShardImage
from roadwork_dist.storage.shards.index import INDEX_FILE, METADATA, ShardSet, read_index, read_set

if TYPE_CHECKING:
    import pyarrow

_BLOCK = 65_536
_REPEATING = (*VOCABULARIES, "group", "extension")


def read_shards(folder: Path, config: DataConfig) -> Manifest:
    """Read a finished set in a local or mounted folder; no tar is opened.

    ``data.columns`` does not apply: the index has its own columns.

    Raises:
        DataError: ``shards.json`` or the index is absent or damaged.
    """
    shards = read_set(folder)
    return manifest_of(shards, read_index(folder, shards), str(folder), max_pixels=config.max_pixels)


def manifest_of(
    shards: ShardSet, index: "pyarrow.Table", base: str, *, max_pixels: int = MAX_PIXELS
) -> Manifest:
    """The samples of a set, in the order of the index.

    Args:
        shards: the set.
        index: its rows, from :func:`~roadwork_dist.storage.shards.index.parse_index`.
        base: folder or URL of the set, without a trailing slash; also the manifest's name.
        max_pixels: largest number of pixels of a mask.

    Raises:
        DataError: the index has no rows, an unknown tar or a duplicate id.
    """
    if not index.num_rows:
        raise DataError(f"{base}: has no samples, expected at least one photo: write the shards again")
    from pyarrow import compute

    most = compute.max(index["shard"]).as_py()
    if most >= len(shards.shards):
        raise DataError(
            f"{base}/{INDEX_FILE}: names tar {most}, but the set has only {len(shards.shards)}: write the "
            "shards again"
        )
    columns = _Columns(shards, base, max_pixels)
    samples: list[Sample] = []
    for batch in index.to_batches(max_chunksize=_BLOCK):  # rows as Python objects take ten times the memory
        samples += columns.samples(batch)
    if len({sample.id for sample in samples}) < len(samples):
        raise DataError(f"{base}/{INDEX_FILE}: has an id twice, expected unique ids: write the shards again")
    return Manifest(base, tuple(samples))


class _Columns:
    """Converts the index to samples column by column, since there may be millions of rows."""

    def __init__(self, shards: ShardSet, base: str, max_pixels: int) -> None:
        self.locations = [f"{base}/{shard.name}" for shard in shards.shards]
        self.is_compact = shards.kind == "compact"
        self.max_pixels = max_pixels

    def samples(self, batch: "pyarrow.RecordBatch") -> list[Sample]:
        cells = {name: _cells(batch.column(name), name in _REPEATING) for name in batch.schema.names}
        known = zip(*(cells[name] for name in METADATA), strict=True)
        return [
            Sample(image=image, mask=mask, **dict(zip(METADATA, values, strict=True)))
            for image, mask, values in zip(self._images(cells), self._masks(cells), known, strict=True)
        ]

    def _images(self, cells: dict[str, list[Any]]) -> Iterable[ShardImage]:
        sizes = zip(cells["width"], cells["height"], strict=True) if self.is_compact else repeat(None)
        locations = [self.locations[shard] for shard in cells["shard"]]
        members = [f"{key}.{end}" for key, end in zip(cells["key"], cells["extension"], strict=True)]
        digests = map(bytes.fromhex, cells["sha256"])
        places = (cells[name] for name in ("offset", "length", "crc32"))
        return [ShardImage(*own) for own in zip(locations, *places, members, digests, sizes, strict=False)]

    def _masks(self, cells: dict[str, list[Any]]) -> Iterable[MaskSource | None]:
        columns = ("key", "shard", "mask_offset", "mask_length", "mask_crc32")
        for key, shard, offset, length, crc32 in zip(*(cells[name] for name in columns), strict=True):
            if offset is None:
                yield None
            else:
                picture = ShardImage(self.locations[shard], offset, length, crc32, f"{key}.mask.png")
                yield PngMask(picture, self.max_pixels)


def _cells(column: "pyarrow.Array", repeats: bool) -> list[Any]:
    """Cells of a column; with ``repeats``, equal strings share one object."""
    if not repeats:
        cells: list[Any] = column.to_pylist()
        return cells
    encoded = column.dictionary_encode()
    words = encoded.dictionary.to_pylist()
    return [None if index is None else words[index] for index in encoded.indices.to_pylist()]
