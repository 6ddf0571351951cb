"""Records of finished tars in an unfinished set: one small JSON file per tar."""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from roadwork_dist.common.errors import DataError
from roadwork_dist.common.files import sha256_of_file, write_atomic
from roadwork_dist.storage.shards.index import SET_FILE, ShardFile, read_index, read_set
from roadwork_dist.storage.shards.pack import pack
from roadwork_dist.storage.shards.plan import ShardJob, ShardOptions

SUFFIX = ".part.json"


@dataclass(frozen=True)
class Part:
    """One finished tar."""

    shard: ShardFile
    rows: tuple[dict[str, Any], ...]
    """Its rows of the index."""
    unreadable: tuple[tuple[str, str], ...]
    """Id and reason of each photo that was left out."""

    def save(self, folder: Path) -> None:
        """Write the record, which is kept until the set is finished; without it the tar does not count."""
        write_atomic(_path(folder, self.shard.name), json.dumps(asdict(self)).encode())


def known_parts(folder: Path) -> dict[str, Part]:
    """The finished tars of a finished or unfinished set, by file name.

    Damaged records count as absent.
    """
    if (folder / SET_FILE).is_file():
        try:
            return _of_set(folder)
        except DataError:
            pass  # a damaged index is rewritten
    parts = {}
    for path in folder.glob(f".*{SUFFIX}"):
        try:
            fields = json.loads(path.read_bytes())
            shard = ShardFile(**fields["shard"])
            unreadable = tuple((id_, reason) for id_, reason in fields["unreadable"])
            parts[shard.name] = Part(shard, tuple(fields["rows"]), unreadable)
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return parts


def _of_set(folder: Path) -> dict[str, Part]:
    shards = read_set(folder)
    rows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in read_index(folder, shards).to_pylist():
        rows[row["shard"]].append(row)
    # Each tar gets all unreadable photos of the set; kept_part selects its own by the job's ids.
    return {
        shard.name: Part(shard, tuple(rows[number]), shards.unreadable)
        for number, shard in enumerate(shards.shards)
    }


def kept_part(part: Part, job: ShardJob, folder: Path, options: ShardOptions) -> Part | None:
    """The record of a finished tar if a job would write the same bytes; else None.

    Photos that it lacks are checked again: if one has become readable, the tar is rewritten.
    """
    path = folder / job.file
    try:
        if part.shard.plan != job.plan or path.stat().st_size != part.shard.bytes:
            return None
        if sha256_of_file(path) != part.shard.sha256:
            return None
    except OSError:
        return None
    reasons = dict(part.unreadable)
    missing = [sample for sample in job.samples if sample.id in reasons]
    for sample in missing:
        try:
            pack(sample, options)
            return None
        except DataError:
            continue
    return Part(part.shard, part.rows, tuple((sample.id, reasons[sample.id]) for sample in missing))


def remove_parts(folder: Path) -> None:
    """Remove the records, which a finished set no longer needs."""
    for path in folder.glob(f".*{SUFFIX}"):
        path.unlink(missing_ok=True)


def _path(folder: Path, shard: str) -> Path:
    return folder / f".{shard}{SUFFIX}"
