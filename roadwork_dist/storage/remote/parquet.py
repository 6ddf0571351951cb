"""Access to photos in Parquet files on a server, one row group at a time.

The footer of a file gives the byte range of a row group's images. A row group is therefore fetched like a
shard: only its images, as one range. They are unpacked into a file that is read by offset.
"""

import hashlib
import io
import os
from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from roadwork_dist.common.errors import DataError
from roadwork_dist.storage.remote.cache import RemoteCache
from roadwork_dist.storage.remote.download import RemoteFile, read_range, size_of
from roadwork_dist.storage.remote.retry import Patience


class RemoteParquet:
    """A Parquet file on a server: its footer and columns.

    Args:
        url: address of the file.
        patience: when the server is given up.

    Raises:
        DataError: it cannot be fetched, or is not a Parquet file.
    """

    def __init__(self, url: str, patience: Patience) -> None:
        self.url, self.patience = url, patience
        self.size = size_of(url, patience)
        file = _Ranges(url, self.size, patience)
        try:
            self.footer = _open(file).metadata
        except (OSError, ValueError) as error:  # pyarrow's errors derive from these
            reason = " ".join(str(error).split())
            raise DataError(
                f"{url}: cannot be read ({reason}), expected a Parquet file: upload it again"
            ) from error

    @cached_property
    def schema(self) -> Any:
        """Columns, as a ``pyarrow.Schema``."""
        return self.footer.schema.to_arrow_schema()

    @cached_property
    def version(self) -> str:
        """A hash of the footer, which changes with the content."""
        return hashlib.sha256(repr(self.footer.to_dict()).encode()).hexdigest()

    def rows(self, group: int, columns: list[str]) -> list[dict[str, Any]]:
        """Cells of a row group."""
        if not columns:
            return [{} for _ in range(self.footer.row_group(group).num_rows)]
        file = _open(_Ranges(self.url, self.size, self.patience), self.footer)
        rows: list[dict[str, Any]] = file.read_row_group(group, columns=columns).to_pylist()
        return rows

    def pictures(self, group: int, column: str) -> "PictureGroup":
        """The images of a column in a row group, not yet fetched."""
        start, stop = self.size, 0
        for number in range(self.footer.num_columns):
            chunk = self.footer.row_group(group).column(number)
            if chunk.path_in_schema.split(".")[0] == column:
                first = chunk.dictionary_page_offset or chunk.data_page_offset
                start, stop = min(start, first), max(stop, first + chunk.total_compressed_size)
        return PictureGroup(
            self.url, stop - start, None, start, f"{self.version} {column}", self.footer, group, column
        )


@dataclass(frozen=True, slots=True)
class PictureGroup(RemoteFile):
    """The images of a row group.

    Attributes:
        footer: footer of the file.
        group: index of the row group.
        column: column of the images: bytes, or Hugging Face's struct with ``bytes``.
    """

    footer: Any = field(default=None, compare=False, repr=False)
    group: int = 0
    column: str = "image"

    def keep(self, fetched: Path, path: Path) -> None:
        """Unpack to n + 1 offsets as int64, followed by the images; an image of 0 bytes is null."""
        with fetched.open("rb") as file:
            window = _Window(file.fileno(), self.start or 0, (self.start or 0) + (self.bytes or 0))
            table = _open(window, self.footer).read_row_group(self.group, columns=[self.column])
        cells = table[self.column]
        ends = np.zeros(len(cells) + 1, dtype="<i8")
        unpacking = path.with_suffix(".unpacking")  # protected by the lock of the part
        with unpacking.open("wb") as out:
            out.write(ends.tobytes())
            for number, cell in enumerate(cells):
                out.write(picture := _bytes_of(cell.as_py()))
                ends[number + 1] = ends[number] + len(picture)
            out.seek(0)
            out.write((ends + ends.nbytes).tobytes())
        unpacking.replace(path)
        fetched.unlink()


@dataclass(frozen=True, slots=True)
class ParquetImage:
    """An image in a Parquet file on a server, read through the cache of this node.

    Args:
        file: row group of the image.
        row: row in the row group.
        name: name of the image in messages.
        cache: cache that fetches and stores the row group.
    """

    file: PictureGroup
    row: int
    name: str
    cache: RemoteCache

    @property
    def location(self) -> str:
        """File and row group, which is the unit of fetching."""
        return f"{self.file.url}#{self.file.group}"

    def read(self) -> bytes:
        """The bytes of the image.

        Raises:
            DataError: the server was given up, or the cell has no image.
        """
        start, stop = np.frombuffer(self.cache.read(self.file, 8 * self.row, 16), dtype="<i8").tolist()
        if start == stop:
            raise DataError(f"{self.name}: holds no image, expected the bytes of a photo: remove the row")
        return self.cache.read(self.file, start, stop - start)


def _bytes_of(cell: Any) -> bytes:
    if isinstance(cell, dict):
        cell = cell.get("bytes")
    return cell if isinstance(cell, bytes) else b""


def _open(file: io.RawIOBase, footer: Any = None) -> Any:
    from pyarrow import parquet

    return parquet.ParquetFile(file, metadata=footer)


class _Readable(io.RawIOBase):
    """Base of seekable read-only files; subclasses read a range."""

    def __init__(self, size: int) -> None:
        self._size, self._place = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + (0, self._place, self._size)[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        data = self._at(self._place, min(len(buffer), self._size - self._place))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    @abstractmethod
    def _at(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``."""


class _Ranges(_Readable):
    """A file on a server, read by range requests."""

    def __init__(self, url: str, size: int, patience: Patience) -> None:
        super().__init__(size)
        self._url, self._patience = url, patience

    def _at(self, offset: int, length: int) -> bytes:
        data = read_range(self._url, offset, length, self._patience) if length else b""
        if data is None:
            raise DataError(
                f"{self._url}: the server does not support range requests, expected them for Parquet files: "
                "download the file"
            )
        return data


class _Window(_Readable):
    """A local copy of a byte range, addressed by offsets in the complete file."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        super().__init__(size)
        self._descriptor, self._start = descriptor, start

    def _at(self, offset: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, offset - self._start)
