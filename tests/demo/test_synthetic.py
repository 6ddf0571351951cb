import csv
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from roadwork_dist.common.errors import DataError
from roadwork_dist.config.batch import DAYTIME, MASK_CLASSES, SCENE, WEATHER
from roadwork_dist.demo.synthetic import SyntheticSet, layout, ordinary, render, write_synthetic
from roadwork_dist.demo.synthetic.machines import ROADWORK
from roadwork_dist.demo.synthetic.metadata import SPLITS, distance_km, photo_facts, target_cities
from roadwork_dist.demo.synthetic.objects import cone
from roadwork_dist.demo.synthetic.sprite import Canvas
from roadwork_dist.demo.synthetic.view import View, light_for

SIZE = (256, 192)
SMALL = {
    "seed": 42,
    "n_train": 12,
    "n_val": 6,
    "n_target": 6,
    "n_large": 4,
    "size": SIZE,
    "large_size": (320, 240),
}


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SyntheticSet:
    return write_synthetic(tmp_path_factory.mktemp("small"), workers=1, **SMALL)


def test_splits_are_tables_of_balanced_labels_and_relative_paths(small: SyntheticSet) -> None:
    assert small.rendered == 24
    ids = []
    for table, count in ((small.train, 12), (small.val, 6), (small.target, 6)):
        rows = rows_of(table)
        assert [r["label"] for r in rows].count("1") == count // 2
        assert all((small.folder / r["image"]).exists() and (small.folder / r["mask"]).exists() for r in rows)
        ids += [r["id"] for r in rows]
        fields = ["latitude", "longitude", "weather", "daytime", "scene", "description"]
        assert list(rows[0]) == ["id", "image", "label", *fields, "mask"]
    assert len(set(ids)) == 24


def test_n_large_photos_are_large(small: SyntheticSet) -> None:
    sizes = []
    for path in sorted((small.folder / "images").iterdir()):
        with Image.open(path) as photo:
            sizes.append(tuple(sorted(photo.size, reverse=True)))
    assert sizes.count((320, 240)) == 4
    assert sizes.count(SIZE) == 20


def test_masks_fit_the_upright_photo_and_are_empty_without_roadwork(small: SyntheticSet) -> None:
    seen = 0
    for row in itertools.chain(*(rows_of(t) for t in (small.train, small.val, small.target))):
        with Image.open(small.folder / row["image"]) as photo, Image.open(small.folder / row["mask"]) as mask:
            assert mask.mode == "L"
            assert mask.size == ImageOps.exif_transpose(photo).size
            bits = np.bitwise_or.reduce(np.asarray(mask), axis=None)
        assert bool(bits) == (row["label"] == "1")
        seen |= int(bits)
    assert seen < 1 << len(MASK_CLASSES)
    assert seen & 1
    assert seen.bit_count() >= 4


def test_exif_tells_model_date_and_the_place_unless_the_row_hides_it(small: SyntheticSet) -> None:
    turned = 0
    rows = rows_of(small.train) + rows_of(small.val) + rows_of(small.target)
    for row in rows:
        with Image.open(small.folder / row["image"]) as photo:
            exif = photo.getexif()
        assert exif[0x0110] == "synthetic"
        assert len(exif[0x0132]) == 19
        turned += exif.get(0x0112, 1) != 1
        gps = exif.get_ifd(0x8825)
        assert bool(gps) == (row["latitude"] != "")
        if gps:
            degrees, minutes, seconds = (float(v) for v in gps[2])
            latitude = (degrees + minutes / 60 + seconds / 3600) * (1 if gps[1] == "N" else -1)
            assert latitude == pytest.approx(float(row["latitude"]), abs=1e-5)
    assert turned > 0
    assert turned < len(rows) / 3


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_stored_pixels_are_turned_as_exif_says(orientation: int, tmp_path: Path) -> None:
    facts = dataclasses.replace(photo_facts(1, "train", 0), orientation=orientation)
    picture = render.render(facts, 1, SIZE)
    path = tmp_path / "photo.jpg"
    path.write_bytes(render.photo_bytes(picture, facts))
    with Image.open(path) as stored:
        assert (stored.size == SIZE) == (orientation in (1, 3))
        upright = np.asarray(ImageOps.exif_transpose(stored)).astype(float)
    assert np.abs(upright - np.asarray(picture.photo)).mean() < 6.0


def test_worker_processes_write_the_same_bytes(small: SyntheticSet, tmp_path: Path) -> None:
    counted: list[tuple[int, int]] = []
    again = write_synthetic(
        tmp_path / "set", workers=2, progress=lambda done, total: counted.append((done, total)), **SMALL
    )
    assert content(again.folder) == content(small.folder)
    assert counted == [(i + 1, 24) for i in range(24)]


def test_another_seed_gives_other_photos() -> None:
    photos = [np.asarray(render.render(photo_facts(s, "val", 0), s, (64, 64)).photo) for s in (1, 2)]
    assert np.abs(photos[0].astype(float) - photos[1]).mean() > 5


def test_a_complete_set_is_not_rendered_again(small: SyntheticSet) -> None:
    before = {p: p.stat().st_mtime_ns for p in small.folder.rglob("*")}
    assert write_synthetic(small.folder, **SMALL).rendered == 0
    assert {p: p.stat().st_mtime_ns for p in small.folder.rglob("*")} == before


def test_a_stopped_run_goes_on_and_ends_the_same(small: SyntheticSet, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 7:
            raise Stopped

    out = tmp_path / "set"
    with pytest.raises(Stopped):
        write_synthetic(out, workers=1, progress=stop, **SMALL)
    assert not (out / "synthetic.json").exists()
    (out / "images" / ".train-00001.jpg.999.tmp").write_bytes(b"half a photo")
    assert write_synthetic(out, workers=1, **SMALL).rendered == 24 - 7
    assert content(out) == content(small.folder)


def test_a_folder_of_other_parameters_is_refused(small: SyntheticSet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="seed 42 instead of 43"):
        write_synthetic(small.folder, **(SMALL | {"seed": 43}))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="not of this set"):
        write_synthetic(tmp_path, **SMALL)
    (tmp_path / "synthetic.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        write_synthetic(tmp_path, **SMALL)


@pytest.mark.parametrize(
    "wrong", [{"n_train": -1}, {"n_large": 99}, {"size": (192, 256)}, {"large_size": (60, 40)}]
)
def test_impossible_numbers_are_refused(wrong: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected"):
        write_synthetic(tmp_path, **(SMALL | wrong))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_the_marker_says_synthetic(small: SyntheticSet) -> None:
    assert json.loads((small.folder / "synthetic.json").read_text())["synthetic"] is True


def plain_view(width: int = 800, height: int = 600) -> View:
    return View(width, height, focal=0.7 * width, centre=width / 2, horizon=0.45 * height, eye=1.5, bend=0.0)


DRAWERS = [(name, draw) for name, drawers in ROADWORK.items() for draw in drawers]


@pytest.mark.parametrize(("name", "draw"), DRAWERS, ids=[d.__name__ for _, d in DRAWERS])
def test_a_mask_is_exactly_where_the_object_is_seen(
    name: str, draw: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "_shadow", lambda *_: None)
    light = light_for("day", "clear", np.random.default_rng(0))
    photos, mask = [], Image.new("L", (800, 600))
    for ground in (0, 255):  # a pixel that the object covers by half or more changes by less than half
        photo, mask = Image.new("RGB", (800, 600), (ground,) * 3), Image.new("L", (800, 600))
        thing = layout.Thing(draw, 0.0, 12.0, MASK_CLASSES.index(name))  # type: ignore[arg-type]
        render._place(photo, mask, thing, plain_view(), light, np.random.default_rng(3))
        photos.append(np.asarray(photo).astype(int))
    covered = (photos[1] - photos[0]).max(axis=-1) < 128
    assert covered.sum() > 100
    bit = 1 << MASK_CLASSES.index(name)
    np.testing.assert_array_equal(np.asarray(mask), np.where(covered, bit, 0))


def test_what_stands_in_front_hides_the_mask_behind() -> None:
    light, view = light_for("day", "clear", np.random.default_rng(0)), plain_view()
    photo, mask = Image.new("RGB", (800, 600)), Image.new("L", (800, 600))
    far = layout.Thing(cone, 0.0, 30.0, MASK_CLASSES.index("cone"))
    near = layout.Thing(ordinary.van, 0.0, 10.0)
    sign = layout.Thing(ROADWORK["sign"][0], 0.0, 8.0, MASK_CLASSES.index("sign"))
    for thing, values in ((far, {0, 1}), (near, {0}), (sign, {0, 4})):
        render._place(photo, mask, thing, view, light, np.random.default_rng(1))
        assert set(np.unique(np.asarray(mask)).tolist()) == values


def test_objects_are_arranged_from_far_to_near_and_far_cones_are_tiny() -> None:
    heights = []
    for number in range(300):
        rng = np.random.default_rng(number)
        things = layout.arrange(rng, layout_street(), label=1)
        assert [t.z for t in things] == sorted((t.z for t in things), reverse=True)
        work = [t for t in things if t.mask_class >= 0]
        if min(t.z for t in work) > 45:
            scale = plain_view(4032, 3024).scale(max(t.z for t in work))
            canvas = cone(rng, lambda w, h: Canvas(w, h, scale))  # noqa: B023
            heights.append(canvas.height * scale)
    assert 3 <= len(heights) <= 40  # a few of the positives
    assert 20 < np.mean(heights) < 30  # px in a photo of 4032


def layout_street():  # type: ignore[no-untyped-def]
    from roadwork_dist.demo.synthetic.street import random_street

    return random_street(np.random.default_rng(0), "urban", dry=False)


@pytest.mark.parametrize("scale", [0.4, 3.0, 2500.0])
def test_every_object_draws_at_any_distance(scale: float) -> None:
    hard = [draw for draw, _ in ordinary.HARD_NEGATIVES]
    for draw in [d for _, d in DRAWERS] + hard + [ordinary.tree, ordinary.car, ordinary.lamp_post]:
        canvas = draw(np.random.default_rng(0), lambda w, h: Canvas(w, h, scale))
        assert max(canvas.size) <= 1101


def shown(number: int, **change: str) -> np.ndarray:
    """A small photo of the same place under other circumstances."""
    usual = {"weather": "clear", "daytime": "day", "scene": "urban"}
    facts = dataclasses.replace(photo_facts(5, "train", number), **(usual | change))
    return np.asarray(render.render(facts, 5, (128, 96)).photo).astype(float)


@pytest.mark.parametrize(("name", "words"), [("weather", WEATHER), ("daytime", DAYTIME), ("scene", SCENE)])
def test_every_word_of_the_vocabulary_changes_the_picture(name: str, words: tuple[str, ...]) -> None:
    for a, b in itertools.combinations([shown(0, **{name: word}) for word in words], 2):
        assert np.abs(a - b).mean() > 2.0


def test_night_is_dark_snow_is_white_and_fog_hides_the_distance() -> None:
    ground = slice(64, None), slice(None)
    distance = slice(38, 50), slice(48, 80)
    for number in range(4):
        assert shown(number, daytime="night").mean() < 0.65 * shown(number).mean()
        snow, grey = (shown(number, weather=w)[ground].mean() for w in ("snowy", "overcast"))
        assert snow > grey
    fog, clear = (sum(shown(n, weather=w)[distance].std() for n in range(8)) for w in ("foggy", "clear"))
    assert fog < 0.8 * clear


def test_facts_are_null_in_any_mix_and_six_in_ten() -> None:
    facts = [photo_facts(42, "train", n) for n in range(300)]
    fields = ("gps", "weather", "daytime", "scene", "description")
    share = sum(len(f.null) for f in facts) / (len(facts) * len(fields))
    assert share == pytest.approx(0.6, abs=0.03)
    assert len({f.null for f in facts}) >= 24  # of 32 mixes
    assert frozenset(fields) in {f.null for f in facts}
    assert {f.weather for f in facts} == set(WEATHER)
    assert {f.daytime for f in facts} == set(DAYTIME)
    assert {f.scene for f in facts} == set(SCENE)


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_the_target_lies_around_five_cities_that_weights_can_reach(seed: int) -> None:
    cities = target_cities(seed)
    assert len(cities) == 5
    lats, lons = (np.array(v) for v in zip(*cities, strict=True))
    for i, city in enumerate(cities):
        assert np.delete(distance_km(*city, lats, lons), i).min() > 800

    def nearest(split: str, count: int) -> np.ndarray:
        facts = [photo_facts(seed, split, n) for n in range(count)]
        return np.array(
            [
                np.nan if "gps" in f.null else distance_km(f.latitude, f.longitude, lats, lons).min()
                for f in facts
            ]
        )

    assert np.nanmax(nearest("target", 40)) < 26
    for count in (24, 264):
        d = nearest("train", count)
        assert np.mean(d < 50) < 0.35  # a minority, so there is something to correct
        share = {}
        for near_weight in (5.0, 10.0):
            weight = np.select([np.isnan(d), d < 50, d < 200, d < 500], [1.0, near_weight, 2.5, 1.0], 0.3)
            share[near_weight] = weight[d < 100].sum() / weight.sum()
        assert share[10.0] >= 0.7


def test_distance_is_the_great_circle() -> None:
    new_york, los_angeles = (40.7128, -74.0060), (34.0522, -118.2437)
    km = distance_km(*new_york, np.array([los_angeles[0]]), np.array([los_angeles[1]]))
    assert km[0] == pytest.approx(3936, rel=0.002)


def test_a_description_does_not_give_the_label_away() -> None:
    said: dict[str, set[int]] = {}
    for number in range(1500):
        facts = photo_facts(3, "train", number)
        for part in facts.description.lower().rstrip(".").split(", "):
            said.setdefault(part.split(" at ")[0], set()).add(facts.label)
    assert len(said) > 15
    assert all(labels == {0, 1} for labels in said.values())


def test_labels_are_balanced_in_no_order() -> None:
    for split in SPLITS:
        labels = [photo_facts(9, split, n).label for n in range(100)]
        assert sum(labels) == 50
        assert len(set(zip(labels[::2], labels[1::2], strict=True))) == 2


def test_the_amount_of_orange_does_not_decide() -> None:
    amount, labels = [], []
    for number in range(80):
        facts = photo_facts(42, "train", number)
        hue, saturation, value = render.render(facts, 42, (128, 96)).photo.convert("HSV").split()
        h, s, v = (np.asarray(band).astype(int) for band in (hue, saturation, value))
        amount.append(((h > 4) & (h < 27) & (s > 130) & (v > 110)).mean())
        labels.append(facts.label)
    positive, negative = (np.array(amount)[np.array(labels) == k] for k in (1, 0))
    area_under_curve = (positive[:, None] > negative[None]).mean()
    assert 0.3 < area_under_curve < 0.72
