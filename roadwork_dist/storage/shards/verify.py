"""Verification of a local set's tars against ``shards.json`` and the index."""

import tarfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roadwork_dist.common.files import sha256_of_file
from roadwork_dist.storage.shards.descriptors import open_files
from roadwork_dist.storage.shards.index import SET_FILE, ShardFile, read_index, read_set
from roadwork_dist.storage.shards.tar import members

Row = dict[str, Any]

_MOST_SHOWN = 5


@dataclass(frozen=True)
class ShardProblem:
    """A problem of one tar."""

    shard: str
    """File name of the tar."""
    reason: str
    """One line, with the keys of lost samples."""


def verify_shards(
    folder: Path, *, workers: int = 1, on_progress: Callable[[int, int], None] | None = None
) -> list[ShardProblem]:
    """Read every tar and check its size, its checksum, and its members against the index.

    Args:
        folder: folder of a finished set.
        workers: number of threads; hashing releases Python's global lock.
        on_progress: called with (tars done, total tars).

    Raises:
        DataError: ``shards.json`` or the index cannot be read.
    """
    shards = read_set(folder)
    rows = _rows_by_shard(folder)
    problems = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        jobs = enumerate(shards.shards)
        found = pool.map(lambda job: verify_shard(folder / job[1].name, job[1], rows.get(job[0], [])), jobs)
        for done, (shard, reason) in enumerate(zip(shards.shards, found, strict=True), start=1):
            if reason:
                problems.append(ShardProblem(shard.name, reason))
            if on_progress is not None:
                on_progress(done, len(shards.shards))
    known = {shard.name for shard in shards.shards}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in known:
            problems.append(ShardProblem(path.name, f"is not listed in {SET_FILE}: remove it"))
    return problems


def verify_shard(path: Path, shard: ShardFile, rows: list[Row]) -> str:
    """What is wrong with one tar ("" = nothing)."""
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"cannot be read ({error.strerror}): copy it again"
    reasons = []
    if size != shard.bytes:
        reasons.append(f"has {size:,} bytes, expected {shard.bytes:,}")
    elif sha256_of_file(path) != shard.sha256:
        reasons.append(f"checksum differs from {SET_FILE}")
    if shard.samples != len(rows):
        reasons.append(f"has {len(rows):,} rows in the index, expected {shard.samples:,}")
    reasons += _against_index(path, rows)
    if reasons:
        lost = list(_lost(path, rows))
        shown = ", ".join(lost[:_MOST_SHOWN]) + (" …" if len(lost) > _MOST_SHOWN else "")
        reasons.append(f"{len(lost):,} of {len(rows):,} samples are lost" + (f" ({shown})" if lost else ""))
        return "; ".join(reasons) + ": copy it again, or run the same `roadwork-dist shard` again"
    return ""


def _against_index(path: Path, rows: list[Row]) -> Iterator[str]:
    """Differences between the members of a tar and the index."""
    try:
        found = members(path)
    except (tarfile.TarError, OSError) as error:
        yield f"is not a complete tar ({error})"
        return
    texts = {name for name in found if name.endswith(".json")}
    expected = {}
    for row in rows:
        expected[f"{row['key']}.{row['extension']}"] = (row["offset"], row["length"])
        if row["mask_offset"] is not None:
            expected[f"{row['key']}.mask.png"] = (row["mask_offset"], row["mask_length"])
    wrong = [name for name, place in expected.items() if found.get(name) != place]
    surplus = sorted(set(found) - set(expected) - texts)
    for names, what in ((wrong, "not where the index has them"), (surplus, "not in the index")):
        if names:
            yield f"{len(names):,} members are {what}, such as {names[0]}"


def _lost(path: Path, rows: list[Row]) -> Iterator[str]:
    """Keys of samples whose photo or mask does not match the checksum in the index."""
    try:
        for row in rows:
            for kind in ("", "mask_"):
                if row[f"{kind}offset"] is None:
                    continue
                data = open_files.read(str(path), row[f"{kind}offset"], row[f"{kind}length"])
                if zlib.crc32(data) != row[f"{kind}crc32"]:
                    yield str(row["key"])
                    break
    except OSError:
        yield from (str(row["key"]) for row in rows)


def _rows_by_shard(folder: Path) -> dict[int, list[Row]]:
    columns = ["key", "shard", "extension"]
    columns += [f"{kind}{name}" for kind in ("", "mask_") for name in ("offset", "length", "crc32")]
    found: dict[int, list[Row]] = {}
    index = read_index(folder, read_set(folder)).select(columns)
    for row in index.to_pylist():
        found.setdefault(row["shard"], []).append(row)
    return found
