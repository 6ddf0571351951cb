"""Mixing of training photos: MixUp (arXiv 1710.09412) and CutMix (arXiv 1905.04899).

A photo is mixed with a partner drawn from all training rows, not from its batch, since the composition of
a batch depends on the number of processes and losses must not. The row always keeps the larger share,
lambda' = max(lambda, 1 - lambda) (equation 9 of arXiv 1905.02249), so its id, label, metadata and weather
stay valid. Only what the loss needs is added: ``soft_label``.

V views · S side of a view in px · D width of the backbone · M mask classes
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from roadwork_dist.common.errors import DataError
from roadwork_dist.common.random import generator_for
from roadwork_dist.config.batch import MASK_SIDE, UNLABELLED
from roadwork_dist.config.experiment import AugmentConfig
from roadwork_dist.photos.augment.operations import blend
from roadwork_dist.trainer.feed.dataset import MapDataset, WrappedDataset

AUTO_ALPHA = {"mixup": 0.2, "cutmix": 1.0}
"""Parameter of the Beta distribution, from the ImageNet settings of the two papers."""

Row = dict[str, Any]


class MixedRows(WrappedDataset[Row]):
    """Training rows, a random share of which is mixed with another row.

    Every row is a pure function of (seed, epoch, sample id), as are those it is made of. Two fields are
    added: ``soft_label``, the share of class 1, and ``views_of_two``, whether the views come from two photos.
    A row stays unmixed if it or its partner is unlabelled, if the partner is the row itself, cannot be read
    or has another number of views, or if the random draw says so (``mix_share``).

    Args:
        rows: the rows to train on and to draw partners from. Partners are not prefetched.
        labels: label of each row: 0, 1 or UNLABELLED.
        config: kind (not ``off``), share and strength of the mixing.
        seed: seed of the run.
        weights: sampling weight of each row, also used to draw partners; None = equal weights.

    Raises:
        ValueError: ``labels`` or ``weights`` have another length than ``rows``.
    """

    def __init__(
        self,
        rows: MapDataset,
        labels: Sequence[int],
        config: AugmentConfig,
        *,
        seed: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        chances = np.ones(len(rows)) if weights is None else np.asarray(weights, dtype=np.float64)
        if not len(rows) == len(labels) == len(chances):
            raise ValueError(f"{len(labels)} labels and {len(chances)} weights for {len(rows)} rows")
        chances = np.where(np.asarray(labels) == UNLABELLED, 0.0, chances)
        super().__init__(rows)
        self.config, self.seed, self.epoch = config, seed, 0
        self.alpha = AUTO_ALPHA[config.mix] if config.mix_alpha == "auto" else config.mix_alpha
        self._partners = np.flatnonzero(chances)
        self._cumulative = np.cumsum(chances[self._partners])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose draws are used."""
        self.epoch = epoch
        super().set_epoch(epoch)

    def __getitem__(self, index: int) -> Row:
        """One row, mixed or not.

        Raises:
            DataError: the photo itself or its features cannot be read; the message names it.
        """
        row = self.dataset[index]
        label = row["label"]
        row = {**row, "soft_label": torch.tensor(float(label == 1)), "views_of_two": False}
        rng = generator_for("mix", self.config.mix, self.seed, self.epoch, row["id"])
        if label == UNLABELLED or rng.random() >= self.config.mix_share:
            return row
        partner = self._partner(index, rng)
        if partner is None or _pixels_or_features(partner).shape != _pixels_or_features(row).shape:
            return row
        share = float(rng.beta(self.alpha, self.alpha))
        keep = max(share, 1 - share)
        if self.config.mix == "mixup":
            return row | mixup(row, partner, keep)
        cut = cutmix_views if "views" in row else cutmix_features
        return row | cut(row, partner, keep, rng)

    def _partner(self, index: int, rng: np.random.Generator) -> Row | None:
        """A labelled row drawn by weight; ``None`` if it is the row itself or cannot be read."""
        if not len(self._partners):
            return None
        place = np.searchsorted(self._cumulative, rng.random() * self._cumulative[-1], side="right")
        chosen = int(self._partners[min(int(place), len(self._partners) - 1)])
        if chosen == index:
            return None
        try:
            partner = self.dataset[chosen]
        except DataError:  # reported when the row is read for itself; here this row just stays unmixed
            return None
        # Partners have labels, so an unlabelled one is the placeholder of a photo that cannot be read.
        return None if partner["label"] == UNLABELLED else partner


def _pixels_or_features(row: Row) -> Tensor:
    values: Tensor = row["views"] if "views" in row else row["features"]
    return values


def mixup(row: Row, partner: Row, keep: float) -> Row:
    """Blend pixels, or features (Manifold MixUp, arXiv 1806.05236), in float32.

    Args:
        row: with ``views`` [V, 3, S, S] uint8 or ``features`` [V, D] of any floating type.
        partner: likewise; view i is blended with view i.
        keep: share of ``row``.

    Returns:
        The fields that change; features keep their dtype.
    """
    if "views" in row:
        mixed = {"views": blend(row["views"], partner["views"].float(), torch.tensor(1 - keep))}
    else:
        own = row["features"]
        mixed = {"features": torch.lerp(own.float(), partner["features"].float(), 1 - keep).to(own.dtype)}
    return mixed | _soft_label(row, partner, keep) | _mask(row, partner, torch.tensor(1 - keep))


def cutmix_views(row: Row, partner: Row, keep: float, rng: np.random.Generator) -> Row:
    """Paste one box of the partner, the same in every view, into ``views`` [V, 3, S, S].

    With the same box, the partner's share of the area is equal in all views, so the soft label is valid for
    each of them. As in the paper, it is computed from the clipped box. The box is also pasted into the mask
    target, which like every mask target ignores the augmentation of the views.

    Returns:
        The fields that change.
    """
    side = row["views"].shape[-1]
    top, bottom, left, right = draw_box(side, keep, rng)
    views = row["views"].clone()
    views[..., top:bottom, left:right] = partner["views"][..., top:bottom, left:right]
    keep = 1 - (bottom - top) * (right - left) / side**2
    cells = _covered(top, bottom, side)[:, None] * _covered(left, right, side)
    return {"views": views} | _soft_label(row, partner, keep) | _mask(row, partner, cells)


def cutmix_features(row: Row, partner: Row, keep: float, rng: np.random.Generator) -> Row:
    """Replace some views by the partner's: CutMix when only ``features`` [V, D] are available.

    The global view (the first) is always the row's own, so the mask target does not change. The soft label
    follows from the number of replaced views. A photo with a single view is not mixed.

    Returns:
        The fields that change.
    """
    own = row["features"]
    count = min(round((1 - keep) * len(own)), len(own) // 2)
    chosen = torch.from_numpy(1 + rng.permutation(len(own) - 1)[:count])
    features = own.clone()
    features[chosen] = partner["features"][chosen]
    mixed = {"features": features, "views_of_two": count > 0}
    return mixed | _soft_label(row, partner, 1 - count / len(own))


def draw_box(side: int, keep: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A square of side sqrt(1 - keep) · side around a random pixel, clipped (equation 2 of the CutMix paper).

    Returns:
        top, bottom, left and right in px; bottom and right are exclusive.
    """
    extent = int(side * math.sqrt(1 - keep))
    top, left = (rng.integers(side, size=2) - extent // 2).tolist()
    return max(top, 0), min(top + extent, side), max(left, 0), min(left + extent, side)


def _covered(start: int, end: int, side: int) -> Tensor:
    """Share of each of the MASK_SIDE cells of an axis of ``side`` px that is in ``start`` … ``end``."""
    edges = torch.arange(MASK_SIDE + 1) * (side / MASK_SIDE)
    inside = edges.clamp(start, end)
    return inside.diff() / (side / MASK_SIDE)


def _soft_label(row: Row, partner: Row, keep: float) -> Row:
    return {"soft_label": torch.tensor(keep * row["label"] + (1 - keep) * partner["label"])}


def _mask(row: Row, partner: Row, share: Tensor) -> Row:
    """Mixed mask target [M, MASK_SIDE, MASK_SIDE]; ``share`` is the partner's; unknown if either mask is."""
    if "mask" not in row:
        return {}
    mask = torch.lerp(row["mask"], partner["mask"], share)
    return {"mask": mask, "mask_known": row["mask_known"] and partner["mask_known"]}
