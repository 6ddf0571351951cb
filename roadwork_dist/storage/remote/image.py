"""An image inside a tar on a server."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from roadwork_dist.common.errors import DataError
from roadwork_dist.photos.images import ImageSource
from roadwork_dist.storage.remote.cache import RemoteCache
from roadwork_dist.storage.remote.download import RemoteFile
from roadwork_dist.storage.shards.image import ShardImage


def are_on_server(images: Iterable[ImageSource]) -> bool:
    """Whether any image is on a server: such images have a ``cache`` and a ``file``."""
    return any(hasattr(image, "cache") for image in images)


@dataclass(frozen=True, slots=True)
class RemoteImage(ShardImage):
    """An image in a tar on a server, read through the cache of this node.

    Args:
        file: the tar.
        cache: cache that fetches and stores the tar.
    """

    file: RemoteFile = field(kw_only=True)
    cache: RemoteCache = field(kw_only=True)

    def read(self) -> bytes:
        """The bytes of the image.

        Raises:
            DataError: the server was given up, or the tar is damaged; the message names tar and key.
        """
        data = self.cache.read(self.file, self.offset, self.length)
        if not self._is_whole(data) and self.cache.discard_if_damaged(self.file):
            data = self.cache.read(self.file, self.offset, self.length)
        if not self._is_whole(data):
            raise DataError(
                f"{self.name}: checksum differs from the index although the tar matches shards.json, "
                "expected tars and index of one set: upload the set again"
            )
        return data

    def _is_whole(self, data: bytes) -> bool:
        return len(data) == self.length and zlib.crc32(data) == self.crc32
