"""``roadwork-dist predict``: predicts the probability of roadwork for photos and folders."""

import os
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from roadwork_dist.cli.arguments import Parser, probability, whole_number
from roadwork_dist.common.errors import DataError

if TYPE_CHECKING:
    from roadwork_dist.photos.manifest import Sample

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""File name endings of photos in a folder."""

EXIT_SOME_UNREADABLE = 3
"""Some photos could not be read; the others are predicted."""


def run(arguments: Sequence[str]) -> int:
    """Predict; returns 0, or 3 if some photos could not be read."""
    options = _parser().parse(arguments)
    photos = find_photos(options.paths)
    # Imported here, so that argument errors do not wait for torch.
    from roadwork_dist.cli.logs import set_up_logging
    from roadwork_dist.inference.output import PredictionFile
    from roadwork_dist.inference.predictor import Predictor, Unreadable
    from roadwork_dist.recipes.progress import progress_bar

    set_up_logging()
    output = PredictionFile(options.output)
    predictor = Predictor.from_pretrained(options.model, device=options.device, select=options.select)
    if options.threshold is not None:
        predictor.threshold = options.threshold
    unreadable: list[Unreadable] = []
    predicted = positives = 0
    with output, progress_bar("predicting") as show_progress:
        show_progress(0, len(photos))
        for prediction in predictor.predict(
            _samples(photos),
            batch_size=options.batch_size,
            workers=options.workers,
            on_error=unreadable.append,
        ):
            output.add(prediction)
            predicted += 1
            positives += prediction.prediction
            show_progress(predicted + len(unreadable), len(photos))
        show_progress(predicted + len(unreadable), len(photos))
    print(
        f"{options.output}: {predicted:,} photos, {positives:,} with roadwork "
        f"(probability above {predictor.threshold:.3f})"
    )
    if unreadable:
        print(f"{len(unreadable):,} of {len(photos):,} photos could not be read:", file=sys.stderr)
        for photo in unreadable:
            print(f"  {photo.reason}", file=sys.stderr)
        return EXIT_SOME_UNREADABLE
    return 0


def find_photos(paths: Sequence[Path]) -> list[Path]:
    """Given files as they are, and the photos in given folders, recursively and sorted by name; each once.

    Raises:
        DataError: a path does not exist, or there is no photo at all.
    """
    found: dict[Path, Path] = {}  # resolved → as named
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: there is no such file or folder: correct the path")
        for photo in _photos_below(path) if path.is_dir() else [path]:
            found.setdefault(photo.resolve(), photo)
    if not found:
        folders = ", ".join(map(str, paths))
        raise DataError(f"{folders}: holds no photo, expected files ending in {', '.join(SUFFIXES)}")
    return list(found.values())


def _photos_below(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            # skips hidden files such as "._x.jpg", which some file managers create next to photos
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(parent, name)


def _samples(photos: Sequence[Path]) -> "Iterator[Sample]":
    """Photos with their path as id; bytes that are not UTF-8 become replacement characters."""
    from roadwork_dist.photos.images import FileImage
    from roadwork_dist.photos.manifest import Sample

    for photo in photos:
        yield Sample(id=os.fsencode(photo).decode("utf-8", "replace"), image=FileImage(photo))


def _parser() -> Parser:
    parser = Parser(
        "roadwork-dist predict",
        "Write the probability of roadwork for every photo. Photos that cannot be read are skipped and\n"
        "listed at the end; the exit code is then 3.",
    )
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.add_argument("paths", metavar="PATH", type=Path, nargs="+", help="photos, and folders of photos")
    parser.add_argument("--model", metavar="DIR", type=Path, required=True, help="a run folder, or its best/")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        required=True,
        help="output file; its suffix .parquet, .csv or .jsonl (JSON lines) sets the format",
    )
    parser.add_argument(
        "--threshold",
        type=probability,
        help="probability above which a photo is called roadwork (default: the one that the run chose)",
    )
    parser.add_select()
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--batch_size", type=whole_number(1), default=8, help="photos per batch (default: %(default)s)"
    )
    spare = max(0, min(8, len(os.sched_getaffinity(0)) - 1))
    parser.add_argument(
        "--workers",
        type=whole_number(0),
        default=spare,
        help="processes that decode photos (default here: %(default)s)",
    )
    return parser
