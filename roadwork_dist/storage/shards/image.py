"""An image inside a tar of a shard set, read by its offset."""

import zlib
from dataclasses import dataclass

from roadwork_dist.common.errors import DataError
from roadwork_dist.storage.shards.descriptors import open_files


@dataclass(frozen=True, slots=True)
class ShardImage:
    """An image (photo or mask) in a tar; holds only its position, so millions are cheap to pickle.

    Args:
        location: path or URL of the tar.
        offset: offset of the image's bytes in the tar.
        length: length of the image in bytes.
        crc32: CRC-32 of the image's bytes (zlib), checked at every read.
        member: name of the file in the tar, ``<key>.<extension>``.
        digest: SHA-256 of the image's bytes; None = unknown.
        original_size: (width, height) of the upright original if the image is a reduced copy; views are
            laid out for this size. None = it is the original.
    """

    location: str
    offset: int
    length: int
    crc32: int
    member: str
    digest: bytes | None = None
    original_size: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The tar and the file in it."""
        return f"{self.location}: {self.member}"

    @property
    def content_hash(self) -> str | None:
        """Hex SHA-256 of the image's bytes, known without reading them; None = unknown."""
        return None if self.digest is None else self.digest.hex()

    def read(self) -> bytes:
        """The bytes of the image.

        Raises:
            DataError: the tar is missing, truncated or damaged; the message names tar and key.
        """
        data = _read_range(self.location, self.offset, self.length, self.name)
        if zlib.crc32(data) != self.crc32:  # maybe the tar was replaced while open: reopen it
            open_files.forget(self.location)
            data = _read_range(self.location, self.offset, self.length, self.name)
        if len(data) < self.length:
            raise DataError(
                f"{self.name}: the tar ends {self.length - len(data):,} bytes before the image does, "
                "expected a complete tar: copy it again, or run the same `roadwork-dist shard` again"
            )
        if zlib.crc32(data) != self.crc32:
            raise DataError(
                f"{self.name}: checksum differs from the index (flipped bits, or a tar of another "
                "set), expected the same bytes: copy the tar again, or run the same `roadwork-dist shard` "
                "again; `roadwork-dist data check` lists all damage"
            )
        return data


def is_remote(location: str) -> bool:
    """Whether a location is a URL (``https://``, ``s3://`` …) instead of a path."""
    return "://" in location


def _read_range(location: str, offset: int, length: int, name: str) -> bytes:
    try:
        return open_files.read(location, offset, length)
    except FileNotFoundError:
        raise DataError(
            f"{name}: there is no such tar, expected every tar in shards.json: copy it again, or run the "
            "same `roadwork-dist shard` again"
        ) from None
    except OSError as error:
        open_files.forget(location)  # a mount that came back has new handles
        raise DataError(
            f"{name}: the tar cannot be read ({error.strerror}), expected a readable file: check the mount "
            "and its permissions"
        ) from error
