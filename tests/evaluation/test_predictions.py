import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support.synthetic_run import synthetic_predictions

from roadwork_dist.common.errors import DataError
from roadwork_dist.evaluation.predictions import (
    COLUMNS,
    REQUIRED,
    as_predictions,
    read_predictions,
    write_predictions,
)

ROW: dict[str, Any] = {
    "id": "a.jpg",
    "split": "val",
    "label": 1,
    "logit_0": -1.0,
    "logit_1": 1.0,
    "probability": 0.88,
    "view_gates": [0.5, 0.0],
    "latitude": 41.9,
    "longitude": -87.6,
    "weather": "sunny",
    "width": 4032,
    "height": 3024,
}


def test_round_trip_keeps_values_nulls_and_the_word_synthetic(tmp_path: Path) -> None:
    bare = {
        "id": "b.jpg",
        "split": "target",
        "label": None,
        "logit_0": 0.0,
        "logit_1": 0.0,
        "probability": 0.5,
    }
    write_predictions(tmp_path / "p.parquet", [ROW, bare], synthetic=True)
    frame = read_predictions(tmp_path / "p.parquet")
    assert tuple(frame.columns) == COLUMNS
    assert frame.attrs["synthetic"] is True
    assert frame["label"].tolist() == [1, pd.NA]
    assert frame["view_gates"].iloc[0].tolist() == [0.5, 0.0]
    assert frame["view_gates"].iloc[1] is None
    assert frame["weather"].tolist() == ["sunny", None]
    assert frame["scene"].tolist() == [None, None]
    assert frame["width"].tolist() == [4032, pd.NA]
    assert math.isnan(frame["latitude"].iloc[1])
    assert frame["probability"].iloc[0] == 0.88


def test_photos_are_real_unless_said(tmp_path: Path) -> None:
    write_predictions(tmp_path / "p.parquet", [ROW])
    assert read_predictions(tmp_path / "p.parquet").attrs["synthetic"] is False


def test_no_rows_are_a_file_too(tmp_path: Path) -> None:
    write_predictions(tmp_path / "p.parquet", [])
    assert len(read_predictions(tmp_path / "p.parquet")) == 0


@pytest.mark.parametrize("name", REQUIRED)
def test_a_row_without_a_required_column_is_refused(name: str, tmp_path: Path) -> None:
    row = {key: value for key, value in ROW.items() if key != name}
    with pytest.raises(DataError, match=f"prediction 0 .* lacks {name}"):
        write_predictions(tmp_path / "p.parquet", [row])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": 2}, "label 2, expected 0, 1 or null"),
        ({"wether": "sunny"}, "unknown columns wether"),
        ({"probability": "high"}, "p.parquet"),
        ({"id": None}, r"prediction 0 \(id None\).* expected id and split as strings"),
    ],
)
def test_wrong_rows_are_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        write_predictions(tmp_path / "p.parquet", [{**ROW, **change}])


def test_a_file_without_a_column_names_it(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pd.DataFrame([ROW]).drop(columns=["probability"]).to_parquet(path)
    with pytest.raises(DataError, match=r"p\.parquet lacks the columns probability"):
        read_predictions(path)


def test_an_absent_and_a_broken_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_predictions(tmp_path / "p.parquet")
    (tmp_path / "p.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_predictions(tmp_path / "p.parquet")


@pytest.mark.parametrize(("column", "wrong"), [("probability", 1.5), ("label", 3)])
def test_wrong_values_of_a_frame_name_the_row(column: str, wrong: float) -> None:
    frame = synthetic_predictions(4)
    frame.loc[2, column] = wrong
    with pytest.raises(DataError, match=rf"row 2 \(id 'val/00002.jpg'\): {column} is"):
        as_predictions(frame)


def test_a_probability_of_nan_is_kept() -> None:
    frame = synthetic_predictions(3)
    frame.loc[1, "probability"] = np.nan
    assert as_predictions(frame)["probability"].isna().tolist() == [False, True, False]


def test_words_for_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="column latitude does not hold numbers"):
        as_predictions(pd.DataFrame([{**ROW, "latitude": "north"}]))
