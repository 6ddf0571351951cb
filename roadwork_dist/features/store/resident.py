"""All features of a data set held in GPU or CPU memory.

T views of all photos and copies, one after the other · D width of the backbone · B photos of a batch
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from roadwork_dist.features.store.feature_store import FeatureStore
from roadwork_dist.features.store.index import Ints

SHARE = 4
"""At most 1/SHARE of the free memory is used."""
_BLOCK = 2048
"""Photos read at a time."""


def pad_views(values: Tensor, counts: Ints) -> tuple[Tensor, Tensor]:
    """Pad the photos of a batch to the same number of views.

    Args:
        values: views of all photos, [sum of V, D] on any device.
        counts: V of each, [B].

    Returns:
        [B, V, D], padded with zeros after the last view, and [B, V] bool on the CPU: which are real.
    """
    most = int(counts.max(initial=0))
    mask = torch.arange(most)[None, :] < torch.from_numpy(counts)[:, None]
    if (counts == most).all():
        return values.reshape(len(counts), most, values.shape[1]), mask
    places = mask.flatten().nonzero().squeeze(1).to(values.device, non_blocking=True)
    padded = values.new_zeros((len(counts) * most, values.shape[1])).index_copy_(0, places, values)
    return padded.reshape(len(counts), most, values.shape[1]), mask


class ResidentFeatures:
    """In-memory features of the rows of a data set.

    Args:
        values: [T, D].
        starts: first view of each (copy, row), [K, N].
        counts: V of each (copy, row), [K, N]; 0 for a row without features.
    """

    def __init__(self, values: Tensor, starts: Ints, counts: Ints) -> None:
        self.values, self.starts, self.counts = values, starts, counts

    @property
    def device(self) -> torch.device:
        """Device of the features."""
        return self.values.device

    def read(self, rows: Sequence[int], copy: int | None) -> tuple[Tensor, Ints]:
        """Views of rows one after the other, [sum of V, D] on the device, and V of each [B]."""
        chosen = np.asarray(rows, dtype=np.int64)
        starts, counts = (table[copy or 0, chosen] for table in (self.starts, self.counts))
        ends = np.cumsum(counts)
        places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)
        index = torch.from_numpy(places).to(self.device, non_blocking=True)
        return self.values.index_select(0, index), counts

    def row(self, row: int, copy: int | None) -> Tensor:
        """Views of one row, [V, D], without copying: a view into ``values``."""
        start, count = (int(table[copy or 0, row]) for table in (self.starts, self.counts))
        return self.values[start : start + count]


def load_resident(
    store: FeatureStore,
    hashes: Sequence[str | None],
    sample_ids: Sequence[str],
    copies: Sequence[int | None],
    device: torch.device,
) -> ResidentFeatures | None:
    """Read all features of a data set into the memory of a device.

    Args:
        store: store to read from.
        hashes: content hash of each photo; ``None`` for one without features.
        sample_ids: id of each photo.
        copies: copies to read.
        device: target device.

    Returns:
        ``None`` if they would take more than a quarter of the device's free memory.

    Raises:
        DataError: an entry is missing or damaged.
    """
    rows = np.array([row for row, content in enumerate(hashes) if content is not None], dtype=np.int64)
    contents, ids = [str(hashes[row]) for row in rows], [sample_ids[row] for row in rows]
    counts = np.zeros((len(copies), len(hashes)), dtype=np.int64)
    for number, copy in enumerate(copies):
        counts[number, rows] = store.views_of(contents, ids, copy)
    total = int(counts.sum())
    if total * store.view_bytes > free_memory(device) // SHARE:
        return None
    values = torch.empty((total, store.width or 1), dtype=store.space.torch_dtype, device=device)
    starts = (np.cumsum(counts) - counts.flatten()).reshape(counts.shape)
    place = 0
    for copy in copies:
        for first in range(0, len(rows), _BLOCK):
            block = slice(first, first + _BLOCK)
            part, _ = store.read(contents[block], ids[block], copy)
            values[place : place + len(part)].copy_(part)
            place += len(part)
    return ResidentFeatures(values, starts, counts)


def free_memory(device: torch.device) -> int:
    """Free bytes of a device for this process; processes of one machine share its CPU memory equally."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return 0
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    with suppress(OSError, ValueError):  # a container may have less memory than the machine
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
