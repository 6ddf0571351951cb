"""Reads data sources (folder, table, dataset, COCO file) into a validated manifest."""

from pathlib import Path

from roadwork_dist.common.errors import DataError
from roadwork_dist.config.experiment import DataConfig
from roadwork_dist.photos.manifest import Manifest
from roadwork_dist.storage.shards.image import is_remote
from roadwork_dist.storage.shards.index import is_shard_set, read_set

_UNDERSTOOD = (
    "a .csv or .parquet table, a folder with metadata.csv or metadata.parquet, a folder of shards or its "
    "URL, a Hugging Face data set on disk (folder or folder:split), hf:owner/name:split, or a COCO .json of "
    "CMU ROADWork"
)


def load_manifest(source: str, config: DataConfig, *, name: str, setting: str | None = None) -> Manifest:
    """Read a source into a manifest; no photo is decoded.

    Args:
        source: path, URL or hub id; ``DataConfig`` lists the forms.
        config: columns, image root and limits.
        name: role of the set, for messages: ``"train"``, ``"val"``, ``"target"``.
        setting: setting that named the source, for messages; None = ``data.<name>``.

    Raises:
        DataError: the source is absent or of an unknown kind, or its rows cannot be used.
    """
    from roadwork_dist.sources import huggingface, remote, remote_parquet, roadwork_coco, shards, table

    setting = setting or f"data.{name}"
    if source.startswith("hf:") and source.endswith(remote_parquet.STREAMING):
        return remote_parquet.read_hub_stream(source, config)
    if source.startswith("hf:") and not is_remote(source):
        return huggingface.read_hub(source, config)
    if is_remote(source) and source.endswith(".parquet"):
        return remote_parquet.read_parquet_files([source], source, config)
    if is_remote(source):
        return remote.read_remote(source, config)
    path, split = _path_and_split(source)
    if not path.exists():
        demo = (
            "; `roadwork-dist synth demo-data` writes the demo's" if path.parent.name == "demo-data" else ""
        )
        raise DataError(
            f"{source}: there is no such file or folder, expected {_UNDERSTOOD}: correct {setting} "
            f"(a data set of the hub starts with hf:){demo}"
        )
    if path.is_dir():
        for metadata in (path / "metadata.csv", path / "metadata.parquet"):
            if metadata.is_file():
                return table.read_table(metadata, config)
        if is_shard_set(path):  # before Hugging Face's, since the index is a Parquet file too
            return shards.read_shards(path, config)
        if huggingface.is_dataset(path):
            return huggingface.read_folder(path, split, config)
    elif path.suffix.lower() in (".csv", ".parquet"):
        return table.read_table(path, config)
    elif path.suffix.lower() == ".json":
        return roadwork_coco.read_coco(path, config)
    raise DataError(f"{source}: is of an unknown kind, expected {_UNDERSTOOD}: correct {setting}")


def is_synthetic(source: str, config: DataConfig) -> bool:
    """Whether the photos are rendered by this package: its generator writes a marker, which shards keep.

    Args:
        source: as in :func:`load_manifest`.
        config: settings for requests to a server.

    Raises:
        DataError: the shard set cannot be read.
    """
    from roadwork_dist.demo.synthetic.dataset import MARKER
    from roadwork_dist.sources import remote

    if source.startswith("hf:"):
        return False
    if is_remote(source):
        return not source.endswith(".parquet") and remote.read_remote_set(source, config).synthetic
    path, _ = _path_and_split(source)
    if path.is_dir() and is_shard_set(path):
        return read_set(path).synthetic
    return ((path if path.is_dir() else path.parent) / MARKER).is_file()


def _path_and_split(source: str) -> tuple[Path, str | None]:
    """Parse ``folder:split``, a split of a dataset on disk, unless a file has exactly this name."""
    path, colon, split = source.rpartition(":")
    if colon and not Path(source).exists() and Path(path).is_dir():
        return Path(path), split
    return Path(source), None
