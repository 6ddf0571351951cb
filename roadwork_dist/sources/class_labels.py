"""Columns of Hugging Face's type ``ClassLabel``, which stores class names as numbers.

Parquet tables with this type in their metadata are supported as well.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from roadwork_dist.common.errors import DataError
from roadwork_dist.config.experiment import ColumnsConfig

logger = logging.getLogger(__name__)

_ROADWORK = re.compile(r"road[\W_]*works?|construction|work[\W_]*zones?")
_POSITIVE = {"roadwork", "positive", "yes", "true", "1"}
_NEGATIVE = {"none", "no", "non", "not", "without", "normal", "negative", "false", "background", "clear"}


def names_of_schema(schema: Any) -> dict[str, list[str]]:
    """Names of the ``ClassLabel`` columns of a ``pyarrow.Schema``, by column."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    import datasets

    return names_of_features(datasets.Features.from_arrow_schema(schema))


def names_of_features(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of the ``ClassLabel`` columns of ``datasets.Features``, by column."""
    import datasets

    return {
        column: list(feature.names)
        for column, feature in features.items()
        if isinstance(feature, datasets.ClassLabel) and feature.names
    }


def read_class_labels(
    rows: Iterable[dict[str, Any]], names: Mapping[str, list[str]], columns: ColumnsConfig, source: str
) -> None:
    """Replace numbers by names in all columns but the label, whose names are checked instead.

    Args:
        rows: cells by column name; modified in place.
        names: class names by ``ClassLabel`` column.
        columns: column name of each field.
        source: name of the set in messages.

    Raises:
        DataError: according to the names, label 0 is roadwork or label 1 is not.
    """
    if columns.label is not None and columns.label in names:
        _check_label(names[columns.label], columns.label, source)
    texts = {
        column: dict(enumerate(own)) | {-1: None}  # datasets stores unknown labels as -1
        for column, own in names.items()
        if column in vars(columns).values() and column != columns.label
    }
    for row in rows if texts else ():
        row.update(
            {column: own.get(row[column], row[column]) for column, own in texts.items() if column in row}
        )


def _check_label(names: list[str], column: str, source: str) -> None:
    mapping = ", ".join(f"{number} = {name!r}" for number, name in enumerate(names[:2]))
    logger.info("%s: %s: %s", source, column, mapping)
    none, roadwork = (_words(name) for name in (*names, "", "")[:2])
    if (_positive(none) and not _positive(roadwork)) or (roadwork & _NEGATIVE and not none & _NEGATIVE):
        raise DataError(
            f"{source}: the column {column!r} has {mapping}, expected 1 to mean roadwork: swap the labels "
            "with `align_labels_with_mapping` or `map` of datasets, or, if only the names are wrong, give it "
            "the right ones with `cast_column`"
        )


def _words(name: str) -> set[str]:
    """Lower-case words of a name; any term for roadwork becomes "roadwork", even inside ``NoRoadWorks``."""
    split = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    return set(re.split(r"[\W_]+", _ROADWORK.sub(" roadwork ", split)))


def _positive(words: set[str]) -> bool:
    return bool(words & _POSITIVE) and not words & _NEGATIVE
