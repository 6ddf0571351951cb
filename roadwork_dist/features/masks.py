"""Targets of the mask head for a whole manifest, decoded once (M classes, cells of the global view).

Decoding a 12-megapixel mask takes longer than a training step, so targets are cached: on disk between
runs and, compressed, in memory during a run. Cells are multiples of 1/255, so uint8 stores them exactly.
"""

import hashlib
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from roadwork_dist.common.errors import DataError
from roadwork_dist.common.files import write_atomic
from roadwork_dist.config.batch import MASK_CLASSES, MASK_SIDE
from roadwork_dist.features.store.locks import unless_read_only
from roadwork_dist.features.tensor_file import pack_tensor, unpack_tensor
from roadwork_dist.photos.images import MAX_PIXELS, photo_size
from roadwork_dist.photos.manifest import Sample
from roadwork_dist.photos.mask_images import MaskSource, decode_mask
from roadwork_dist.storage.remote.retry import ServerDownError

FOLDER = "masks"
SHAPE = (len(MASK_CLASSES), MASK_SIDE, MASK_SIDE)


class MaskTargets:
    """Mask targets of the rows of a manifest.

    Args:
        targets: [M, MASK_SIDE, MASK_SIDE] uint8, 255 = the whole cell; ``None`` = no mask.
    """

    def __init__(self, targets: Sequence[Tensor | None]) -> None:
        self._packed = [None if t is None else zlib.compress(t.numpy().tobytes(), 1) for t in targets]

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, row: int) -> tuple[Tensor, bool]:
        """Target [M, MASK_SIDE, MASK_SIDE] float32 in [0, 1], and whether the row has a mask (else all 0)."""
        masks, known = self.rows([row])
        return masks[0], bool(known[0])

    def rows(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Targets of several rows, [B, M, MASK_SIDE, MASK_SIDE], and which have a mask, [B] bool."""
        cells = torch.zeros((len(rows), *SHAPE), dtype=torch.uint8)
        known = [self._packed[row] is not None for row in rows]
        for target, row in zip(cells.numpy(), rows, strict=True):
            packed = self._packed[row]
            if packed is not None:
                target[...] = np.frombuffer(zlib.decompress(packed), dtype=np.uint8).reshape(SHAPE)
        return cells.float() / 255, torch.tensor(known, dtype=torch.bool)


def faulty_masks(
    samples: Sequence[Sample],
    photos: Sequence[str | None],
    root: Path | str,
    *,
    max_pixels: int = MAX_PIXELS,
    threads: int = 4,
) -> dict[int, str]:
    """Find masks that are unreadable or rotated against their photo; valid ones are cached as targets.

    Cached targets are not checked again: they were checked against the same photo.

    Args:
        samples: photos and masks.
        photos: content hash of each photo, from ``content_hashes``; rows without one are skipped.
        root: folder of the feature store.
        max_pixels: maximum number of pixels of a photo.
        threads: masks decoded in parallel.

    Returns:
        Row -> one line that names the file and what is wrong with it.

    Raises:
        ServerDownError: the server cannot be reached.
        OSError: the disk of the store is full.
    """
    folder = Path(root) / FOLDER

    def fault_of(sample: Sample, photo: str | None) -> str:
        try:
            if sample.mask is not None and photo is not None:
                _target(sample.mask, folder, photo, partial(photo_size, sample.image, max_pixels=max_pixels))
        except ServerDownError:
            raise
        except DataError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(max(1, threads)) as pool:
        return {row: fault for row, fault in enumerate(pool.map(fault_of, samples, photos)) if fault}


def mask_targets(
    sources: Sequence[MaskSource | None],
    root: Path | str | None = None,
    threads: int = 4,
    photos: Sequence[str | None] | None = None,
) -> MaskTargets:
    """Decode the masks of a manifest, or read their cached targets.

    Args:
        sources: one per row; ``None`` = no mask.
        root: folder of the feature store, where targets are cached; ``None`` = no cache.
        threads: masks decoded in parallel.
        photos: content hash of each row's photo, if :func:`faulty_masks` has checked the masks.

    Raises:
        DataError: a mask cannot be read; the message names it.
    """
    folder = None if root is None else Path(root) / FOLDER

    def target(source: MaskSource | None, photo: str | None) -> Tensor | None:
        return None if source is None else _target(source, folder, photo)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        return MaskTargets(list(pool.map(target, sources, photos or [None] * len(sources))))


def _target(
    source: MaskSource,
    folder: Path | None,
    photo: str | None = None,
    size_of_photo: Callable[[], tuple[int, int]] | None = None,
) -> Tensor:
    path = None
    if folder is not None:
        # The key includes the photo: the same mask may fit one photo and be rotated against another.
        name = hashlib.sha256(source.content() + (photo or "").encode()).hexdigest()
        path = folder / name[:2] / f"{name}.safetensors"
        kept = unpack_tensor(path)
        if kept is not None:
            return kept
    size = None if size_of_photo is None else size_of_photo()
    cells = (decode_mask(source, photo_size=size) * 255).round().to(torch.uint8)
    if folder is not None and path is not None:
        with unless_read_only(folder.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, pack_tensor(cells))
    return cells
