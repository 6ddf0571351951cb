"""View selection: only the crops that look worth it go through the backbone.

The backbone is nearly the whole cost of a photo, so views that are dropped behind it save nothing. Here the
global view goes through first; a scorer guesses from its feature alone how much each crop would have a say,
and only the best crops follow. The scorer is distilled from the gates of the full model, which has seen all
views (:mod:`roadwork_dist.models.distillation`).

B batch · V views, the global one first · C crops (V - 1) · D width of the backbone
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from roadwork_dist.common.types import Batch, ModelOutput
from roadwork_dist.models.detector import RoadworkModel
from roadwork_dist.models.layers import SMALL_STD, init_linear

HIDDEN = 64
"""Hidden width of the scorer."""

Scorer = Callable[[Tensor], Tensor]
"""Features of global views [B, D] → a score for each crop [B, C]; higher = rather look at it."""


class ViewSelector(nn.Module):
    """The scorer: standardise → D → 64 → GELU → dropout → C, plus a bias that every photo shares.

    A crop is known by its position only. Scores are log-probabilities up to a constant of the photo: their
    softmax is the share of the gates that each crop is expected to have.

    Args:
        width: D.
        crops: C.
        dropout: chance that a hidden element is dropped while it learns.
    """

    mean: Tensor  # [D]
    std: Tensor  # [D]

    def __init__(self, width: int, crops: int, dropout: float = 0.3) -> None:
        super().__init__()
        self.width, self.crops = width, crops
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.hidden = nn.Linear(width, HIDDEN)
        self.dropout = nn.Dropout(dropout)
        self.scores = nn.Linear(HIDDEN, crops)
        init_linear(self.hidden)
        init_linear(self.scores, std=SMALL_STD)

    def forward(self, features: Tensor) -> Tensor:
        """Scores [B, C] float32 of the global views' features [B, D], whatever autocast is around it."""
        with torch.autocast(features.device.type, enabled=False):
            standard = (features.float() - self.mean) / self.std
            out: Tensor = self.scores(self.dropout(F.gelu(self.hidden(standard))))
        return out


class SelectiveDetector(nn.Module):
    """A detector that looks at the global view and then at the ``crops`` best-scored crops of each photo.

    Takes the batches that the detector takes. Where they hold views, the backbone runs twice: on the global
    views of the batch, then on all chosen crops of the batch together; nothing else goes through it. Where
    they hold features, only the chosen ones are read. Photos with the global view only pass unchanged.

    The head sees the views that were not chosen as padding, so that gates and kept indices stay those of the
    photo's views. Its pruning keeps as many views as it would of all of them, if so many were chosen.

    Args:
        model: the detector.
        scorer: chooses; a :class:`ViewSelector`, or anything else that gives scores.
        crops: how many crops at most; C or more = all.
    """

    def __init__(self, model: RoadworkModel, scorer: Scorer, crops: int) -> None:
        super().__init__()
        self.model, self.scorer, self.crops = model, scorer, crops

    def forward(self, batch: Batch) -> ModelOutput:
        """Predict.

        Raises:
            DataError: the batch has neither views nor features, or the model no backbone for its views.
        """
        mask = batch["view_mask"]
        selected: Batch = {**batch, "views_of_photo": mask.sum(dim=1)}
        if "features" in batch:
            selected["view_mask"] = self._choose(batch["features"][:, 0], mask)
        elif "views" in batch:
            del selected["views"]
            selected["features"], selected["view_mask"] = self._look(batch["views"], mask)
        output: ModelOutput = self.model(selected)
        return output

    def _look(self, views: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Views [B, V, 3, S, S] → features [B, V, D], zeros where nobody looked, and where somebody did."""
        first = self.model.features(views[:, :1], mask[:, :1])  # [B, 1, D]
        chosen = self._choose(first[:, 0], mask)
        if not bool(chosen[:, 1:].any()):  # networks need not take an empty batch
            rest = first.new_zeros(*mask[:, 1:].shape, first.shape[-1])
        else:
            rest = self.model.features(views[:, 1:], chosen[:, 1:])
        return torch.cat([first, rest], dim=1), chosen

    def _choose(self, global_features: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            return choose_views(self.scorer(global_features), mask, self.crops)


def choose_views(scores: Tensor, mask: Tensor, crops: int) -> Tensor:
    """The global view and the best-scored crops of each photo.

    Args:
        scores: [B, C] or wider; score c is that of view c + 1.
        mask: [B, V] bool, False = padding; the first view of each photo is real.
        crops: how many at most; a photo with fewer keeps all. Ties go to the earlier view.

    Returns:
        [B, V] bool.
    """
    real = mask[:, 1:]  # [B, C]
    scores = scores[:, : real.shape[1]].float().masked_fill(~real, -torch.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(real).scatter(1, order[:, :crops], True)
    return torch.cat([mask[:, :1], chosen & real], dim=1)
