"""The manifest: the metadata of every photo, read from rows and validated.

Row numbers start at 1 and do not count a table's header.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roadwork_dist.common.errors import DataError
from roadwork_dist.common.registry import nearest
from roadwork_dist.config.batch import UNLABELLED, VOCABULARIES
from roadwork_dist.config.experiment import ColumnsConfig
from roadwork_dist.photos.images import MAX_PIXELS, FileImage, ImageSource, as_image_source
from roadwork_dist.photos.mask_images import MaskSource, PngMask

logger = logging.getLogger(__name__)

_NULL_WORDS = frozenset({"", "null", "none", "nan"})
_LABELS = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}
_RANGES = {"latitude": 90.0, "longitude": 180.0}
_MOST_WORDS_REPORTED = 10


@dataclass(frozen=True, slots=True)
class Sample:
    """One photo and its metadata; None = unknown."""

    id: str
    image: ImageSource
    label: int | None = None
    latitude: float | None = None
    longitude: float | None = None
    weather: str | None = None
    daytime: str | None = None
    scene: str | None = None
    description: str | None = None
    mask: MaskSource | None = None
    group: str | None = None


@dataclass(frozen=True)
class Manifest:
    """An ordered set of samples."""

    name: str
    """Name of the set in messages: the path or hub id it came from."""
    samples: tuple[Sample, ...]
    unknown_words: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """How often each (field, word) outside the vocabulary was read as null."""

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Id of every sample."""
        return tuple(sample.id for sample in self.samples)

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """``[N]``: 0, 1 or ``UNLABELLED``."""
        return np.array([UNLABELLED if s.label is None else s.label for s in self.samples], dtype=np.int64)

    @cached_property
    def coordinates(self) -> NDArray[np.float64]:
        """``[N, 2]`` latitude and longitude in degrees; both NaN where either is null."""
        pairs = [
            (math.nan, math.nan) if s.latitude is None or s.longitude is None else (s.latitude, s.longitude)
            for s in self.samples
        ]
        return np.array(pairs, dtype=np.float64).reshape(-1, 2)

    @cached_property
    def has_masks(self) -> bool:
        """Whether any sample has a mask."""
        return any(sample.mask is not None for sample in self.samples)

    def subset(self, indices: Iterable[int], *, name: str | None = None) -> "Manifest":
        """The samples at ``indices``, in that order."""
        chosen = tuple(self.samples[int(index)] for index in indices)
        return Manifest(name or self.name, chosen, self.unknown_words)

    def labelled(self) -> "Manifest":
        """The samples that have a label.

        Raises:
            DataError: no sample has a label.
        """
        indices = np.flatnonzero(self.labels != UNLABELLED)
        if len(indices) == 0:
            raise DataError(
                f"{self.name}: no row has a label, expected 0 or 1 in the label column: "
                "name the column with data.columns.label, or use the set for prediction only"
            )
        if len(indices) == len(self):
            return self
        logger.warning(
            "%s: %d of %d rows have no label and are left out", self.name, len(self) - len(indices), len(self)
        )
        return self.subset(indices)


def build_manifest(
    rows: Iterable[Mapping[str, Any]],
    *,
    name: str,
    columns: ColumnsConfig,
    image_root: Path | None = None,
    column_names: Sequence[str] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Manifest:
    """Validate rows of any source and build the manifest.

    None, NaN and the words "", "null", "none" and "nan" in any case are null. Words outside a vocabulary
    are read as null and logged once. Rows without an id use the path of their photo, or else their number.
    All invalid rows are reported at once.

    Args:
        rows: cells by column name. The image may be a source, a path, bytes or Hugging Face's mapping;
            the mask a ``MaskSource`` or any of these.
        name: name of the source in messages.
        columns: column name of each field.
        image_root: folder that relative paths start from; None = the working directory.
        column_names: columns of the source; None = those that occur in the rows.
        max_pixels: largest number of pixels of a mask.

    Raises:
        DataError: there are no rows, a column is missing, a value is invalid or an id is used twice.
    """
    rows = list(rows)
    if not rows:
        raise DataError(
            f"{name}: has no rows, expected at least one photo: check that the split is the right one"
        )
    present = (
        list(column_names)
        if column_names is not None
        else list(dict.fromkeys(k for row in rows for k in row))
    )
    reader = _RowReader(name, _resolve_columns(columns, present, name), image_root, max_pixels)
    samples: list[Sample] = []
    problems: dict[int, str] = {}
    for number, row in enumerate(rows, start=1):
        try:
            samples.append(reader.sample(row, number))
        except DataError as error:
            problems[number] = str(error)
    _raise_problems(problems)
    _report_unknown(name, reader.unknown)
    return Manifest(name, tuple(samples), dict(reader.unknown))


def is_null(value: object) -> bool:
    """Whether a cell reads as null: None, NaN, pandas' NA, or "", "null", "none", "nan" in any case."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    if isinstance(value, str):
        return value.strip().lower() in _NULL_WORDS
    return isinstance(value, float | np.floating) and math.isnan(value)


def _resolve_columns(columns: ColumnsConfig, present: list[str], name: str) -> dict[str, str]:
    """Field -> column, for the columns that are present.

    A column that is absent under its default name is null in every row. A column that the user named must
    exist; otherwise a typo would silently train without it.
    """
    resolved: dict[str, str] = {}
    for item in fields(ColumnsConfig):
        column: str | None = getattr(columns, item.name)
        if column is None:
            continue
        if column in present:
            resolved[item.name] = column
        elif item.name == "image" or column != item.default:
            close = nearest(column, present, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise DataError(
                f"{name}: has no column {column!r} for the {item.name}, expected one of {', '.join(present)}"
                f"{hint}: add it or set data.columns.{item.name}"
            )
    return resolved


class _RowReader:
    """Turns rows into samples; remembers ids and unknown words."""

    def __init__(self, name: str, columns: dict[str, str], root: Path | None, max_pixels: int) -> None:
        self.name = name
        self.columns = columns
        self.root = root
        self.max_pixels = max_pixels
        self.unknown: Counter[tuple[str, str]] = Counter()
        self._row_of_id: dict[str, int] = {}

    def sample(self, row: Mapping[str, Any], number: int) -> Sample:
        where = f"{self.name}, row {number}"
        cells = {name: _plain(row.get(column)) for name, column in self.columns.items()}
        image = self._image(cells["image"], where)
        return Sample(
            id=self._id(cells.get("id"), cells["image"], number, where),
            image=image,
            label=_label(cells.get("label"), where),
            latitude=_degrees("latitude", cells.get("latitude"), where),
            longitude=_degrees("longitude", cells.get("longitude"), where),
            weather=self._word("weather", cells.get("weather"), where),
            daytime=self._word("daytime", cells.get("daytime"), where),
            scene=self._word("scene", cells.get("scene"), where),
            description=_text("description", cells.get("description"), where),
            mask=self._mask(cells.get("mask"), where),
            group=_group(cells.get("group"), where),
        )

    def _image(self, cell: Any, where: str) -> ImageSource:
        if _absent(cell):
            raise DataError(
                f"{where}: image is null, expected a path or bytes: fill the cell or remove the row"
            )
        return as_image_source(cell, root=self.root, name=where)

    def _mask(self, cell: Any, where: str) -> MaskSource | None:
        if _absent(cell):
            return None
        if hasattr(cell, "bits"):
            mask: MaskSource = cell
            return mask
        return PngMask(as_image_source(cell, root=self.root, name=f"{where}, mask"), self.max_pixels)

    def _id(self, cell: Any, image: Any, number: int, where: str) -> str:
        if not is_null(cell):
            if not isinstance(cell, str | int | float):
                raise DataError(f"{where}: id is a {type(cell).__name__}, expected text: set data.columns.id")
            # A column of integers that contains a null is read as floats.
            own = str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell).strip()
        else:
            own = _path_of(image) or f"row-{number}"
        first = self._row_of_id.setdefault(own, number)
        if first != number:
            origin = "id" if not is_null(cell) else "id (taken from the image's path)"
            raise DataError(
                f"{where}: {origin} {own!r} is also the id of row {first}, expected unique ids: "
                "rename one or remove the duplicate"
            )
        return own

    def _word(self, name: str, cell: Any, where: str) -> str | None:
        word = _text(name, cell, where)
        if word is None or (key := word.lower()) in VOCABULARIES[name]:
            return word and word.lower()
        self.unknown[name, key] += 1
        return None


def _plain(value: Any) -> Any:
    """Convert a numpy scalar to a Python number."""
    return value.item() if isinstance(value, np.generic) else value


def _absent(cell: Any) -> bool:
    """Whether a cell is null, or an empty mapping of Hugging Face."""
    if isinstance(cell, Mapping):
        return cell.get("bytes") is None and is_null(cell.get("path"))
    return is_null(cell)


def _path_of(image: Any) -> str | None:
    """The path of a row's photo; None for bytes."""
    if isinstance(image, Mapping):
        image = image.get("path")
    if isinstance(image, FileImage):
        image = image.path
    return Path(image).as_posix() if isinstance(image, str | Path) and not is_null(image) else None


def _label(cell: Any, where: str) -> int | None:
    if is_null(cell):
        return None
    label = _LABELS.get(str(cell).strip().lower()) if isinstance(cell, str | bool | int | float) else None
    if label is None:
        raise DataError(
            f"{where}: label is {_shown(cell)}, expected 0 (no roadwork), 1 (roadwork) or null: "
            "correct the cell or set data.columns.label"
        )
    return label


def _degrees(name: str, cell: Any, where: str) -> float | None:
    if is_null(cell):
        return None
    limit = _RANGES[name]
    try:
        value = math.nan if isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError):
        value = math.nan
    if not -limit <= value <= limit:
        raise DataError(
            f"{where}: {name} is {_shown(cell)}, expected degrees from {-limit:g} to {limit:g} or null: "
            "correct the cell or leave it empty"
        )
    return value


def _text(name: str, cell: Any, where: str) -> str | None:
    if is_null(cell):
        return None
    if not isinstance(cell, str):
        raise DataError(
            f"{where}: {name} is {_shown(cell)} ({type(cell).__name__}), expected text or null: "
            f"correct the cell or set data.columns.{name}"
        )
    return cell.strip()


def _group(cell: Any, where: str) -> str | None:
    """A group may be text or a number; a column of integers that contains a null is read as floats."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return _text("group", str(cell) if isinstance(cell, int | float) and not is_null(cell) else cell, where)


def _shown(cell: object) -> str:
    text = repr(cell)
    return text if len(text) <= 60 else text[:57] + "..."


def _raise_problems(problems: dict[int, str]) -> None:
    """Raise one line for all invalid rows: the first in full, the others by number."""
    if not problems:
        return
    first, *others = problems
    message = problems[first]
    if others:
        numbers = ", ".join(map(str, others[:10])) + (", …" if len(others) > 10 else "")
        rows = "row is" if len(others) == 1 else "rows are"
        message += f" ({len(others)} more {rows} wrong: {numbers})"
    raise DataError(message)


def describe_unknown(unknown: Mapping[tuple[str, str], int]) -> list[str]:
    """One text per word outside its vocabulary, most frequent first, with the three nearest words."""
    ordered = sorted(unknown.items(), key=lambda item: (-item[1], item[0]))
    return [
        f"{name} {word!r} ×{count} (nearest: {', '.join(nearest(word, list(VOCABULARIES[name]), n=3))})"
        for (name, word), count in ordered
    ]


def _report_unknown(name: str, unknown: Mapping[tuple[str, str], int]) -> None:
    if not unknown:
        return
    texts = describe_unknown(unknown)
    more = (
        f"; and {len(texts) - _MOST_WORDS_REPORTED} more words" if len(texts) > _MOST_WORDS_REPORTED else ""
    )
    logger.warning(
        "%s: words outside the vocabulary are read as null (%d in total): %s%s",
        name,
        sum(unknown.values()),
        "; ".join(texts[:_MOST_WORDS_REPORTED]),
        more,
    )
