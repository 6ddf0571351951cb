"""Plain tars with the same bytes wherever and whenever they are written, and where their members lie."""

import hashlib
import os
import tarfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from roadwork_dist.common.files import sync_folder

LEAST_TAR = tarfile.RECORDSIZE
"""Bytes of an empty tar; others have a multiple of it."""

_BLOCK = tarfile.BLOCKSIZE
_END = 2 * _BLOCK


def member_bytes(length: int) -> int:
    """What a member of ``length`` bytes takes in a tar: header and padding included."""
    return _BLOCK + -(-length // _BLOCK) * _BLOCK


def tar_bytes(members: int) -> int:
    """Size of a tar whose members take so many bytes."""
    return -(-(members + _END) // LEAST_TAR) * LEAST_TAR


def room_in(size: int) -> int:
    """What the members of a tar of at most ``size`` bytes may take."""
    return size // LEAST_TAR * LEAST_TAR - _END


class TarWriter:
    """Writes a tar that is whole or not there: temporary name, fsync, rename.

    As a context manager it renames at the end, and leaves nothing behind after an error.

    Args:
        path: where the finished tar will be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = self._temporary.open("wb")
        self._hash = hashlib.sha256()

    def add(self, name: str, data: bytes) -> int:
        """Append a file; returns the offset of its bytes in the tar."""
        info = tarfile.TarInfo(name)  # time 0, owner 0: nothing of this machine gets in
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self.size
        self._write(data)
        self._write(bytes(-len(data) % _BLOCK))
        return offset

    @property
    def sha256(self) -> str:
        """Hex, of all that was written so far."""
        return self._hash.hexdigest()

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:  # a full disk; the system does not say where
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
            with suppress(OSError):  # what is buffered fits a full disk no better now
                self._file.close()
            self._temporary.unlink(missing_ok=True)
        sync_folder(self.path.parent)


def members(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and length of every file in a tar, by name; only headers are read.

    Raises:
        tarfile.TarError: it is damaged.
        OSError: it cannot be read.
    """
    with tarfile.open(path, "r:") as tar:
        return {info.name: (info.offset_data, info.size) for info in tar}
