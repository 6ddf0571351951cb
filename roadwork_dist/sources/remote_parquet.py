"""Parquet files on a server or the hub: metadata is read at once, images on demand."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from roadwork_dist.common.errors import DataError
from roadwork_dist.common.hub import hub_reachable
from roadwork_dist.config.experiment import DataConfig
from roadwork_dist.photos.manifest import Manifest, build_manifest
from roadwork_dist.sources.class_labels import names_of_schema, read_class_labels
from roadwork_dist.sources.remote import cache_of
from roadwork_dist.storage.remote.cache import RemoteCache
from roadwork_dist.storage.remote.parquet import ParquetImage, RemoteParquet

STREAMING = "?streaming"
_AT_ONCE = 16


def read_hub_stream(source: str, config: DataConfig) -> Manifest:
    """Read ``hf:owner/name:split?streaming``: the Parquet files of a split, without downloading them.

    Raises:
        DataError: the id is malformed, the hub is unreachable, or the split has no Parquet files.
    """
    repository, _, split = source.removeprefix("hf:").removesuffix(STREAMING).partition(":")
    if not split or repository.count("/") != 1:
        raise DataError(
            f"{source}: is not a hub id with a split, expected hf:owner/name:split{STREAMING}: write it in "
            "that form"
        )
    urls = hub_files(repository, split, source)
    if not urls or not all(url.endswith(".parquet") for url in urls):
        raise DataError(
            f"{source}: the split does not consist of Parquet files, expected them for streaming: remove "
            f"{STREAMING} to download it"
        )
    return read_parquet_files(urls, source, config)


def hub_files(repository: str, split: str, source: str) -> list[str]:
    """URLs of the files of a split, at the current revision on the hub.

    Raises:
        DataError: the hub is unreachable, or has no such dataset or split.
    """
    if not hub_reachable():
        raise DataError(
            f"{source}: the hub cannot be reached, expected access for streaming: check the network, or "
            "download the set elsewhere and give its folder"
        )
    import datasets

    try:
        files = datasets.load_dataset_builder(repository).config.data_files or {}
        return [str(url) for url in files[split]]
    except Exception as error:  # datasets and the hub client have their own exceptions
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(
            f"{source}: cannot be opened ({reason[:300]}), expected a dataset on the hub with that split: "
            "check the id, log in with `hf auth login` if it is gated"
        ) from error


def read_parquet_files(urls: Sequence[str], name: str, config: DataConfig) -> Manifest:
    """Read Parquet files on a server that hold the photos; no image is fetched.

    Args:
        urls: the files, in order.
        name: name of the set in messages.
        config: columns and cache.

    Raises:
        DataError: a file cannot be fetched, or has an invalid row.
    """
    cache, columns = cache_of(config.remote), config.columns
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # hundreds of small requests, bound by latency
        files = list(pool.map(lambda url: RemoteParquet(url, cache.patience), urls))
        present = files[0].schema.names
        if columns.mask in present:
            raise DataError(
                f"{name}: has masks (column {columns.mask!r}), which are not read from Parquet on a server: "
                "set data.columns.mask to null, download the set, or write it as shards"
            )
        wanted = [c for c in vars(columns).values() if c in present and c != columns.image]
        groups = [(file, group) for file in files for group in range(file.footer.num_row_groups)]
        cells = pool.map(lambda place: place[0].rows(place[1], wanted), groups)
        rows = [
            row
            for (file, group), own in zip(groups, cells, strict=True)
            for row in _with_pictures(file, group, own, columns.image, cache)
        ]
    read_class_labels(rows, names_of_schema(files[0].schema), columns, name)
    return build_manifest(
        rows, name=name, columns=columns, column_names=present, max_pixels=config.max_pixels
    )


def _with_pictures(
    file: RemoteParquet, group: int, rows: list[dict[str, Any]], column: str, cache: RemoteCache
) -> Iterator[dict[str, Any]]:
    if column not in file.schema.names:  # build_manifest reports this
        yield from rows
        return
    pictures = file.pictures(group, column)
    for number, row in enumerate(rows):
        name = f"{file.url}, row group {group}, row {number + 1}, {column}"
        yield row | {column: ParquetImage(pictures, number, name, cache)}
