"""Write a synthetic data set in parallel, resuming an interrupted run."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

from roadwork_dist.common.errors import DataError
from roadwork_dist.common.files import write_atomic
from roadwork_dist.demo.synthetic.metadata import SPLITS, Facts, photo_facts
from roadwork_dist.demo.synthetic.render import mask_bytes, photo_bytes, render

VERSION = 2
"""Increased when the same parameters would give different photos."""
MARKER = "synthetic.json"
"""Written last; contains the parameters of a complete set."""
_PLAN = ".synthetic.plan.json"

Size = tuple[int, int]


@dataclass(frozen=True)
class SyntheticSet:
    """A synthetic data set on disk."""

    folder: Path
    train: Path
    val: Path
    target: Path
    rendered: int  # photos rendered by this call; 0 = the set was complete


@dataclass(frozen=True)
class _Job:
    folder: Path
    seed: int
    split: str
    number: int
    size: Size


def write_synthetic(
    out: Path,
    *,
    seed: int = 42,
    n_train: int = 264,
    n_val: int = 96,
    n_target: int = 40,
    n_large: int = 48,
    workers: int = 2,
    size: Size = (2016, 1512),
    large_size: Size = (4032, 3024),
    progress: Callable[[int, int], None] | None = None,
) -> SyntheticSet:
    """Render street scenes with and without roadwork into a folder; their EXIF marks them as synthetic.

    The folder gets ``train.csv``, ``val.csv`` and ``target.csv``, ``images/*.jpg``, ``masks/*.png`` and,
    last, ``synthetic.json`` with the parameters. Each photo is a pure function of (seed, split, number,
    its size). Masks have the size of the photo in its upright orientation according to EXIF. Bit i of a
    pixel is class i of ``MASK_CLASSES``; a photo without roadwork has a mask of zeros. A complete set is
    not written again; an interrupted one is completed.

    Args:
        out: output folder, created if missing.
        seed: seed of the whole set.
        n_train: number of training photos; labels are balanced in every split.
        n_val: number of validation photos.
        n_target: number of photos around the five target cities.
        n_large: how many of all photos have ``large_size``, spread evenly.
        workers: processes; 0 or 1 = render in this process.
        size: width and height of the other photos in px, landscape, at least 64.
        large_size: width and height of the large photos.
        progress: called with (photos done, total photos) after every photo.

    Raises:
        DataError: a number is out of range, or the folder holds a set with other parameters.
    """
    counts = dict(zip(SPLITS, (n_train, n_val, n_target), strict=True))
    _check(counts, n_large, size, large_size)
    parameters = {
        "synthetic": True,
        "version": VERSION,
        "seed": seed,
        "counts": counts,
        "n_large": n_large,
        "size": list(size),
        "large_size": list(large_size),
    }
    result = SyntheticSet(out, out / "train.csv", out / "val.csv", out / "target.csv", rendered=0)
    if _same(out / MARKER, parameters):
        return result
    for folder in (out, out / "images", out / "masks"):
        folder.mkdir(parents=True, exist_ok=True)
    if not _same(out / _PLAN, parameters):
        if any((out / "images").iterdir()):
            raise DataError(f"{out / 'images'} holds files that are not of this set: choose an empty folder")
        write_atomic(out / _PLAN, _json(parameters))
    sizes = _deal_sizes(sum(counts.values()), n_large, size, large_size)
    jobs = [_Job(out, seed, split, n, next(sizes)) for split in SPLITS for n in range(counts[split])]
    missing = [job for job in jobs if not (out / "images" / f"{job.split}-{job.number:05d}.jpg").exists()]
    _run(missing, len(jobs), workers, progress)
    for split in SPLITS:
        facts = [photo_facts(seed, split, n) for n in range(counts[split])]
        write_atomic(out / f"{split}.csv", _table(facts))
    _sweep(out)
    write_atomic(out / MARKER, _json(parameters))
    (out / _PLAN).unlink(missing_ok=True)
    return replace(result, rendered=len(missing))


def _check(counts: dict[str, int], n_large: int, size: Size, large_size: Size) -> None:
    total = sum(counts.values())
    for name, count in counts.items():
        if count < 0:
            raise DataError(f"n_{name} is {count}, expected a number >= 0")
    if not 0 <= n_large <= total:
        raise DataError(f"n_large is {n_large}, expected 0 to {total}, the total number of photos")
    for name, (width, height) in (("size", size), ("large_size", large_size)):
        if not width >= height >= 64:
            raise DataError(
                f"{name} is {width}x{height}, expected landscape (width >= height), at least 64 px high"
            )


def _same(path: Path, parameters: dict[str, object]) -> bool:
    """Whether a file holds these parameters; False if there is no file.

    Raises:
        DataError: it holds other parameters, or cannot be read.
    """
    if not path.exists():
        return False
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({error}): delete the folder {path.parent} and render again"
        ) from error
    if found == parameters:
        return True
    keys = sorted(k for k in parameters if not isinstance(found, dict) or found.get(k) != parameters[k])
    differ = ", ".join(
        f"{k} {found.get(k) if isinstance(found, dict) else found!r} instead of {parameters[k]}" for k in keys
    )
    raise DataError(
        f"{path.parent} holds a synthetic set with other parameters ({differ}): "
        "choose another folder or delete it"
    )


def _json(parameters: dict[str, object]) -> bytes:
    return (json.dumps(parameters, indent=1) + "\n").encode()


def _deal_sizes(total: int, n_large: int, size: Size, large_size: Size) -> Iterator[Size]:
    """Sizes of all photos in order, with the large ones spread evenly over the splits."""
    for i in range(total):
        large = (i + 1) * n_large // total > i * n_large // total
        yield large_size if large else size


def _write_photo(job: _Job) -> None:
    """Render one photo. The JPEG is written after the mask, so if it exists the photo is complete."""
    facts = photo_facts(job.seed, job.split, job.number)
    picture = render(facts, job.seed, job.size)
    write_atomic(job.folder / "masks" / f"{facts.id}.png", mask_bytes(picture))
    write_atomic(job.folder / "images" / f"{facts.id}.jpg", photo_bytes(picture, facts))


def _run(jobs: list[_Job], total: int, workers: int, progress: Callable[[int, int], None] | None) -> None:
    """Render all jobs, large photos first, so that all processes finish at about the same time."""
    ordered = sorted(jobs, key=lambda job: -job.size[0] * job.size[1])
    done = total - len(jobs)
    if workers <= 1 or len(jobs) <= 1:
        for job in ordered:
            _write_photo(job)
            done += 1
            if progress:
                progress(done, total)
        return
    # spawn: a child forked from a process with torch threads may hang
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn")) as pool:
        for _ in pool.map(_write_photo, ordered, chunksize=4):
            done += 1
            if progress:
                progress(done, total)


def _sweep(out: Path) -> None:
    """Remove temporary files left by killed runs."""
    for folder in ("images", "masks"):
        for path in (out / folder).glob(".*.tmp"):
            path.unlink(missing_ok=True)


_COLUMNS = (
    "id",
    "image",
    "label",
    "latitude",
    "longitude",
    "weather",
    "daytime",
    "scene",
    "description",
    "mask",
)


def _row(facts: Facts) -> dict[str, object]:
    row: dict[str, object] = {
        "id": facts.id,
        "image": f"images/{facts.id}.jpg",
        "label": facts.label,
        "mask": f"masks/{facts.id}.png",
    }
    if "gps" not in facts.null:
        row |= {"latitude": facts.latitude, "longitude": facts.longitude}
    for name in ("weather", "daytime", "scene", "description"):
        if name not in facts.null:
            row[name] = getattr(facts, name)
    return row


def _table(rows: list[Facts]) -> bytes:
    """CSV with one row per photo; a null is an empty field."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, _COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(_row(facts) for facts in rows)
    return buffer.getvalue().encode()
