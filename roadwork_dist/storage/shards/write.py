"""Writes a shard set in parallel and resumably; the bytes do not depend on the number of processes.

A tar gets its final name when it is complete and synced, and counts once its record (see ``parts``)
exists. The set counts once ``shards.json`` exists.
"""

import hashlib
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roadwork_dist.common.errors import DataError
from roadwork_dist.photos.check import refuse_too_many
from roadwork_dist.photos.manifest import Manifest, Sample
from roadwork_dist.storage.shards.folder import claim, locked, reopen, sweep
from roadwork_dist.storage.shards.index import PLAN_FILE, ShardFile, ShardSet, write_set
from roadwork_dist.storage.shards.pack import Packed, pack
from roadwork_dist.storage.shards.parts import Part, kept_part, known_parts, remove_parts
from roadwork_dist.storage.shards.plan import ShardJob, ShardOptions, key_of, known_fields, plan_shards
from roadwork_dist.storage.shards.tar import TarWriter
from roadwork_dist.storage.shards.worker_pool import Tick, WorkerPool


@dataclass(frozen=True)
class Written:
    """Result of :func:`write_shards`."""

    shards: ShardSet
    written: int
    """Number of tars written now."""
    kept: int
    """Number of existing, complete tars."""
    source_bytes: int
    """Total size of the source photos."""
    photo_bytes: int
    """Total size of the photos in the set."""


def write_shards(
    manifest: Manifest,
    out: Path,
    options: ShardOptions,
    *,
    workers: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write the photos of a manifest as a shard set, or the missing tars of one.

    Args:
        manifest: the samples.
        out: output folder, created if absent; empty, or with the same set.
        options: size, order and form.
        workers: number of processes; 0 or 1 = run in this process.
        on_progress: called with (photos done, total photos).

    Raises:
        DataError: more photos than ``options.max_share`` are unreadable, or the disk has no room.
        ConfigError: the folder holds something else.
        RunLockedError: another process writes to the folder.
        OSError: the disk is full or the folder cannot be written; finished tars are kept.
    """
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        claim(out, manifest.name, options)
        jobs = plan_shards(manifest, options)
        sweep(out, options, len(jobs))
        known = known_parts(out)
        with WorkerPool(min(workers, len(jobs)), on_progress, len(manifest)) as pool:
            parts = _existing_parts(pool, [job for job in jobs if job.file in known], known, out, options)
            missing = [job for job in jobs if job.number not in parts]
            kept = len(parts)
            if missing:
                reopen(out, manifest.name, options, parts.values())
                _check_room(out, missing)
            _check_unreadable(manifest, parts, options)
            for number, part in pool.run(_write_shard, [(job, out, options) for job in missing]):
                parts[missing[number].number] = part
                _check_unreadable(manifest, parts, options)
        shards = _finish(out, manifest.name, options, [parts[job.number] for job in jobs])
    photo_bytes = sum(row["length"] for part in parts.values() for row in part.rows)
    return Written(shards, len(missing), kept, sum(job.source_bytes for job in jobs), photo_bytes)


def _existing_parts(
    pool: WorkerPool, jobs: list[ShardJob], known: dict[str, Part], out: Path, options: ShardOptions
) -> dict[int, Part]:
    """The tars that need not be written, by number."""
    found = pool.run(_check_existing, [(known[job.file], job, out, options) for job in jobs])
    return {jobs[number].number: part for number, part in found if part is not None}


def _check_existing(tick: Tick, part: Part, job: ShardJob, out: Path, options: ShardOptions) -> Part | None:
    kept = kept_part(part, job, out, options)
    tick(len(job.samples) if kept is not None else 0)
    return kept


def _write_shard(tick: Tick, job: ShardJob, out: Path, options: ShardOptions) -> Part:
    """Write one tar and its record."""
    rows: list[dict[str, Any]] = []
    unreadable: list[tuple[str, str]] = []
    with TarWriter(out / job.file) as tar:
        for number, sample in enumerate(job.samples, start=job.first):
            try:
                packed = pack(sample, options)
            except DataError as error:
                unreadable.append((sample.id, str(error)))
            else:
                rows.append({"shard": job.number, **_add(tar, key_of(number), sample, packed)})
            tick(1)
    shard = ShardFile(job.file, tar.size, tar.sha256, len(rows), job.plan)
    part = Part(shard, tuple(rows), tuple(unreadable))
    part.save(out)
    return part


def _add(tar: TarWriter, key: str, sample: Sample, packed: Packed) -> dict[str, Any]:
    """Append the members of one sample; returns its index row, without the number of the tar."""
    row: dict[str, Any] = {
        "key": key,
        "extension": packed.extension,
        "offset": tar.add(f"{key}.{packed.extension}", packed.image),
        "length": len(packed.image),
        "crc32": zlib.crc32(packed.image),
        "sha256": hashlib.sha256(packed.image).hexdigest(),
        "width": packed.width,
        "height": packed.height,
        **known_fields(sample),
    }
    tar.add(f"{key}.json", packed.metadata)
    if packed.mask is not None:
        row["mask_offset"] = tar.add(f"{key}.mask.png", packed.mask)
        row["mask_length"], row["mask_crc32"] = len(packed.mask), zlib.crc32(packed.mask)
    return row


def _check_unreadable(manifest: Manifest, parts: dict[int, Part], options: ShardOptions) -> None:
    reasons = [reason for part in parts.values() for _, reason in part.unreadable]
    refuse_too_many(manifest.name, reasons, len(manifest), options.max_share)


def _check_room(out: Path, jobs: list[ShardJob]) -> None:
    needed, free = sum(job.expected_bytes for job in jobs), shutil.disk_usage(out).free
    if needed > free:
        raise DataError(
            f"{out}: {needed / 1e9:.2f} GB are needed but only {free / 1e9:.2f} GB are free: make "
            "room, choose another disk, or store smaller photos with --compact"
        )


def _finish(out: Path, source: str, options: ShardOptions, parts: list[Part]) -> ShardSet:
    shards = write_set(
        out,
        [row for part in parts for row in part.rows],
        name=options.name,
        kind=options.kind,
        source=source,
        shards=tuple(part.shard for part in parts),
        settings=options.settings(),
        unreadable=tuple(pair for part in parts for pair in part.unreadable),
        synthetic=options.synthetic,
    )
    remove_parts(out)
    (out / PLAN_FILE).unlink(missing_ok=True)
    return shards
