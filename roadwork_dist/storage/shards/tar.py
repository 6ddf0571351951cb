"""Reproducible tar files: a writer with machine-independent output, and offsets of members."""

import hashlib
import os
import tarfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from roadwork_dist.common.files import sync_folder

LEAST_TAR = tarfile.RECORDSIZE
"""Size of an empty tar in bytes; all sizes are multiples of it."""

_BLOCK = tarfile.BLOCKSIZE
_END = 2 * _BLOCK


def member_bytes(length: int) -> int:
    """Space that a member of ``length`` bytes takes in a tar, with header and padding."""
    return _BLOCK + -(-length // _BLOCK) * _BLOCK


def tar_bytes(members: int) -> int:
    """Size of a tar whose members take ``members`` bytes."""
    return -(-(members + _END) // LEAST_TAR) * LEAST_TAR


def room_in(size: int) -> int:
    """Space for members in a tar of at most ``size`` bytes."""
    return size // LEAST_TAR * LEAST_TAR - _END


class TarWriter:
    """Writes a tar atomically: temporary name, fsync, rename.

    As a context manager it renames the file at the end, and removes it after an error.

    Args:
        path: path of the finished tar.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = self._temporary.open("wb")
        self._hash = hashlib.sha256()

    def add(self, name: str, data: bytes) -> int:
        """Append a file; returns the offset of its bytes in the tar."""
        info = tarfile.TarInfo(name)  # time 0, owner 0: independent of this machine
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self.size
        self._write(data)
        self._write(bytes(-len(data) % _BLOCK))
        return offset

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of everything written so far."""
        return self._hash.hexdigest()

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:  # a full disk; the error names no file
            error.filename = str(self.path)
            raise
        self._hash.update(data)
        self.size += len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._write(bytes(tar_bytes(self.size) - self.size))
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                self._temporary.replace(self.path)
        except OSError as failure:  # a full disk
            failure.filename = str(self.path)
            raise
        finally:
            with suppress(OSError):  # on a full disk flushing the buffer fails again
                self._file.close()
            self._temporary.unlink(missing_ok=True)
        sync_folder(self.path.parent)


def members(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and length of every file in a tar, by name; reads only headers.

    Raises:
        tarfile.TarError: it is damaged.
        OSError: it cannot be read.
    """
    with tarfile.open(path, "r:") as tar:
        return {info.name: (info.offset_data, info.size) for info in tar}
