"""The worst errors of a set of photos, with their views as thumbnails."""

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from roadwork_dist.common.errors import RoadworkError

if TYPE_CHECKING:
    import pandas as pd

ViewsOf = Callable[[str, str], ArrayLike]
"""Maps a photo's split and id to its views, [V, 3, S, S] uint8."""

LARGE, SMALL = 288, 160
"""Side in px of the thumbnail of the global view, and of the others."""

MAX_BYTES = {LARGE: 15_000, SMALL: 7_000}
"""Maximum bytes of a thumbnail's JPEG; its quality is lowered until it fits."""

QUALITIES = (82, 72, 60, 48, 36, 24, 12)


@dataclass(frozen=True)
class Thumbnail:
    """One view as a picture; ``gate`` in [0, 1] is the weight the model gave it, None if not recorded."""

    name: str
    picture: str
    gate: float | None

    @property
    def pruned(self) -> bool:
        """Whether the model ignored this view."""
        return self.gate is not None and self.gate <= 0


@dataclass(frozen=True)
class ErrorCard:
    """One wrong prediction: the photo's id, label, probability, metadata and views."""

    id: str
    label: int
    probability: float
    facts: tuple[str, ...]
    views: tuple[Thumbnail, ...]
    problem: str

    @property
    def kind(self) -> str:
        """``false alarm`` or ``missed roadwork``."""
        return "missed roadwork" if self.label else "false alarm"


def worst_errors(frame: "pd.DataFrame", threshold: float, count: int) -> "pd.DataFrame":
    """The labelled photos on the wrong side of the threshold, farthest from their label first.

    Args:
        frame: predictions; rows without a label or a finite probability are never errors.
        threshold: photos with a probability above this are called roadwork.
        count: maximum number of rows returned.
    """
    known = frame[frame["label"].notna() & np.isfinite(frame["probability"])]
    label = known["label"].astype(int)
    wrong = (known["probability"] > threshold) != (label == 1)
    distance = (known["probability"] - label).abs()[wrong]
    worst: pd.DataFrame = known.loc[distance.sort_values(ascending=False, kind="stable").index[:count]]
    return worst


def view_names(count: int) -> list[str]:
    """Names of the views of a photo: whole photo, the tiles row by row, centre, edge."""
    grid = math.isqrt(max(count - 3, 0))
    if count > 3 and grid * grid == count - 3:
        tiles = [f"row {row + 1}, column {column + 1}" for row in range(grid) for column in range(grid)]
        return ["whole photo", *tiles, "centre", "edge"]
    return ["whole photo"] if count == 1 else [f"view {number + 1}" for number in range(count)]


def thumbnail(view: "np.ndarray[Any, Any]", side: int) -> str:
    """Encode a view as a JPEG ``data:`` URL.

    Args:
        view: [3, S, S] uint8 RGB.
        side: side of the thumbnail in px, a key of :data:`MAX_BYTES`.
    """
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(np.moveaxis(view, 0, -1)))
    picture = picture.resize((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    content = b""
    for quality in QUALITIES:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality, optimize=True)
        content = buffer.getvalue()
        if len(content) <= MAX_BYTES[side]:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"


def error_cards(rows: "pd.DataFrame", views_of: ViewsOf | None) -> list[ErrorCard]:
    """Cards of the given predictions, in their order.

    Args:
        rows: predictions, for example from :func:`worst_errors`.
        views_of: returns a photo's views; None = the photos are not available. A photo that cannot be read
            gets a card that says so.
    """
    return [_card(row, views_of) for row in rows.to_dict("records")]


def _card(row: dict[Any, Any], views_of: ViewsOf | None) -> ErrorCard:
    views: tuple[Thumbnail, ...] = ()
    problem = "The photos are not available, so the views are not shown." if views_of is None else ""
    if views_of is not None:
        try:
            views = _thumbnails(np.asarray(views_of(row["split"], row["id"])), _gates(row["view_gates"]))
        except (RoadworkError, OSError) as error:
            problem = f"The photo cannot be read: {error}"
    return ErrorCard(row["id"], int(row["label"]), float(row["probability"]), _facts(row), views, problem)


def _thumbnails(views: "np.ndarray[Any, Any]", gates: Sequence[float]) -> tuple[Thumbnail, ...]:
    names = view_names(len(views))
    known = [gates[i] if i < len(gates) else None for i in range(len(views))]
    sides = [LARGE] + [SMALL] * (len(views) - 1)
    return tuple(
        Thumbnail(name, thumbnail(view, side), gate)
        for name, view, side, gate in zip(names, views, sides, known, strict=True)
    )


def _gates(value: Any) -> list[float]:
    return [] if value is None or isinstance(value, float) else [float(gate) for gate in value]


def _facts(row: dict[Any, Any]) -> tuple[str, ...]:
    words = [str(row[field]) for field in ("weather", "daytime", "scene") if row[field] is not None]
    if math.isfinite(row["latitude"]) and math.isfinite(row["longitude"]):
        words.append(f"{row['latitude']:.3f}, {row['longitude']:.3f}")
    sides = [row["width"], row["height"]]
    if all(isinstance(side, int | float | np.integer) and side > 0 for side in sides):
        words.append(f"{int(sides[0])} × {int(sides[1])} px")
    return tuple(words)
