"""Hugging Face datasets: saved to disk, as Parquet shards, or from the hub.

Photos stay in the dataset's memory-mapped file and are read by row, undecoded.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roadwork_dist.common.errors import DataError
from roadwork_dist.common.hub import hub_reachable
from roadwork_dist.config.experiment import DataConfig
from roadwork_dist.photos.images import ImageSource, as_image_source
from roadwork_dist.photos.manifest import Manifest, build_manifest, is_null
from roadwork_dist.photos.mask_images import PngMask
from roadwork_dist.sources.class_labels import names_of_features, read_class_labels


@dataclass(frozen=True, slots=True, eq=False)
class DatasetImage:
    """An image in a column of a Hugging Face dataset; pickled with the (memory-mapped) dataset."""

    dataset: Any
    """``datasets.Dataset`` with only this column, not decoded."""
    column: str
    index: int
    name: str
    root: Path | None

    def read(self) -> bytes:
        """The bytes of the cell, or of the file it points to.

        Raises:
            DataError: the cell is null or the file cannot be read.
        """
        cell = self.dataset[self.index][self.column]
        if is_null(cell):
            raise DataError(f"{self.name}: image is null, expected a photo: remove the row")
        return as_image_source(cell, root=self.root, name=self.name).read()


def is_dataset(folder: Path) -> bool:
    """Whether a folder is a dataset saved to disk or holds Parquet shards."""
    return _is_saved(folder) or any(folder.glob("**/*.parquet"))


def read_folder(folder: Path, split: str | None, config: DataConfig) -> Manifest:
    """Read a dataset on disk; ``split`` is required if it has several.

    Raises:
        DataError: it cannot be read, has no such split, or a row cannot be used.
    """
    import datasets

    def load() -> Any:
        if _is_saved(folder):
            return datasets.load_from_disk(str(folder))
        return datasets.load_dataset(str(folder))

    loaded = _load(str(folder), load, "a folder of save_to_disk or of Parquet shards")
    return _manifest(_one_split(loaded, split, str(folder)), str(folder), folder, config)


def read_parquet(path: Path, config: DataConfig) -> Manifest:
    """Read one Parquet file that holds the photos.

    Raises:
        DataError: the file or one of its rows cannot be used.
    """
    import datasets

    def load() -> Any:
        return datasets.load_dataset("parquet", data_files=str(path), split="train")

    return _manifest(_load(str(path), load, "a Parquet table"), str(path), path.parent, config)


def read_hub(source: str, config: DataConfig) -> Manifest:
    """Read ``hf:owner/name:split`` from the hub, or from its local cache.

    Raises:
        DataError: the id is malformed, or the dataset is unavailable or has an invalid row.
    """
    repository, _, split = source.removeprefix("hf:").partition(":")
    if not split or repository.count("/") != 1:
        raise DataError(
            f"{source}: is not a hub id with a split, expected hf:owner/name:split: write it in that form"
        )
    import datasets

    def load() -> Any:
        with nullcontext() if hub_reachable() else _offline():
            return datasets.load_dataset(repository, split=split)

    advice = (
        "a dataset on the hub with that split: check the id and the network, log in with `hf auth login` "
        "if it is gated, or download it and give its folder"
    )
    return _manifest(_load(source, load, advice), source, None, config)


@contextmanager
def _offline() -> Iterator[None]:
    """Use only the local cache, which avoids repeated requests to an unreachable hub."""
    from datasets import config
    from huggingface_hub import constants

    was = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = was


def _is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote the folder, with one split or several."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _load(name: str, load: Callable[[], Any], expected: str) -> Any:
    try:
        return load()
    except Exception as error:  # datasets, the hub client and file systems have their own exceptions
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{name}: cannot be loaded ({reason[:300]}), expected {expected}") from error


def _one_split(loaded: Any, split: str | None, name: str) -> Any:
    if not isinstance(loaded, dict):  # a single dataset; DatasetDict is a dict
        if split is not None:
            raise DataError(f"{name}: has a single split, expected no split name: remove {':' + split!r}")
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        raise DataError(
            f"{name}: has the splits {', '.join(loaded)}, expected one of them and got {split!r}: "
            f"write it as {name}:{next(iter(loaded), 'split')}"
        )
    return loaded[split]


def _manifest(dataset: Any, name: str, folder: Path | None, config: DataConfig) -> Manifest:
    import datasets

    columns = config.columns
    dataset = dataset.with_format(None)  # a saved format may hide columns
    root = Path(config.image_root) if config.image_root else folder
    pictures = [c for c in (columns.image, columns.mask) if c is not None and c in dataset.column_names]
    for column in pictures:
        if isinstance(dataset.features[column], datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    wanted = [c for c in vars(columns).values() if c in dataset.column_names and c not in pictures]
    rows = dataset.select_columns(wanted).to_list() if wanted else [{} for _ in range(len(dataset))]
    read_class_labels(rows, names_of_features(dataset.features), columns, name)
    for column in pictures:
        for row, source in zip(rows, _sources(dataset, column, name, root), strict=True):
            row[column] = PngMask(source, config.max_pixels) if source and column == columns.mask else source
    return build_manifest(
        rows,
        name=name,
        columns=columns,
        image_root=root,
        column_names=dataset.column_names,
        max_pixels=config.max_pixels,
    )


def _sources(dataset: Any, column: str, name: str, root: Path | None) -> list[ImageSource | None]:
    """A source for each row, None if the cell is null; no image is read."""
    own = dataset.select_columns([column])
    nulls = _nulls(own, column)
    return [
        None if nulls[index] else DatasetImage(own, column, index, f"{name}, row {index + 1}, {column}", root)
        for index in range(len(own))
    ]


def _nulls(own: Any, column: str) -> list[bool]:
    """Which cells are null, from the validity bitmap only; text columns also by null words."""
    import pyarrow as pa

    table = own.with_format("arrow")
    nulls: list[bool] = []
    for start in range(0, len(own), 1000):
        cells = table[start : start + 1000][column]
        texts = pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)
        nulls += [is_null(cell) for cell in cells.to_pylist()] if texts else cells.is_null().to_pylist()
    return nulls
