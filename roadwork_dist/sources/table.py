"""Reader of CSV and Parquet tables."""

import csv
from collections import Counter
from pathlib import Path
from typing import Any

from roadwork_dist.common.errors import DataError
from roadwork_dist.config.experiment import DataConfig
from roadwork_dist.photos.manifest import Manifest, build_manifest
from roadwork_dist.sources.class_labels import names_of_schema, read_class_labels


def read_table(path: Path, config: DataConfig) -> Manifest:
    """Read a CSV (UTF-8, comma, header) or Parquet table.

    Relative image paths start from ``config.image_root``, or else from the folder of the table. A Parquet
    table that contains the photos is read with the library datasets, which leaves them on disk.

    Raises:
        DataError: the table or one of its rows cannot be used.
    """
    if path.suffix.lower() == ".csv":
        columns, rows = _read_csv(path)
    else:
        from pyarrow import parquet

        try:
            schema = parquet.read_schema(path)
            if _holds_photos(schema, config.columns.image):
                from roadwork_dist.sources import huggingface

                return huggingface.read_parquet(path, config)
            columns, rows = schema.names, parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's errors derive from these
            raise _unreadable(path, "a Parquet table", error) from error
        read_class_labels(rows, names_of_schema(schema), config.columns, str(path))
    return build_manifest(
        rows,
        name=str(path),
        columns=config.columns,
        image_root=Path(config.image_root) if config.image_root else path.parent,
        column_names=columns,
        max_pixels=config.max_pixels,
    )


def _read_csv(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    columns: list[str] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # Excel writes a byte order mark
            # Without strict an unclosed quote would silently swallow all following rows.
            reader = csv.DictReader(file, strict=True)
            columns = list(reader.fieldnames or [])
            _check_unique(columns, path)
            for number, row in enumerate(reader, start=1):
                if None in row:  # DictReader's key for surplus cells
                    raise DataError(
                        f"{path}, row {number}: has more cells than the header's {len(columns)}, expected as "
                        "many: put text with commas in double quotes"
                    )
                rows.append(row)
    except csv.Error as error:
        where = f"row {len(rows) + 1} or later" if columns else "header"
        raise DataError(f"{path}, {where}: {_wrong_cell(error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, "a CSV table in UTF-8", error) from error
    return columns, rows


def _check_unique(columns: list[str], path: Path) -> None:
    """Reject duplicate names, since only the last would be read; unnamed columns (Excel) are ignored."""
    duplicate = next((name for name, count in Counter(columns).items() if name and count > 1), None)
    if duplicate is not None:
        raise DataError(
            f"{path}, header: has the column {duplicate!r} {columns.count(duplicate)} times, expected it "
            "once: rename or remove the others"
        )


def _wrong_cell(error: csv.Error) -> str:
    """Describe an invalid cell; errors of the module ``csv`` differ only in their text."""
    reason = str(error)
    if "end of data" in reason:
        return "a quote is opened and not closed, expected pairs: close it, or double a quote in text"
    if "field limit" in reason:
        return (
            f"a cell has more than {csv.field_size_limit()} characters, expected fewer: shorten it, or close "
            "the quote that was opened before it"
        )
    if "expected after" in reason:
        return (
            "text follows the quote that closes a cell, expected a comma: close the quote that was opened "
            "before it, or double a quote in text"
        )
    return f"cannot be read ({reason}), expected CSV: write the file again"


def _holds_photos(schema: Any, column: str) -> bool:
    from pyarrow import types

    if column not in schema.names:
        return False
    kind = schema.field(column).type
    return bool(types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind))


def _unreadable(path: Path, expected: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(f"{path}: cannot be read ({reason}), expected {expected}: write the file again")
