"""Writes predictions incrementally to Parquet, CSV or JSON lines."""

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.files import sync_folder
from roadwork_dist.inference.predictor import Prediction

COLUMNS = tuple(item.name for item in fields(Prediction))
ROWS_AT_ONCE = 4096
"""Number of rows buffered in memory, and of a row group in Parquet."""


class _Rows(Protocol):
    """Writer of rows in one format."""

    def write(self, rows: Sequence[dict[str, Any]]) -> None: ...

    def close(self) -> None: ...


class _TextRows:
    """Base of the writers of UTF-8 text."""

    def __init__(self, file: BinaryIO) -> None:
        self.text = io.TextIOWrapper(file, encoding="utf-8", newline="")

    def close(self) -> None:
        self.text.detach()  # flushes, but leaves the file open for its owner


class _JsonLines(_TextRows):
    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        self.text.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class _Csv(_TextRows):
    """CSV, with the view gates as a JSON list in one cell."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.table = csv.DictWriter(self.text, COLUMNS, lineterminator="\n")
        self.table.writeheader()

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        self.table.writerows({**row, "view_gates": json.dumps(row["view_gates"])} for row in rows)


class _Parquet:
    def __init__(self, file: BinaryIO) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        types: dict[str, Any] = dict.fromkeys(COLUMNS, pa.float32())
        types |= {"id": pa.string(), "probability": pa.float64(), "prediction": pa.int8()}
        types |= {"view_gates": pa.list_(pa.float32())}
        self.schema = pa.schema([(name, types[name]) for name in COLUMNS])
        self.table_of = pa.Table.from_pylist
        self.writer = pq.ParquetWriter(file, self.schema, compression="zstd")

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        self.writer.write_table(self.table_of(list(rows), schema=self.schema))

    def close(self) -> None:
        self.writer.close()


FORMATS: dict[str, Callable[[BinaryIO], _Rows]] = {".parquet": _Parquet, ".csv": _Csv, ".jsonl": _JsonLines}
"""Suffix → format."""


class PredictionFile:
    """Writes predictions to a temporary file, which is renamed at the end of the ``with`` block.

    If the block ends with an exception, nothing is written and an existing file stays unchanged.

    Args:
        path: file to write; its suffix (``FORMATS``) determines the format.

    Raises:
        ConfigError: the suffix is unknown, or the file cannot be written (also from later calls).
    """

    def __init__(self, path: Path) -> None:
        check_output(path, FORMATS)
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._waiting: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        try:
            self._file = self._temporary.open("wb")
            self._rows = FORMATS[self.path.suffix.lower()](self._file)
        except OSError as error:
            raise self._refusal(error) from error
        return self

    def add(self, prediction: Prediction) -> None:
        """Append a row."""
        self._waiting.append(asdict(prediction))
        if len(self._waiting) >= ROWS_AT_ONCE:
            try:
                self._write_waiting()
            except OSError as error:
                raise self._refusal(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as problem:
            raise self._refusal(problem) from problem
        finally:
            self._discard()

    def _write_waiting(self) -> None:
        self._rows.write(self._waiting)
        self._waiting = []

    def _finish(self) -> None:
        self._write_waiting()
        self._rows.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self.path)
        sync_folder(self.path.parent)

    def _discard(self) -> None:
        """Close and remove the temporary file; after :meth:`_finish` there is nothing to do."""
        for close in (self._rows.close, self._file.close):
            # Already closed, or the disk is full (already reported): closing tries to write the rest again.
            with suppress(OSError, ValueError):
                close()
        self._temporary.unlink(missing_ok=True)

    def _refusal(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"{self.path} cannot be written ({error.strerror or error}): choose another file with --output, "
            "or fix the folder"
        )


def check_output(path: Path, suffixes: Sequence[str] | dict[str, Any]) -> None:
    """Refuse an output file that could not be written, before anything is computed.

    Raises:
        ConfigError: the suffix is unknown, the path is a folder or its folder does not exist.
    """
    known = ", ".join(suffixes)
    if path.suffix.lower() not in suffixes:
        got = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise ConfigError(f"--output {path} has {got}, expected one of {known}: it determines the format")
    if path.is_dir():
        raise ConfigError(
            f"--output {path} is a folder, expected a file ending in {known}: name a file in it"
        )
    if not path.parent.is_dir():
        raise ConfigError(
            f"--output {path}: the folder {path.parent} does not exist: create it, or choose another"
        )
