"""Metadata files of a shard set: ``shards.json`` (the set) and ``index.parquet`` (the samples).

A set is a local folder or a URL with tars ``<name>-000000.tar`` …, ``index.parquet`` with one row per sample
in the order of the tars, and ``shards.json``. The latter is written last: a set without it is unfinished.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from roadwork_dist.common.errors import DataError
from roadwork_dist.common.files import write_atomic

if TYPE_CHECKING:
    import pyarrow

FORMAT = 1
"""Version of the format; readers refuse newer ones."""

SET_FILE = "shards.json"
INDEX_FILE = "index.parquet"
PLAN_FILE = ".plan.json"
"""Plan of a set in its folder while it is being written."""

METADATA = (
    *("id", "label", "latitude", "longitude", "weather", "daytime", "scene"),
    *("description", "group"),
)
"""Columns that are fields of a :class:`~roadwork_dist.photos.manifest.Sample`."""


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One tar of a set."""

    name: str
    """File name, without folder."""
    bytes: int
    sha256: str
    """Hex SHA-256 of the file."""
    samples: int
    plan: str = ""
    """Hex digest of the planned content, by which a writer recognises its finished tars."""


@dataclass(frozen=True)
class ShardSet:
    """Content of ``shards.json``.

    Args:
        name: prefix of the tars' names.
        kind: ``original`` = unchanged photos; ``compact`` = their shared images.
        source: source of the set, for information.
        shards: the tars in order; rows of the index refer to them by position.
        index_sha256: hex SHA-256 of ``index.parquet``.
        settings: other settings that determined the content: size limit, order; for compact sets also S,
            scale and quality.
        unreadable: id and reason of each photo that was left out.
        synthetic: whether the photos are rendered by this package; reports have to state this.
    """

    name: str
    kind: Literal["original", "compact"]
    source: str
    shards: tuple[ShardFile, ...]
    index_sha256: str
    settings: dict[str, Any]
    unreadable: tuple[tuple[str, str], ...] = ()
    synthetic: bool = False

    @property
    def samples(self) -> int:
        """Number of samples in all tars."""
        return sum(shard.samples for shard in self.shards)

    def to_json(self) -> bytes:
        """The content of ``shards.json``."""
        return (json.dumps({"format": FORMAT, **asdict(self)}, indent=1, sort_keys=True) + "\n").encode()


def is_shard_set(folder: Path) -> bool:
    """Whether a folder holds a set, finished or not; :func:`read_set` rejects unfinished ones."""
    return (folder / SET_FILE).is_file() or (folder / PLAN_FILE).is_file()


def parse_set(content: bytes, name: str) -> ShardSet:
    """Parse a ``shards.json``.

    Args:
        content: content of the file.
        name: path or URL of the file, for messages.

    Raises:
        DataError: its format is too new, or it is damaged.
    """
    try:
        fields = json.loads(content)
        version = fields.pop("format")
        if version > FORMAT:
            raise DataError(
                f"{name}: has format {version}, expected at most {FORMAT}: it was written by a newer "
                "roadwork-dist, so update this one"
            )
        fields["shards"] = tuple(ShardFile(**shard) for shard in fields["shards"])
        fields["unreadable"] = tuple(tuple(pair) for pair in fields["unreadable"])
        return ShardSet(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{name}: cannot be read ({type(error).__name__}: {error}), expected what `roadwork-dist shard` "
            "writes: copy the file again, or write the shards again"
        ) from error


def schema() -> "pyarrow.Schema":
    """Columns of ``index.parquet``; ``width`` and ``height`` are those of the original photo, upright."""
    import pyarrow as pa

    text, whole = pa.string(), pa.int64()
    return pa.schema(
        [
            pa.field("key", text, nullable=False),
            pa.field("shard", pa.int32(), nullable=False),
            pa.field("extension", text, nullable=False),
            pa.field("offset", whole, nullable=False),
            pa.field("length", whole, nullable=False),
            pa.field("crc32", pa.uint32(), nullable=False),
            pa.field("sha256", text, nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            *(("mask_offset", whole), ("mask_length", whole), ("mask_crc32", pa.uint32())),
            pa.field("id", text, nullable=False),
            *(("label", pa.int8()), ("latitude", pa.float64()), ("longitude", pa.float64())),
            *((column, text) for column in METADATA[4:]),
        ]
    )


def index_bytes(rows: list[dict[str, Any]]) -> bytes:
    """Serialise rows as ``index.parquet``; absent columns are null."""
    import pyarrow as pa
    from pyarrow import parquet

    file = BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema()), file, compression="zstd")
    return file.getvalue()


def parse_index(content: bytes, shards: ShardSet, name: str) -> "pyarrow.Table":
    """Parse an ``index.parquet`` into a table with the columns of :func:`schema`.

    Args:
        content: content of the file.
        shards: the set it belongs to.
        name: path or URL of the file, for messages.

    Raises:
        DataError: it is damaged, or belongs to another set.
    """
    from pyarrow import parquet

    if hashlib.sha256(content).hexdigest() != shards.index_sha256:
        raise DataError(
            f"{name}: checksum differs from {SET_FILE}, expected the index of this set: copy "
            "both files again, or write the shards again"
        )
    try:
        table = parquet.read_table(BytesIO(content))
        return table.select(schema().names).cast(schema())
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors derive from these
        raise DataError(
            f"{name}: cannot be read ({' '.join(str(error).split())}), expected the columns "
            f"{', '.join(schema().names)}: write the shards again"
        ) from error


def read_set(folder: Path) -> ShardSet:
    """The finished set in a local folder.

    Raises:
        DataError: there is none, or ``shards.json`` is damaged.
    """
    path = folder / SET_FILE
    return parse_set(_read(path), str(path))


def read_index(folder: Path, shards: ShardSet) -> "pyarrow.Table":
    """The index of a set in a local folder.

    Raises:
        DataError: it is absent, damaged, or belongs to another set.
    """
    path = folder / INDEX_FILE
    return parse_index(_read(path), shards, str(path))


def write_set(
    folder: Path,
    rows: list[dict[str, Any]],
    *,
    name: str,
    kind: Literal["original", "compact"],
    source: str,
    shards: tuple[ShardFile, ...],
    settings: dict[str, Any],
    unreadable: tuple[tuple[str, str], ...] = (),
    synthetic: bool = False,
) -> ShardSet:
    """Write ``index.parquet`` and then ``shards.json``, which marks the set as finished.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    index = index_bytes(rows)
    checksum = hashlib.sha256(index).hexdigest()
    made = ShardSet(name, kind, source, shards, checksum, settings, unreadable, synthetic)
    write_atomic(folder / INDEX_FILE, index)
    write_atomic(folder / SET_FILE, made.to_json())
    return made


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}), expected a folder that `roadwork-dist shard` has "
            "finished: start that command again, or copy the folder again"
        ) from error
