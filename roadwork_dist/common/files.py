"""Atomic, durable file writes and file checksums."""

import hashlib
import os
import threading
from contextlib import suppress
from pathlib import Path


def sync_folder(path: Path) -> None:
    """Make the directory entries of a folder durable (fsync of the folder itself)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, fsync it and rename it into place.

    A reader sees the old content or the new, never a part. Concurrent writers of one path do not mix.

    Raises:
        OSError: the folder cannot be written or the disk is full; no temporary file remains. Its
            ``filename`` is always set to the path, even if the system gave none.
    """
    # The thread id too: threads may write one path at once, since equal masks share one file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):  # if it could not even be created
            temporary.unlink(missing_ok=True)
        error.filename = str(path)
        raise
    sync_folder(path.parent)


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
