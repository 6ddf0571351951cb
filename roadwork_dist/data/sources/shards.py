"""Shard sets as a source: every row of the index is a sample that is read by its place in a tar."""

from pathlib import Path
from sys import intern
from typing import TYPE_CHECKING, Any

from roadwork_dist.common.errors import DataError
from roadwork_dist.common.types import VOCABULARIES
from roadwork_dist.config.experiment import DataConfig
from roadwork_dist.data.images import MAX_PIXELS, MaskSource, PngMask
from roadwork_dist.data.manifest import Manifest, Sample
from roadwork_dist.data.shards.image import ShardImage
from roadwork_dist.data.shards.index import INDEX_FILE, METADATA, ShardSet, read_index, read_set

if TYPE_CHECKING:
    import pyarrow

_BLOCK = 65_536


def read_shards(folder: Path, config: DataConfig) -> Manifest:
    """Read a finished set in a local or mounted folder; no tar is opened.

    ``data.columns`` does not apply: the index has columns of its own.

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
        index: its rows, as of :func:`~roadwork_dist.data.shards.index.parse_index`.
        base: folder or URL of the set, without a slash at its end; also the manifest's name.
        max_pixels: limit for masks.

    Raises:
        DataError: the index has no row, names a tar that the set has not, or an id twice.
    """
    if not index.num_rows:
        raise DataError(f"{base}: has no samples, expected at least one photo: write the shards anew")
    most = max(index["shard"].to_pylist())
    if most >= len(shards.shards):
        raise DataError(
            f"{base}/{INDEX_FILE}: names tar {most}, but the set has only {len(shards.shards)}: write the "
            "shards anew"
        )
    reader = _Rows(shards, base, max_pixels)
    samples: list[Sample] = []
    for batch in index.to_batches(max_chunksize=_BLOCK):  # a row of Python objects is ten times its size
        samples += [reader.sample(row) for row in batch.to_pylist()]
    if len({sample.id for sample in samples}) < len(samples):
        raise DataError(f"{base}/{INDEX_FILE}: has an id twice, expected unique ids: write the shards anew")
    return Manifest(base, tuple(samples))


class _Rows:
    """Rows of the index as samples; texts that repeat are kept once."""

    def __init__(self, shards: ShardSet, base: str, max_pixels: int) -> None:
        self.locations = [f"{base}/{shard.name}" for shard in shards.shards]
        self.is_compact = shards.kind == "compact"
        self.max_pixels = max_pixels

    def sample(self, row: dict[str, Any]) -> Sample:
        known: dict[str, Any] = {column: row[column] for column in METADATA}
        for column in (*VOCABULARIES, "group"):
            if known[column] is not None:
                known[column] = intern(known[column])
        return Sample(image=self._image(row), mask=self._mask(row), **known)

    def _image(self, row: dict[str, Any]) -> ShardImage:
        return ShardImage(
            self.locations[row["shard"]],
            row["offset"],
            row["length"],
            row["crc32"],
            f"{row['key']}.{row['extension']}",
            bytes.fromhex(row["sha256"]),
            (row["width"], row["height"]) if self.is_compact else None,
        )

    def _mask(self, row: dict[str, Any]) -> MaskSource | None:
        if row["mask_offset"] is None:
            return None
        place = (row["mask_offset"], row["mask_length"], row["mask_crc32"])
        name = f"{row['key']}.mask.png"
        return PngMask(ShardImage(self.locations[row["shard"]], *place, name), self.max_pixels)
