"""The data set of a manifest's photos, as views or stored features, and its collate function.

A row has the fields of :class:`Batch` without the axis B. Stored features are read a whole batch at a
time, with bit-identical results. V views · S side in px · D width of the backbone
"""

from collections.abc import Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from roadwork_dist.common.errors import DataError
from roadwork_dist.config.batch import TEXT_WIDTH, Batch
from roadwork_dist.datasets.columns import MetadataColumns, metadata_of
from roadwork_dist.features.masks import MaskTargets
from roadwork_dist.features.store import FeatureStore
from roadwork_dist.features.store.index import Ints
from roadwork_dist.features.store.resident import ResidentFeatures, load_resident, pad_views
from roadwork_dist.features.text import TextEmbeddings
from roadwork_dist.photos.augment.batched import stack_draws
from roadwork_dist.photos.manifest import Manifest, Sample
from roadwork_dist.photos.photo import PhotoViews
from roadwork_dist.storage.remote.read_ahead import read_ahead_of
from roadwork_dist.trainer.feed.loader import pure

Row = dict[str, Any]


class RoadworkDataset(Dataset[Row]):
    """The photos of a manifest, as views or as stored features, with their metadata.

    Every row is a pure function of (epoch, row), so loaders need not seed anything.

    Args:
        manifest: the samples.
        views: how a photo becomes views; with ``store``, only which augmented copy an epoch uses.
        store: read features from here; ``None`` = decode photos.
        hashes: content hash of each photo, from :func:`content_hashes`; required with ``store``.
        text: embeddings of the descriptions; ``None`` = all descriptions count as unknown.
        masks: targets of the mask head; ``None`` = rows have no masks.

    Raises:
        ValueError: a table has another length than the manifest, or ``store`` is given without ``hashes``.
    """

    pure = True

    def __init__(
        self,
        manifest: Manifest,
        *,
        views: PhotoViews,
        store: FeatureStore | None = None,
        hashes: Sequence[str | None] | None = None,
        text: TextEmbeddings | None = None,
        masks: MaskTargets | None = None,
    ) -> None:
        if store is not None and hashes is None:
            raise ValueError("a feature store needs the hashes of the photos")
        tables = {"hashes": hashes, "text": None if text is None else text.values, "masks": masks}
        for name, table in tables.items():
            if table is not None and len(table) != len(manifest):
                raise ValueError(f"{name} has {len(table)} rows, the manifest {len(manifest)}")
        self.manifest, self.views, self.store = manifest, views, store
        self.hashes, self.text, self.masks = hashes, text, masks
        self.epoch = 0
        self.resident: ResidentFeatures | None = None
        self._columns = None if store is None else MetadataColumns(manifest)

    def make_resident(self, device: torch.device) -> bool:
        """Load all stored features into the memory of a device; returns whether they fit.

        Raises:
            DataError: features are missing or damaged.
        """
        if self.store is None or self.hashes is None:
            return False
        ids, copies = self.manifest.ids, self.views.copies()
        self.resident = load_resident(self.store, self.hashes, ids, copies, device)
        return self.resident is not None

    @property
    def in_memory(self) -> bool:
        """Whether reading a batch is so cheap that loader processes would only slow it down."""
        return self.resident is not None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation draws are used."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.manifest)

    def sample_id(self, index: int) -> str:
        """Id of a row, for messages."""
        return self.manifest[index].id

    def read_ahead(self, batches: Iterable[list[int]]) -> Iterable[list[int]]:
        """Yield the batches of rows unchanged, while photos on a server are prefetched."""
        if self.store is not None:
            return batches
        return read_ahead_of([sample.image for sample in self.manifest], batches)

    def __getitem__(self, index: int) -> Row:
        """One row.

        Raises:
            DataError: the photo or its features cannot be read; the message names it.
        """
        sample = self.manifest[index]
        row: Row = {"id": sample.id, "index": index, **metadata_of(sample)}
        if self.text is None:
            row |= {"text": torch.zeros(TEXT_WIDTH), "text_known": False}
        else:
            row |= {"text": self.text.values[index], "text_known": bool(self.text.known[index])}
        if self.masks is not None:
            row["mask"], row["mask_known"] = self.masks[index]
        return row | self._pixels_or_features(sample, index)

    def __getitems__(self, indices: list[int]) -> Sequence[Row]:
        """Several rows; with a store, :func:`collate` reads them together.

        Raises:
            DataError: a photo or its features cannot be read; the message names it.
        """
        return [self[index] for index in indices] if self.store is None else StoredRows(self, indices)

    def batch(self, indices: Sequence[int]) -> Batch:
        """A batch of rows with stored features, read together; the same as :func:`collate` of single rows.

        Raises:
            DataError: features are missing or damaged; the message names the sample.
        """
        assert self._columns is not None  # StoredRows exist only with a store
        batch: Batch = self._columns.rows(indices)  # type: ignore[assignment]
        if self.text is None:
            batch["text"] = torch.zeros(len(indices), TEXT_WIDTH)
            batch["text_known"] = torch.zeros(len(indices), dtype=torch.bool)
        else:
            batch["text"] = self.text.values[batch["index"]]
            batch["text_known"] = self.text.known[batch["index"]]
        if self.masks is not None:
            batch["mask"], batch["mask_known"] = self.masks.rows(indices)
        batch["features"], batch["view_mask"] = pad_views(*self._features(indices))
        return batch

    def _features(self, indices: Sequence[int]) -> tuple[Tensor, Ints]:
        """Features of the views of all rows, concatenated [sum of V, D], and V of each row."""
        assert self.store is not None
        copy = self.views.copy_of_epoch(self.epoch)
        contents = [self._content(index) for index in indices]
        if self.resident is not None:
            return self.resident.read(indices, copy)
        return self.store.read(contents, [self.manifest[index].id for index in indices], copy)

    def _content(self, index: int) -> str:
        content = None if self.hashes is None else self.hashes[index]
        if content is None:
            raise DataError(
                f"{self.manifest[index].image.name}: could not be read when features were computed: restore "
                "the photo or remove its row"
            )
        return content

    def _pixels_or_features(self, sample: Sample, index: int) -> Row:
        copy = self.views.copy_of_epoch(self.epoch)
        if self.store is None:
            return self.views.row(sample.image, sample.id, copy)
        content = self._content(index)
        # Single rows are read for computations on them, such as mixing. They stay on the CPU, so that
        # results do not depend on where the features are kept.
        if self.resident is not None and self.resident.device.type == "cpu":
            return {"features": self.resident.row(index, copy)}
        return {"features": self.store.get(content, sample.id, copy)}


class StoredRows(Sequence[Row]):
    """Rows of a data set with a feature store, read lazily: one by one or all together.

    Args:
        dataset: the data set.
        indices: which rows.
    """

    def __init__(self, dataset: RoadworkDataset, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, number: int) -> Row: ...

    @overload
    def __getitem__(self, number: slice) -> "StoredRows": ...

    def __getitem__(self, number: int | slice) -> "Row | StoredRows":
        if isinstance(number, slice):
            return StoredRows(self.dataset, self.indices[number])
        return self.dataset[self.indices[number]]

    def together(self) -> Batch:
        """All rows as one batch.

        Raises:
            DataError: features are missing or damaged; the message names the sample.
        """
        return self.dataset.batch(self.indices)


def _pad_views(values: Tensor, count: int) -> Tensor:
    """The views [V, …] of a row, padded with zeros to ``count``."""
    if len(values) == count:
        return values
    return torch.cat([values, values.new_zeros((count - len(values), *values.shape[1:]))])


@pure
def collate(rows: Sequence[Row]) -> Batch:
    """Stack rows into a batch; photos with fewer views are padded with zeros and marked in ``view_mask``.

    The views' random draws for augmentation on the device become ``augment``.
    """
    if isinstance(rows, StoredRows):
        return rows.together()
    kind = "features" if "features" in rows[0] else "views"
    per_row = [row[kind] for row in rows]
    counts = torch.tensor([len(item) for item in per_row])
    most = int(counts.max())
    # default_collate stacks directly into shared memory in loader processes: one copy instead of two.
    padded: Tensor = default_collate([_pad_views(item, most) for item in per_row])
    batch: Batch = default_collate(
        [{k: v for k, v in row.items() if k not in (kind, "draws")} for row in rows]
    )
    if any("draws" in row for row in rows):
        drawn = [row.get("draws", []) for row in rows]
        batch["augment"] = stack_draws([view for row in drawn for view in row + [{}] * (most - len(row))])
    if kind == "features":
        batch["features"] = padded
    else:
        batch["views"] = padded
    batch["view_mask"] = torch.arange(padded.shape[1])[None, :] < counts[:, None]
    return batch
