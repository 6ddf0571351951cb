"""Reads and writes ``predictions.parquet``: model output and metadata per photo."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roadwork_dist.common.errors import DataError
from roadwork_dist.common.files import write_atomic

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

REQUIRED = ("id", "split", "label", "logit_0", "logit_1", "probability")
"""Required columns; the label may be null."""

OUT_OF_FOLD = "out-of-fold"
"""Split of photos each predicted by the model of the fold that was not trained on it."""

METADATA = ("latitude", "longitude", "weather", "daytime", "scene")
"""Metadata of the photo, null where unknown."""

COLUMNS = (*REQUIRED, "fold", "view_gates", *METADATA, "width", "height")
"""All columns, in the order of the file. ``fold`` is null outside cross-validation; ``view_gates`` has
one number in [0, 1] per view, 0 for a pruned one; ``width`` and ``height`` are px of the photo."""


def predictions_schema() -> "pa.Schema":
    """Arrow schema of the file."""
    import pyarrow as pa

    types: dict[str, Any] = {
        **dict.fromkeys(("id", "split", "weather", "daytime", "scene"), pa.string()),
        **dict.fromkeys(("label", "fold", "width", "height"), pa.int32()),
        **dict.fromkeys(("logit_0", "logit_1", "view_gates"), pa.float32()),
        **dict.fromkeys(("probability", "latitude", "longitude"), pa.float64()),
    }
    types["view_gates"] = pa.list_(pa.float32())
    return pa.schema([pa.field(name, types[name], nullable=name not in ("id", "split")) for name in COLUMNS])


def write_predictions(path: Path, rows: Iterable[Mapping[str, Any]], *, synthetic: bool = False) -> None:
    """Write the file atomically.

    Args:
        path: file to write; its folder must exist.
        rows: one mapping per photo with the keys ``REQUIRED`` and, if known, the other ``COLUMNS``.
            ``probability`` is that of class 1.
        synthetic: whether the photos are synthetic; stored in the file and shown in the report.

    Raises:
        DataError: a row lacks a required column, or has an unknown one or a value of the wrong type.
        OSError: the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    checked = [_checked(dict(row), number) for number, row in enumerate(rows)]
    schema = predictions_schema().with_metadata({"synthetic": str(synthetic).lower()})
    try:
        table = pa.Table.from_pylist(checked, schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"predictions for {path}: {error}") from error
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_atomic(path, buffer.getvalue())


def _checked(row: dict[str, Any], number: int) -> dict[str, Any]:
    missing = [name for name in REQUIRED if name not in row]
    unknown = [name for name in row if name not in COLUMNS]
    where = f"prediction {number} (id {row.get('id')!r})"
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}: required are {', '.join(REQUIRED)}")
    if unknown:
        raise DataError(f"{where} has unknown columns {', '.join(unknown)}: known are {', '.join(COLUMNS)}")
    if not (isinstance(row["id"], str) and isinstance(row["split"], str)):
        raise DataError(f"{where} has split {row['split']!r}: expected id and split as strings")
    if row["label"] not in (0, 1, None):
        raise DataError(f"{where} has label {row['label']!r}, expected 0, 1 or null")
    return row


def read_predictions(path: Path) -> "pd.DataFrame":
    """Read a file of predictions.

    Returns:
        One row per photo with all of ``COLUMNS``: missing optional ones are null, ``label``, ``fold``,
        ``width`` and ``height`` are nullable integers, unknown words are None. ``attrs["synthetic"]`` says
        whether the photos are synthetic.

    Raises:
        DataError: the file is missing or unreadable, or a required column or value is missing or wrong.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataError(f"{path} does not exist: expected predictions written by a run or `evaluate`")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet ({error}): write it again with `roadwork-dist evaluate`"
        ) from error
    missing = [name for name in REQUIRED if name not in table.column_names]
    if missing:
        raise DataError(
            f"{path} lacks the columns {', '.join(missing)}: found {', '.join(table.column_names)}"
        )
    synthetic = (table.schema.metadata or {}).get(b"synthetic") == b"true"
    frame = as_predictions(table.to_pandas(), name=str(path))
    frame.attrs["synthetic"] = synthetic
    return frame


def as_predictions(frame: "pd.DataFrame", name: str = "predictions") -> "pd.DataFrame":
    """A copy of a frame with all of ``COLUMNS`` in their types; see :func:`read_predictions`.

    Raises:
        DataError: a required column is missing, a label is not 0, 1 or null, or a probability is
            outside [0, 1] (NaN is kept: the photo counts as not scored).
    """
    import pandas as pd

    missing = [column for column in REQUIRED if column not in frame.columns]
    if missing:
        raise DataError(f"{name} lacks the columns {', '.join(missing)}")
    out = pd.DataFrame(index=range(len(frame)))
    for column in COLUMNS:
        known = frame[column].reset_index(drop=True) if column in frame.columns else None
        out[column] = _typed(column, known, len(frame), name)
    _refuse(out, ~out["label"].isin([0, 1]) & out["label"].notna(), "label", "0, 1 or null", name)
    outside = (out["probability"] < 0) | (out["probability"] > 1)
    _refuse(out, outside, "probability", "a number in [0, 1]", name)
    out.attrs.update(frame.attrs)
    return out


def _typed(column: str, known: "pd.Series[Any] | None", rows: int, name: str) -> "pd.Series[Any]":
    import pandas as pd

    series: pd.Series[Any] = pd.Series([None] * rows, dtype=object) if known is None else known
    try:
        if column in ("label", "fold", "width", "height"):
            return series.astype("Float64").astype("Int64")
        if column in ("logit_0", "logit_1", "probability", "latitude", "longitude"):
            return series.astype("float64")
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: column {column} does not hold numbers ({error})") from error
    objects = series.astype(object)
    if column == "view_gates":
        return objects
    return objects.where(objects.notna(), None)


def _refuse(frame: "pd.DataFrame", bad: "pd.Series[bool]", column: str, expected: str, name: str) -> None:
    if bad.any():
        row = int(bad.to_numpy(dtype=bool).argmax())
        got = frame[column].iloc[row]
        raise DataError(
            f"{name}, row {row} (id {frame['id'].iloc[row]!r}): {column} is {got}, expected {expected}"
        )
