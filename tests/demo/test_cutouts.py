import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from roadwork_dist.common.errors import DataError
from roadwork_dist.demo.cutouts import STAMPS, write_cutouts

PHOTOS = ("town/roadsigns/traffic_cone", "vehicles/auto/beetle", "animals/birds/lark", "food/fruit/kiwi")
NOT_TAKEN = (
    "animals/birds/cartoon/chick",
    "animals/bears/toys/teddy",
    "plants/flowers/plastic/rose",
    "vehicles/construction/dumper_mirror",
    "town/roadsigns/stoplight_01_red",
    "symbols/math/plus",
    "vehicles/emergency/sedan_police",
)


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    root = tmp_path / "stamps"
    for i, name in enumerate(PHOTOS + NOT_TAKEN):
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        stamp = Image.new("RGBA", (90, 60), (0, 0, 0, 0))
        ImageDraw.Draw(stamp).ellipse((10, 5, 80, 55), fill=(20 * i, 200, 10, 255))
        stamp.save(path)
    (root / "animals/birds/lark.txt").write_text("A lark.")
    copy = root / "people" / "same_lark.png"
    copy.parent.mkdir()
    copy.write_bytes((root / "animals/birds/lark.png").read_bytes())
    return root


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def test_photographs_are_taken_and_labelled_by_their_folder(stamps: Path, tmp_path: Path) -> None:
    rows = rows_of(write_cutouts(tmp_path / "out", stamps=stamps))
    assert {r["id"]: r["label"] for r in rows} == {
        "town-roadsigns-traffic_cone": "1",
        "vehicles-auto-beetle": "1",
        "animals-birds-lark": "0",
        "food-fruit-kiwi": "0",
    }
    assert {r["kind"] for r in rows} >= {"town/roadsigns", "animals/birds"}


def test_numbered_cut_outs_of_one_thing_are_one_group(stamps: Path, tmp_path: Path) -> None:
    for i, name in enumerate(("people/fireman200b", "military/fireman240a", "vehicles/flight/747")):
        path = stamps / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (90, 60 + i), (0, 0, 255, 255)).save(path)
    groups = {r["id"]: r["group"] for r in rows_of(write_cutouts(tmp_path / "out", stamps=stamps))}
    assert groups["people-fireman200b"] == groups["military-fireman240a"] == "fireman"
    assert groups["vehicles-flight-747"] == "747"
    assert groups["animals-birds-lark"] == "lark"


def test_a_cut_out_stands_on_a_plain_ground(stamps: Path, tmp_path: Path) -> None:
    table = write_cutouts(tmp_path / "out", stamps=stamps, size=128)
    grounds = set()
    for row in rows_of(table):
        with Image.open(table.parent / row["image"]) as photo:
            assert (photo.format, photo.mode, photo.size) == ("JPEG", "RGB", (128, 128))
            pixels = np.asarray(photo).astype(int)
        corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert np.ptp(corners, axis=0).max() <= 6
        cut_out = np.abs(pixels - corners[0]).max(axis=-1) > 40
        assert 0.2 < cut_out.mean() < 0.7
        grounds.add(tuple(corners[0]))
    assert len(grounds) > 1


def test_the_same_stamps_give_the_same_bytes_once(stamps: Path, tmp_path: Path) -> None:
    tables = [write_cutouts(tmp_path / name, stamps=stamps) for name in ("a", "b")]
    first, second = ({p.name: p.read_bytes() for p in t.parent.rglob("*.*") if p.is_file()} for t in tables)
    assert first == second
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")}
    write_cutouts(tmp_path / "a", stamps=stamps)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")} == before
    write_cutouts(tmp_path / "a", stamps=stamps, seed=7)
    assert (tmp_path / "a/images/food-fruit-kiwi.jpg").read_bytes() != first["food-fruit-kiwi.jpg"]


def test_missing_stamps_say_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="apt-get install tuxpaint-stamps-default"):
        write_cutouts(tmp_path / "out", stamps=tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="0 usable cut-outs"):
        write_cutouts(tmp_path / "out", stamps=tmp_path / "empty")


def test_unusable_input_is_named(stamps: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="size is 10"):
        write_cutouts(tmp_path / "out", stamps=stamps, size=10)
    (stamps / "vehicles/auto/beetle.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"beetle\.png cannot be read"):
        write_cutouts(tmp_path / "out", stamps=stamps)


@pytest.mark.skipif(not STAMPS.is_dir(), reason="needs Debian's tuxpaint-stamps-default")
def test_the_real_package_has_enough_of_both_classes(tmp_path: Path) -> None:
    from roadwork_dist.demo.cutouts import _find

    labels = [cutout.label for cutout in _find(STAMPS)]
    assert 25 <= sum(labels) <= 60
    assert labels.count(0) >= 250
