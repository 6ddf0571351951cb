"""Files that are either whole or not there."""

import hashlib
import os
import threading
from contextlib import suppress
from pathlib import Path


def sync_folder(path: Path) -> None:
    """Make the names inside a folder durable (fsync of the folder itself)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync it and rename it into place.

    A reader sees the old content or the new, never a part; two writers of one path do not mix.

    Raises:
        OSError: the folder cannot be written or the disk is full; nothing is left behind. Its
            ``filename`` is the path also where the system named none.
    """
    # Threads too may write one path at once: equal masks have one file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):  # where it could not even be made
            temporary.unlink(missing_ok=True)
        error.filename = str(path)
        raise
    sync_folder(path.parent)


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
