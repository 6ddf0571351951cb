"""Types and shapes of batches and model outputs. The axis letters are used throughout the package.

B batch · V views of a photo · P patch tokens · D width of the backbone · H width of the
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

    A missing value is encoded and never NaN: ``gps`` as 0 with ``gps_known`` False, a vocabulary
    field as the index after its last word, ``text`` as 0 with ``text_known`` False.
    """

    id: list[str]
    index: Tensor  # [B] int64, row in the manifest
    views: Tensor  # [B, V, 3, S, S] uint8
    augment: dict[str, dict[str, Any]]  # draws for augmentation on the device, from ``stack_draws``
    features: Tensor  # [B, V, D] bfloat16 or float32
    view_mask: Tensor  # [B, V] bool, False = padding (the photo has fewer views)
    views_of_photo: Tensor  # [B] int64, number of views of the photo; only after view selection
    boxes: Tensor  # [B, V, 4] float32: left, top, width, height of views as fractions of the photo
    label: Tensor  # [B] int64: 0, 1 or UNLABELLED
    soft_label: Tensor  # [B] float32, share of class 1 in a mixed photo; only if photos are mixed
    views_of_two: Tensor  # [B] bool, some views are from another photo; only if photos are mixed
    gps: Tensor  # [B, 2] float32, latitude and longitude in degrees
    gps_known: Tensor  # [B] bool
    weather: Tensor  # [B] int64, len(WEATHER) = null
    daytime: Tensor  # [B] int64, len(DAYTIME) = null
    scene: Tensor  # [B] int64, len(SCENE) = null
    text: Tensor  # [B, TEXT_WIDTH] float32, frozen sentence embedding
    text_known: Tensor  # [B] bool
    mask: Tensor  # [B, M, MASK_SIDE, MASK_SIDE] float32 in [0, 1], of the unaugmented global view
    mask_known: Tensor  # [B] bool


class ModelOutput(NamedTuple):
    """What the detector returns for a batch.

    It is a tuple because FSDP2 and ZeRO-3 search the outputs of a module for tensors of the backward pass,
    but do not look into unknown classes.
    """

    logits: Tensor  # [B, K]
    view_logits: Tensor  # [B, V', K] for the V' views kept by pruning
    view_mask: Tensor  # [B, V'] bool
    weather_logits: Tensor  # [B, len(WEATHER)]
    mask_logits: Tensor | None  # [B, M, MASK_SIDE, MASK_SIDE]; None if the mask head is off
    view_gates: Tensor  # [B, V] in [0, 1]; 0 for a pruned or absent view
    kept: Tensor  # [B, V'] int64, indices of the kept views among the V
    fused: Tensor  # [B, H], output of the joint fusion
    balance: Tensor  # [B], load-balancing loss of the mixture of experts per row; 0 without experts
