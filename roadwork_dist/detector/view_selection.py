"""View selection: only the most informative crops go through the backbone.

The backbone is nearly the whole cost of a photo, so dropping views after it saves nothing. Here the global
view goes through first. The same pass yields a feature map; a scorer pools it inside the frame of each crop
and predicts how much weight the model would give to that crop. Only the best-scored crops follow. The scorer
is distilled from the gates of the full model, which sees all views
(:mod:`roadwork_dist.detector.selector_training`).

B batch · V views, the global one first · K crops (V - 1) · D width of the backbone ·
G cells per side of the backbone's last map · C its channels
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from roadwork_dist.common.errors import DataError
from roadwork_dist.config.batch import Batch, ModelOutput
from roadwork_dist.detector.detector import RoadworkModel
from roadwork_dist.detector.layers import SMALL_STD, init_linear

HIDDEN = 64
"""Hidden width of the scorer."""

Scorer = Callable[[Tensor, Tensor], Tensor]
"""Cells of global views [B, G, G, C], boxes of crops [B, K, 4] → scores [B, K]; higher = more informative."""


class ViewSelector(nn.Module):
    """The scorer: mean of the cells inside a crop's frame → standardise → C → 64 → GELU → dropout → 1.

    A bias per crop position, shared by all photos, is added. Scores are log-probabilities up to a constant
    per photo: their softmax is the share of attention that each crop is expected to get.

    Args:
        channels: C.
        crops: K.
        dropout: probability of dropping a hidden element in training.
    """

    mean: Tensor  # [C]
    std: Tensor  # [C]

    def __init__(self, channels: int, crops: int, dropout: float = 0.3) -> None:
        super().__init__()
        self.channels, self.crops = channels, crops
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.hidden = nn.Linear(channels, HIDDEN)
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Linear(HIDDEN, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(crops))
        init_linear(self.hidden)
        nn.init.trunc_normal_(self.score.weight, std=SMALL_STD)

    def forward(self, cells: Tensor, boxes: Tensor) -> Tensor:
        """Scores [B, K] float32 of crops; see :data:`Scorer`. Always computed without autocast."""
        with torch.autocast(cells.device.type, enabled=False):
            return self.of_regions(region_means(cells, boxes))

    def of_regions(self, regions: Tensor) -> Tensor:
        """Scores [B, K] of the mean cells of crops [B, K, C]; K may be less than all crops."""
        hidden = self.dropout(F.gelu(self.hidden((regions - self.mean) / self.std)))
        scores: Tensor = self.score(hidden).squeeze(-1) + self.bias[: regions.shape[1]]
        return scores


def region_means(cells: Tensor, boxes: Tensor) -> Tensor:
    """Means of cells inside boxes; a cell at the edge is weighted by its share inside the box.

    Args:
        cells: [B, G, G, C].
        boxes: [B, K, 4]: left, top, width, height as fractions of the view, which shows the whole photo.

    Returns:
        [B, K, C] float32; 0 for a box without area.
    """
    side = cells.shape[1]
    edges = torch.arange(side, device=cells.device, dtype=torch.float32) / side

    def inside(start: Tensor, extent: Tensor) -> Tensor:  # [B, K] → [B, K, G], length of the overlap
        ends = torch.minimum((start + extent).unsqueeze(-1), edges + 1 / side)
        return (ends - torch.maximum(start.unsqueeze(-1), edges)).clamp(min=0)

    across, down = inside(boxes[..., 0], boxes[..., 2]), inside(boxes[..., 1], boxes[..., 3])
    weights = (down.unsqueeze(-1) * across.unsqueeze(-2)).flatten(-2)  # [B, K, G·G]
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    return weights @ cells.float().flatten(1, 2)


class SelectiveDetector(nn.Module):
    """A detector that uses the global view and the ``crops`` best-scored crops of each photo.

    The backbone runs twice: on the global views of a batch, then on all chosen crops of the batch together.
    Photos that have only the global view are unaffected.

    The head sees unchosen views as padding, so gates and kept indices still refer to the photo's views. Its
    pruning keeps as many views as it would keep of all of them, or all chosen ones if those are fewer.

    Args:
        model: the detector, with its backbone.
        scorer: a :class:`ViewSelector`, or any other :data:`Scorer`.
        crops: most crops per photo; K or more = all.
    """

    def __init__(self, model: RoadworkModel, scorer: Scorer, crops: int) -> None:
        super().__init__()
        self.model, self.scorer, self.crops = model, scorer, crops

    def forward(self, batch: Batch) -> ModelOutput:
        """Predict from ``batch["views"]`` and ``batch["boxes"]``.

        Raises:
            DataError: the batch lacks one of them, or the model has no backbone.
            BackboneError: the backbone has no square feature map.
        """
        missing = [name for name in ("views", "boxes") if name not in batch]
        backbone: Any = self.model.backbone
        if missing or backbone is None:
            raise DataError(
                f"crops are selected from photos, but there is no {' and no '.join(missing) or 'backbone'}: "
                "give the batch views and boxes, and the model a backbone"
            )
        views, mask = batch["views"], batch["view_mask"]
        first, cells = backbone.forward_cells(views[:, 0])
        with torch.no_grad():
            scores = self.scorer(cells, batch["boxes"][:, 1 : mask.shape[1]])
        selected = select_views(batch, scores, self.crops)
        rest = first.new_zeros(*mask[:, 1:].shape, first.shape[-1])
        chosen = selected["view_mask"][:, 1:]
        if bool(chosen.any()):  # not every network accepts an empty batch
            rest = self.model.features(views[:, 1:], chosen)
        del selected["views"]
        selected["features"] = torch.cat([first.unsqueeze(1), rest], dim=1)
        output: ModelOutput = self.model(selected)
        return output


def select_views(batch: Batch, scores: Tensor, crops: int) -> Batch:
    """The batch with only the chosen views unmasked; ``scores`` [B, K] as for :func:`choose_views`."""
    mask = batch["view_mask"]
    chosen = choose_views(scores, mask, crops)
    return {**batch, "view_mask": chosen, "views_of_photo": mask.sum(dim=1)}


def choose_views(scores: Tensor, mask: Tensor, crops: int) -> Tensor:
    """The global view and the best-scored crops of each photo.

    Args:
        scores: [B, K] or wider; score k belongs to view k + 1.
        mask: [B, V] bool, False = padding; the first view of each photo is real.
        crops: most crops per photo; a photo with fewer keeps all. Ties go to the earlier view.

    Returns:
        [B, V] bool.
    """
    real = mask[:, 1:]  # [B, K]
    scores = scores[:, : real.shape[1]].float().masked_fill(~real, -torch.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(real).scatter(1, order[:, :crops], True)
    return torch.cat([mask[:, :1], chosen & real], dim=1)
