"""The shapes that flow between the floors. Axis letters are used in every comment.

B batch · V views kept for a photo · P patch tokens · D width of the backbone · H width of the
head · K classes (2: 0 = no roadwork, 1 = roadwork) · M mask classes (6) · S side of a view in px
"""

from typing import Any, NamedTuple, TypedDict

from torch import Tensor

WEATHER = ("sunny", "rainy", "foggy", "cloudy", "clear", "overcast", "snowy")
DAYTIME = ("day", "night", "dawn", "dusk", "light")
SCENE = ("urban", "highway", "residential", "rural", "industrial", "commercial")
MASK_CLASSES = ("cone", "barrier", "sign", "worker", "vehicle", "equipment")
VOCABULARIES = {"weather": WEATHER, "daytime": DAYTIME, "scene": SCENE}
CLASSES = ("no roadwork", "roadwork")

UNLABELLED = -1
"""Value of ``Batch["label"]`` for a photo without a label."""

TEXT_WIDTH = 384
"""Width of the frozen sentence embedding (all-MiniLM-L6-v2)."""

MASK_SIDE = 64
"""Side of the mask head's output and of its targets, in cells of the global view."""


class Batch(TypedDict, total=False):
    """One micro-batch of photos. Exactly one of ``views`` and ``features`` is present.

    A missing value is encoded, never NaN: ``gps`` 0 with ``gps_known`` False, a vocabulary
    field by the index after its last word, ``text`` 0 with ``text_known`` False.
    """

    id: list[str]
    index: Tensor  # [B] int64, row of the manifest
    views: Tensor  # [B, V, 3, S, S] uint8
    augment: dict[str, dict[str, Any]]  # what views drew that the device augments: of ``stack_draws``
    features: Tensor  # [B, V, D] bfloat16 or float32
    view_mask: Tensor  # [B, V] bool, False = padding (the photo has fewer views)
    views_of_photo: Tensor  # [B] int64, views that the photo has; only where some were not looked at
    boxes: Tensor  # [B, V, 4] float32: left, top, width, height of views in shares of the photo; to select by
    label: Tensor  # [B] int64: 0, 1 or UNLABELLED
    soft_label: Tensor  # [B] float32, share of class 1 in a mixed photo; only where photos are mixed
    views_of_two: Tensor  # [B] bool, some views are of another photo; only where photos are mixed
    gps: Tensor  # [B, 2] float32, latitude and longitude in degrees
    gps_known: Tensor  # [B] bool
    weather: Tensor  # [B] int64, len(WEATHER) = null
    daytime: Tensor  # [B] int64, len(DAYTIME) = null
    scene: Tensor  # [B] int64, len(SCENE) = null
    text: Tensor  # [B, TEXT_WIDTH] float32, frozen sentence embedding
    text_known: Tensor  # [B] bool
    mask: Tensor  # [B, M, MASK_SIDE, MASK_SIDE] float32 in [0, 1], of the un-augmented global view
    mask_known: Tensor  # [B] bool


class ModelOutput(NamedTuple):
    """What the detector returns for a batch.

    A tuple: FSDP2 and ZeRO-3 look into the outputs of a module for the tensors that a backward pass will come
    through, but into none of a class that they do not know.
    """

    logits: Tensor  # [B, K]
    view_logits: Tensor  # [B, V', K] of the V' views that pruning kept
    view_mask: Tensor  # [B, V'] bool
    weather_logits: Tensor  # [B, len(WEATHER)]
    mask_logits: Tensor | None  # [B, M, MASK_SIDE, MASK_SIDE]; None when the mask head is off
    view_gates: Tensor  # [B, V] in [0, 1]; 0 for a pruned or absent view
    kept: Tensor  # [B, V'] int64, indices of the kept views among the V
    fused: Tensor  # [B, H], output of the joint fusion
    balance: Tensor  # [B], load-balancing loss of the mixture of experts per row; 0 without one
