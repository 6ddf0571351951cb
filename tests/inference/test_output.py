"""A file of predictions is complete or does not exist."""

import errno
import json
import os
from pathlib import Path

import pandas as pd
import pytest

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.inference import output
from roadwork_dist.inference.output import FORMATS, PredictionFile
from roadwork_dist.inference.predictor import Prediction


def prediction(number: int) -> Prediction:
    return Prediction(f'a "b", ü/{number}.jpg', number / 100, number % 2, 0.5, float(number), [0.0, 0.25])


@pytest.mark.parametrize("suffix", FORMATS)
def test_rows_come_back_as_they_were(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "ROWS_AT_ONCE", 4)
    path = tmp_path / f"out{suffix}"
    with PredictionFile(path) as file:
        for number in range(10):
            file.add(prediction(number))
            assert not path.exists()
    if suffix == ".csv":
        frame = pd.read_csv(path, converters={"view_gates": json.loads})
    elif suffix == ".jsonl":
        frame = pd.read_json(path, lines=True)
    else:
        frame = pd.read_parquet(path)
    rows = [Prediction(**{**row, "view_gates": list(row["view_gates"])}) for row in frame.to_dict("records")]
    assert rows == [prediction(number) for number in range(10)]


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_exception_leaves_the_older_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"out{suffix}"
    path.write_text("older")

    def interrupted() -> None:
        with PredictionFile(path) as file:
            file.add(prediction(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_full_disk_is_told_and_leaves_nothing(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / f"out{suffix}"
    told = pytest.raises(ConfigError, match=rf"out{suffix} cannot be written \(No space left on device")
    with told, PredictionFile(path) as file:
        file.add(prediction(1))
    assert list(tmp_path.iterdir()) == []
