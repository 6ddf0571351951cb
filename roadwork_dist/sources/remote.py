"""Shard sets on a server: the index is fetched at once, tars when their photos are read."""

import logging
import os
from dataclasses import replace
from pathlib import Path

from roadwork_dist.common.errors import DataError
from roadwork_dist.config.experiment import DataConfig, RemoteConfig
from roadwork_dist.photos.manifest import Manifest, Sample
from roadwork_dist.photos.mask_images import MaskSource, PngMask
from roadwork_dist.sources.shards import manifest_of
from roadwork_dist.storage.remote.cache import GIB, RemoteCache
from roadwork_dist.storage.remote.download import RemoteFile, read_whole
from roadwork_dist.storage.remote.image import RemoteImage
from roadwork_dist.storage.remote.retry import Patience
from roadwork_dist.storage.shards.image import ShardImage
from roadwork_dist.storage.shards.index import INDEX_FILE, SET_FILE, ShardSet, parse_index, parse_set

logger = logging.getLogger(__name__)


def cache_of(config: RemoteConfig) -> RemoteCache:
    """The cache that the settings describe."""
    return RemoteCache(
        Path(config.cache_dir).expanduser(),
        int(config.cache_gb * GIB),
        Patience(config.attempts, config.timeout),
        read_ahead=config.read_ahead,
    )


def read_remote(url: str, config: DataConfig) -> Manifest:
    """Read the index of a shard set on a server; no tar is fetched.

    Args:
        url: URL of the folder that holds ``shards.json``.
        config: the cache, and the pixel limit of masks.

    Raises:
        DataError: the set cannot be fetched, is not finished, or is damaged.
        MissingDependencyError: the package for this URL scheme is not installed.
    """
    base = _base(url)
    cache = cache_of(config.remote)
    shards = read_remote_set(url, config)
    _warn_of_small_cache(shards, cache, config)
    index = RemoteFile(f"{base}/{INDEX_FILE}", sha256=shards.index_sha256)
    content = cache.fetch(index).read_bytes()
    manifest = manifest_of(
        shards, parse_index(content, shards, index.url), base, max_pixels=config.max_pixels
    )
    remote = _RemoteImages(
        {
            f"{base}/{each.name}": RemoteFile(f"{base}/{each.name}", each.bytes, each.sha256)
            for each in shards.shards
        },
        cache,
    )
    return Manifest(base, tuple(map(remote.sample, manifest)), manifest.unknown_words)


def read_remote_set(url: str, config: DataConfig) -> ShardSet:
    """Read the ``shards.json`` of a set on a server.

    Raises:
        DataError: it cannot be fetched, or is damaged.
    """
    path = f"{_base(url)}/{SET_FILE}"
    return parse_set(_read_set(path, cache_of(config.remote).patience), path)


def _base(url: str) -> str:
    return url.rstrip("/").removesuffix(f"/{SET_FILE}")


def _read_set(url: str, patience: Patience) -> bytes:
    try:
        return read_whole(url, patience)
    except DataError as error:
        raise DataError(
            f"{error}; a URL as a source must be the folder of a finished shard set, with {SET_FILE} and "
            f"{INDEX_FILE} next to the tars"
        ) from error


def _warn_of_small_cache(shards: ShardSet, cache: RemoteCache, config: DataConfig) -> None:
    """Warn of a cache so small that processes would evict and refetch each other's shards."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    open_at_once = processes * (config.shuffle_shards + cache.read_ahead)
    largest = max((shard.bytes for shard in shards.shards), default=0)
    needed = min(open_at_once * largest, sum(shard.bytes for shard in shards.shards))
    if needed > cache.max_bytes:
        logger.warning(
            "%s: data.remote.cache_gb is %.3g, but %d processes have up to %d shards of %.3g GiB open: "
            "shards will be fetched repeatedly; raise it to %.3g, or write smaller shards",
            *(shards.name, cache.max_bytes / GIB, processes, open_at_once, largest / GIB, needed / GIB),
        )


class _RemoteImages:
    """Converts local images of a manifest to images on a server."""

    def __init__(self, files: dict[str, RemoteFile], cache: RemoteCache) -> None:
        self.files, self.cache = files, cache

    def sample(self, sample: Sample) -> Sample:
        assert isinstance(sample.image, ShardImage)  # manifest_of makes only these
        return replace(sample, image=self._image(sample.image), mask=self._mask(sample.mask))

    def _image(self, image: ShardImage) -> RemoteImage:
        return RemoteImage(
            image.location,
            image.offset,
            image.length,
            image.crc32,
            image.member,
            image.digest,
            image.original_size,
            file=self.files[image.location],
            cache=self.cache,
        )

    def _mask(self, mask: MaskSource | None) -> MaskSource | None:
        if not isinstance(mask, PngMask) or not isinstance(mask.image, ShardImage):
            return mask
        return PngMask(self._image(mask.image), mask.max_pixels)
