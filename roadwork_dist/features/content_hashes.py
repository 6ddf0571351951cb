"""Content hashes of photos, by which the feature store identifies them.

Hashing reads every byte of every photo, so the store caches the hashes in a file. A cached hash is valid
as long as the photo's path, size, inode, mtime and ctime stay the same.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from roadwork_dist.common.errors import DataError
from roadwork_dist.features.store.locks import unless_read_only
from roadwork_dist.photos.images import FileImage, ImageSource, content_hash

INDEX_NAME = "content-hashes.txt"
_STATE_DIGITS = 32
_HASH_DIGITS = 64


def content_hashes(
    sources: Sequence[ImageSource], root: Path | str | None = None, threads: int = 4
) -> list[str | None]:
    """Hash the bytes of photos, reading only those that changed.

    Args:
        sources: the photos; one that has a ``content_hash`` (from a shard's index) is not read.
        root: folder of the feature store, where hashes are cached; ``None`` = no cache. Several
            processes may use it at once.
        threads: photos read in parallel.

    Returns:
        One hash per photo; ``None`` for a photo whose bytes cannot be read.
    """
    index = None if root is None else Path(root) / INDEX_NAME
    known = {} if index is None else _load(index)
    states = [_file_state(source) for source in sources]
    provided = [getattr(source, "content_hash", None) for source in sources]
    hashes: list[str | None] = [
        known.get(state) if state else own for state, own in zip(states, provided, strict=True)
    ]
    unknown = [row for row, value in enumerate(hashes) if value is None]
    with ThreadPoolExecutor(max(1, threads)) as pool:  # reading and hashing release the GIL
        values = pool.map(lambda row: _hash_or_none(sources[row]), unknown)
        for row, value in zip(unknown, values, strict=True):
            hashes[row] = value
    if index is not None:
        found = {s: h for row in unknown if (s := states[row]) and (h := hashes[row])}
        _append(index, found)
    return [_with_original_size(value, source) for value, source in zip(hashes, sources, strict=True)]


def _with_original_size(value: str | None, source: ImageSource) -> str | None:
    """Add the original size to the hash of a downscaled photo; the layout of its views depends on it."""
    size = getattr(source, "original_size", None)
    return value if value is None or size is None else f"{value} of {size[0]}x{size[1]}"


def _file_state(source: ImageSource) -> str | None:
    """A key of the current state of a photo's file; ``None`` if there is no file."""
    if not isinstance(source, FileImage):
        return None
    try:
        stat = source.path.stat()
    except (OSError, ValueError):
        return None
    state = (source.path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    text = "\x1f".join(map(str, state))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:_STATE_DIGITS]


def _hash_or_none(source: ImageSource) -> str | None:
    try:
        return content_hash(source.read())
    except DataError:
        return None


def _load(index: Path) -> dict[str, str]:
    """Complete lines of the index; a line that a killed process left unfinished is skipped."""
    try:
        lines = index.read_text(encoding="ascii", errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    pairs = (line.split(" ") for line in lines)
    return {p[0]: p[1] for p in pairs if list(map(len, p)) == [_STATE_DIGITS, _HASH_DIGITS]}


def _append(index: Path, found: dict[str, str]) -> None:
    """Add lines in one write, so that concurrent appends do not interleave."""
    if not found:
        return
    # The leading newline closes a line that another process may have left unfinished.
    text = "\n" + "".join(f"{state} {value}\n" for state, value in found.items())
    with unless_read_only(index.parent):
        index.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(index, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(handle, text.encode())
        finally:
            os.close(handle)
