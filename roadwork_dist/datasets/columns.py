"""Metadata of the photos of a batch, encoded row by row or as whole columns at once.

Both ways give bit-identical results. Missing values are never NaN.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from roadwork_dist.config.batch import UNLABELLED, VOCABULARIES
from roadwork_dist.photos.manifest import Manifest, Sample


def metadata_of(sample: Sample) -> dict[str, Any]:
    """Label, GPS and vocabulary fields of one photo as encoded in :class:`Batch`, without the axis B."""
    known = sample.latitude is not None and sample.longitude is not None
    place = [sample.latitude, sample.longitude] if known else [0.0, 0.0]
    row: dict[str, Any] = {
        "label": UNLABELLED if sample.label is None else sample.label,
        "gps": torch.tensor(place, dtype=torch.float32),
        "gps_known": known,
    }
    for name, words in VOCABULARIES.items():
        word = getattr(sample, name)
        row[name] = len(words) if word is None else words.index(word)
    return row


class MetadataColumns:
    """The fields of :func:`metadata_of` for every row of a manifest.

    Args:
        manifest: the samples.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.ids = manifest.ids
        places = torch.from_numpy(manifest.coordinates)
        known = ~places.isnan().any(dim=1)
        self._columns = {
            "label": torch.from_numpy(manifest.labels),
            "gps": torch.where(known[:, None], places, 0.0).to(torch.float32),
            "gps_known": known,
        }
        for name, words in VOCABULARIES.items():
            numbers = {word: number for number, word in enumerate(words)} | {None: len(words)}
            column = [numbers[getattr(sample, name)] for sample in manifest]
            self._columns[name] = torch.tensor(column, dtype=torch.int64)

    def rows(self, rows: Sequence[int]) -> dict[str, Any]:
        """Fields of some rows, with the axis B; also their ids and row numbers."""
        index = torch.tensor(rows, dtype=torch.int64)
        picked: dict[str, Tensor] = {name: column[index] for name, column in self._columns.items()}
        return {"id": [self.ids[row] for row in rows], "index": index, **picked}
