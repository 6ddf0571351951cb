import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.synthetic_run import synthetic_predictions, synthetic_views

from roadwork_dist.common.errors import DataError
from roadwork_dist.evaluation.errors_gallery import (
    LARGE,
    MAX_BYTES,
    SMALL,
    error_cards,
    thumbnail,
    view_names,
    worst_errors,
)


def test_worst_errors_come_farthest_first_and_are_errors() -> None:
    frame = synthetic_predictions(6)
    frame["label"] = [1, 1, 0, 0, 1, None]
    frame["probability"] = [0.1, 0.9, 0.95, 0.6, 0.5, 0.99]
    worst = worst_errors(frame, 0.5, 10)
    assert worst["id"].tolist() == [f"val/0000{i}.jpg" for i in (2, 0, 3, 4)]  # 0.5 is not above 0.5
    assert worst_errors(frame, 0.5, 1)["id"].tolist() == ["val/00002.jpg"]
    assert len(worst_errors(frame, 0.5, 0)) == 0


def decode(picture: str) -> Image.Image:
    head, _, content = picture.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


@pytest.mark.parametrize("side", [LARGE, SMALL])
def test_thumbnails_stay_small_even_of_noise(side: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 512, 512), dtype=np.uint8)
    picture = thumbnail(noise, side)
    assert decode(picture).size == (side, side)
    assert len(base64.b64decode(picture.partition(",")[2])) <= MAX_BYTES[side] <= 15_000


def test_thumbnail_keeps_colours_and_places() -> None:
    view = np.zeros((3, 64, 64), dtype=np.uint8)
    view[0, :32] = 250  # red above
    view[2, 32:] = 250  # blue below
    pixels = np.asarray(decode(thumbnail(view, SMALL))).astype(int)
    assert pixels[20, 80] == pytest.approx([250, 0, 0], abs=12)
    assert pixels[140, 80] == pytest.approx([0, 0, 250], abs=12)


def test_card_holds_views_gates_and_facts() -> None:
    rows = synthetic_predictions(1)
    rows["view_gates"] = [[0.7, 0.0, *[0.25] * 10]]
    rows[["weather", "daytime", "scene"]] = ["sunny", None, "urban"]
    rows[["latitude", "longitude"]] = [41.88, -87.63]
    card = error_cards(rows, lambda split, name: synthetic_views(f"{split} {name}"))[0]
    assert len(card.views) == 12
    assert [view.gate for view in card.views[:3]] == [0.7, 0.0, 0.25]
    assert [view.pruned for view in card.views[:3]] == [False, True, False]
    assert card.facts == ("sunny", "urban", "41.880, -87.630", "2016 × 1512 px")
    assert card.problem == ""
    assert decode(card.views[0].picture).size == (LARGE, LARGE)


def test_views_without_gates_have_none() -> None:
    rows = synthetic_predictions(1)
    rows["view_gates"] = None
    card = error_cards(rows, lambda split, name: synthetic_views(name, views=1))[0]
    assert [(view.name, view.gate, view.pruned) for view in card.views] == [("whole photo", None, False)]


def test_a_photo_that_cannot_be_read_is_said() -> None:
    def broken(split: str, name: str) -> Any:
        raise DataError(f"{name} is truncated")

    card = error_cards(synthetic_predictions(1), broken)[0]
    assert card.views == ()
    assert card.problem == "The photo cannot be read: val/00000.jpg is truncated"
    assert "not available" in error_cards(synthetic_predictions(1), None)[0].problem


def test_view_names_follow_the_grid() -> None:
    names = view_names(12)
    assert (names[0], names[1], names[4], names[10], names[11]) == (
        "whole photo",
        "row 1, column 1",
        "row 2, column 1",
        "centre",
        "edge",
    )
    assert view_names(1) == ["whole photo"]
    assert view_names(2) == ["view 1", "view 2"]
    assert len(view_names(19)) == 19
