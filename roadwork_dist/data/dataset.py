"""Rows of a manifest as training rows, and rows as a batch.

A row is what :class:`Batch` holds without the axis B. V views · S side in px · D width of the backbone
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, default_collate

from roadwork_dist.common.errors import DataError
from roadwork_dist.common.types import TEXT_WIDTH, UNLABELLED, VOCABULARIES, Batch
from roadwork_dist.data.manifest import Manifest, Sample
from roadwork_dist.data.masks import MaskTargets
from roadwork_dist.data.photo import PhotoViews
from roadwork_dist.data.remote.read_ahead import read_ahead_of
from roadwork_dist.data.store import FeatureStore
from roadwork_dist.data.text import TextEmbeddings

Row = dict[str, Any]


class RoadworkDataset(Dataset[Row]):
    """The photos of a manifest, as views or as stored features, with their metadata.

    Every row is a pure function of (epoch, row): loaders need not seed anything.

    Args:
        manifest: the samples.
        views: how a photo becomes views; with ``store``, only which copy an epoch uses.
        store: read features from here; ``None`` = decode photos.
        hashes: content of each photo, as of :func:`content_hashes`; needed with ``store``.
        text: embeddings of the descriptions; ``None`` = every description counts as null.
        masks: targets of the mask head; ``None`` = rows have no masks.

    Raises:
        ValueError: a table has another length than the manifest, or ``store`` comes without ``hashes``.
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

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation draws are used."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.manifest)

    def sample_id(self, index: int) -> str:
        """Id of a row, for messages about it."""
        return self.manifest[index].id

    def read_ahead(self, batches: Iterable[list[int]]) -> Iterable[list[int]]:
        """Pass batches of rows on; photos on a server are fetched before reading gets to them."""
        if self.store is not None:
            return batches
        return read_ahead_of([sample.image for sample in self.manifest], batches)

    def __getitem__(self, index: int) -> Row:
        """One row.

        Raises:
            DataError: the photo or its features cannot be read; the message names it.
        """
        sample = self.manifest[index]
        row: Row = {"id": sample.id, "index": index, **_metadata(sample)}
        if self.text is None:
            row |= {"text": torch.zeros(TEXT_WIDTH), "text_known": False}
        else:
            row |= {"text": self.text.values[index], "text_known": bool(self.text.known[index])}
        if self.masks is not None:
            row["mask"], row["mask_known"] = self.masks[index]
        return row | self._pixels_or_features(sample, index)

    def _pixels_or_features(self, sample: Sample, index: int) -> dict[str, Tensor]:
        copy = self.views.copy_of_epoch(self.epoch)
        if self.store is None:
            plain = self.views.plain(sample.image)
            return {"views": self.views.augmented(plain, sample.id, copy)}
        content = None if self.hashes is None else self.hashes[index]
        if content is None:
            raise DataError(
                f"{sample.image.name}: could not be read when features were computed: restore the photo or "
                "remove its row"
            )
        return {"features": self.store.get(content, sample.id, copy)}


def _metadata(sample: Sample) -> Row:
    """Label, place and vocabulary fields as :class:`Batch` encodes them; null is never NaN."""
    known = sample.latitude is not None and sample.longitude is not None
    place = [sample.latitude, sample.longitude] if known else [0.0, 0.0]
    row: Row = {
        "label": UNLABELLED if sample.label is None else sample.label,
        "gps": torch.tensor(place, dtype=torch.float32),
        "gps_known": known,
    }
    for name, words in VOCABULARIES.items():
        word = getattr(sample, name)
        row[name] = len(words) if word is None else words.index(word)
    return row


def collate(rows: list[Row]) -> Batch:
    """Stack rows; photos with fewer views are padded with zeros, marked in ``view_mask``."""
    kind = "features" if "features" in rows[0] else "views"
    per_row = [row[kind] for row in rows]
    counts = torch.tensor([len(item) for item in per_row])
    padded = pad_sequence(per_row, batch_first=True)
    batch: Batch = default_collate([{k: v for k, v in row.items() if k != kind} for row in rows])
    if kind == "features":
        batch["features"] = padded
    else:
        batch["views"] = padded
    batch["view_mask"] = torch.arange(padded.shape[1])[None, :] < counts[:, None]
    return batch
