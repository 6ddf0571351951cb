"""Which photo the report shows if data sets share ids."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from PIL import Image

from roadwork_dist.common.errors import DataError
from roadwork_dist.config.experiment import DataConfig, ExperimentConfig, ViewsConfig
from roadwork_dist.photos.photo import PhotoViews
from roadwork_dist.photos.views import ViewGeometry
from roadwork_dist.recipes.pictures import PicturesOfRun
from roadwork_dist.recipes.pretrain import ViewsById
from roadwork_dist.sources import load_manifest

SHADES = {"train": 40, "val": 120, "target": 200}


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """One photo ``1`` of its own shade in each of three tables."""
    for name, shade in SHADES.items():
        Image.new("RGB", (64, 64), (shade,) * 3).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.csv").write_text(f"id,image,label\n1,{name}.png,1\n")
    tables = {name: str(tmp_path / f"{name}.csv") for name in SHADES}
    return DataConfig(**tables)


def pictures_of(data: DataConfig) -> PicturesOfRun:
    return PicturesOfRun(ExperimentConfig(data=data), ViewsConfig(size=64, policy="global"))


def shade(views: Any) -> int:
    return int(views.mean().round())


def test_the_report_of_a_run_shows_the_photo_of_the_split(data: DataConfig) -> None:
    pictures = pictures_of(data)
    assert {split: shade(pictures(split, "1")) for split in ("val", "target")} == {"val": 120, "target": 200}
    for split, sample_id in (("val", "2"), ("out-of-fold", "1")):
        with pytest.raises(DataError, match="is not in the run's sources"):
            pictures(split, sample_id)


def test_photos_held_out_of_the_training_source_are_found_there(data: DataConfig) -> None:
    pictures = pictures_of(replace(data, val=None))
    assert shade(pictures("val", "1")) == shade(pictures("out-of-fold", "1")) == SHADES["train"]
    assert shade(pictures("target", "1")) == SHADES["target"]


def test_a_finished_run_shows_the_photo_of_the_split(data: DataConfig) -> None:
    views = PhotoViews(ViewGeometry(64, policy="global"))
    datasets = {
        name: SimpleNamespace(views=views, manifest=load_manifest(str(getattr(data, name)), data, name=name))
        for name in ("val", "target")
    }
    views_of = ViewsById(cast(Any, datasets))
    assert {split: shade(views_of(split, "1")) for split in datasets} == {"val": 120, "target": 200}
