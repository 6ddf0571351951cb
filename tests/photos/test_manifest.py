import logging
import math
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roadwork_dist.common.errors import DataError
from roadwork_dist.config.batch import UNLABELLED
from roadwork_dist.config.experiment import ColumnsConfig
from roadwork_dist.photos.images import FileImage
from roadwork_dist.photos.manifest import Manifest, build_manifest, is_null

COLUMNS = ColumnsConfig()
NULLS = [
    None,
    "",
    "  ",
    "null",
    "NULL",
    "none",
    "None",
    "NaN",
    "nan",
    math.nan,
    np.float32("nan"),
    pd.NA,
    pd.NaT,
]


def build(*rows: dict[str, object], columns: ColumnsConfig = COLUMNS) -> Manifest:
    return build_manifest(rows, name="train.csv", columns=columns)


@pytest.mark.parametrize("value", NULLS, ids=repr)
def test_every_spelling_of_null_reads_as_null(value: object) -> None:
    assert is_null(value)
    row = {name: value for name in vars(COLUMNS) if name != "image"}
    (sample,) = build({**row, "image": "a.jpg"})
    assert sample.id == "a.jpg"
    assert all(getattr(sample, name) is None for name in vars(COLUMNS) if name not in ("id", "image"))


def test_a_number_names_a_group_as_a_text_does() -> None:
    cells = (1234567, 1234567.0, "1234567", " drive 7 ", None, math.nan)
    groups = [s.group for s in build(*({"image": f"{i}.jpg", "group": c} for i, c in enumerate(cells)))]
    assert groups == ["1234567"] * 3 + ["drive 7", None, None]
    with pytest.raises(DataError, match=r"group is \[1\]"):
        build({"image": "a.jpg", "group": [1]})


def cell(*values: object) -> st.SearchStrategy[object]:
    return st.sampled_from([*NULLS, *values])


@given(
    st.lists(
        st.fixed_dictionaries(
            {"image": st.just(b"jpeg")},
            optional={
                "id": st.sampled_from(NULLS),
                "label": cell(0, 1, "0", "1", 1.0, True, False, np.int64(1)),
                "latitude": cell(12.5, "-90", 90, np.float64(1)),
                "longitude": cell(-180, "180.0", 3),
                "weather": cell("sunny", "Rainy ", "drizzle"),
                "daytime": cell("day", "tea time"),
                "scene": cell("urban", "moon"),
                "description": cell("two cones", "Nullarbor plain"),
                "mask": cell("mask.png"),
            },
        ),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=150, deadline=None)
def test_no_mix_of_nulls_raises_or_leaves_a_nan(rows: list[dict[str, object]]) -> None:
    manifest = build(*rows)
    assert len(manifest) == len(rows)
    assert set(manifest.labels.tolist()) <= {UNLABELLED, 0, 1}
    both = np.isnan(manifest.coordinates)
    assert (both[:, 0] == both[:, 1]).all()
    for sample in manifest:
        for value in (sample.latitude, sample.longitude):
            assert value is None or math.isfinite(value)


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (0, 0),
        (1, 1),
        ("0", 0),
        ("1", 1),
        (1.0, 1),
        (0.0, 0),
        ("1.0", 1),
        (True, 1),
        ("False", 0),
        (np.int8(1), 1),
    ],
)
def test_labels_that_are_understood(value: object, label: int) -> None:
    assert build({"image": "a", "label": value})[0].label == label


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"label": 2}, "label is 2, expected 0"),
        ({"label": "roadwork"}, "label is 'roadwork', expected 0"),
        ({"label": 0.5}, "label is 0.5, expected 0"),
        ({"label": [1]}, r"label is \[1\], expected 0"),
        ({"latitude": 97}, "latitude is 97, expected degrees from -90 to 90"),
        ({"latitude": "north"}, "latitude is 'north', expected degrees"),
        ({"longitude": -180.01}, "longitude is -180.01, expected degrees from -180 to 180"),
        ({"longitude": math.inf}, "longitude is inf"),
        ({"latitude": True}, "latitude is True"),
        ({"weather": 3}, r"weather is 3 \(int\), expected text"),
        ({"description": ["x"]}, "description is .* expected text"),
        ({"image": None}, "image is null, expected a path"),
        ({"image": 5}, "image is a int, expected a path"),
        ({"id": ["x"]}, "id is a list, expected text"),
    ],
)
def test_wrong_cells_name_file_and_row(row: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        build({"image": "a.jpg"}, {"image": "b.jpg", **row})
    assert str(caught.value).startswith("train.csv, row 2")
    assert "\n" not in str(caught.value)


def test_all_wrong_rows_are_told_at_once() -> None:
    rows = [{"image": f"{n}", "label": label} for n, label in enumerate([0, 2, 1, 3, 4])]
    with pytest.raises(DataError, match=r"^train.csv, row 2: label is 2.*\(2 more rows are wrong: 4, 5\)$"):
        build(*rows)


def test_duplicate_ids_name_both_rows() -> None:
    rows = [{"id": "x", "image": "a"}, {"id": "y", "image": "b"}, {"id": "x", "image": "c"}]
    with pytest.raises(DataError, match="row 3: id 'x' is also the id of row 1"):
        build(*rows)
    with pytest.raises(
        DataError, match=r"row 2: id \(taken from the image's path\) 'a.jpg' is also the id of row 1"
    ):
        build({"image": "a.jpg"}, {"image": "a.jpg"})


def test_ids_come_from_the_path_or_the_row() -> None:
    rows = [
        {"id": 7, "image": "a"},
        {"id": 8.0, "image": "b"},
        {"id": None, "image": "c/d.jpg"},
        {"image": b"bytes"},
        {"image": {"bytes": b"x", "path": "e.jpg"}},
        {"image": FileImage(Path("f.jpg"))},
    ]
    assert build(*rows).ids == ("7", "8", "c/d.jpg", "row-4", "e.jpg", "f.jpg")


def test_unknown_words_are_counted_and_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"image": str(n), "weather": "Drizzle", "scene": "urbn" if n else "URBAN"} for n in range(3)]
    with caplog.at_level(logging.WARNING):
        manifest = build(*rows)
    assert manifest.unknown_words == {("weather", "drizzle"): 3, ("scene", "urbn"): 2}
    assert [s.weather for s in manifest] == [None] * 3
    assert [s.scene for s in manifest] == ["urban", None, None]
    (record,) = caplog.records
    text = record.getMessage()
    assert text.startswith("train.csv: ")
    assert "weather 'drizzle' ×3" in text
    assert "scene 'urbn' ×2 (nearest: urban, rural, residential)" in text


def test_missing_columns() -> None:
    with pytest.raises(DataError, match=r"no column 'image'.*one of Image, label \(did you mean 'Image'"):
        build({"Image": "a", "label": 1})
    with pytest.raises(DataError, match=r"no column 'wetter' for the weather.*data.columns.weather"):
        build({"image": "a", "weather": "sunny"}, columns=ColumnsConfig(weather="wetter"))
    renamed = ColumnsConfig(description="scene_description", label="y", weather=None)
    (sample,) = build(
        {"image": "a", "y": 1, "scene_description": "a cone", "weather": "sunny"}, columns=renamed
    )
    assert (sample.label, sample.description, sample.weather) == (1, "a cone", None)


def test_no_rows_and_no_labels_are_errors() -> None:
    with pytest.raises(DataError, match=r"train.csv: has no rows, expected at least one"):
        build()
    with pytest.raises(DataError, match="no row has a label"):
        build({"image": "a"}).labelled()
    assert build({"image": "a"}, {"image": "b", "label": 0}).labelled().ids == ("b",)


def test_arrays_subset_and_pickle() -> None:
    rows = [
        {"image": "a", "label": 1, "latitude": 1.5, "longitude": "2"},
        {"image": "b", "latitude": 3.0},
        {"image": "c", "label": 0, "mask": "c.png"},
    ]
    manifest = build(*rows)
    assert manifest.labels.tolist() == [1, UNLABELLED, 0]
    np.testing.assert_array_equal(manifest.coordinates, [[1.5, 2.0], [math.nan] * 2, [math.nan] * 2])
    assert manifest.has_masks
    assert not manifest.subset([1, 0]).has_masks
    assert manifest.subset(np.array([2, 0])).ids == ("c", "a")
    assert pickle.loads(pickle.dumps(manifest)) == manifest
