import json
import pickle
import urllib.request
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco

from roadwork_dist.common.errors import DataError
from roadwork_dist.config.batch import MASK_CLASSES
from roadwork_dist.config.experiment import ColumnsConfig, DataConfig
from roadwork_dist.photos.images import decode
from roadwork_dist.photos.manifest import Manifest
from roadwork_dist.photos.mask_images import decode_mask
from roadwork_dist.sources import load_manifest
from roadwork_dist.sources.huggingface import DatasetImage
from roadwork_dist.sources.roadwork_coco import CATEGORIES


def load(source: object, **options: Any) -> Manifest:
    return load_manifest(str(source), DataConfig(**options), name="train")


def jpeg(shade: int = 90) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (64, 64), (shade,) * 3).save(buffer, "JPEG")
    return buffer.getvalue()


def shade(manifest: Manifest, index: int) -> float:
    return float(decode(manifest[index].image).float().mean())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name, value in (("a", 50), ("b", 200)):
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(value))
    return tmp_path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


TABLE = """id,image,label,latitude,longitude,weather,description
1,a.jpg,1,40.5,-75,sunny,"cones, two"
2,b.jpg,,,null,None,
"""


def test_csv_with_nulls_and_a_byte_order_mark(photos: Path) -> None:
    (photos / "train.csv").write_text(TABLE, encoding="utf-8-sig")
    manifest = load(photos / "train.csv")
    assert manifest.ids == ("1", "2")
    assert manifest.labels.tolist() == [1, -1]
    assert manifest[0].description == "cones, two"
    assert [shade(manifest, i) for i in range(2)] == [50, 200]


def test_csv_with_quotes_of_many_lines_and_windows_line_ends(photos: Path) -> None:
    rows = 'image,label,description\r\na.jpg,1,"a 5"" pipe,\r\nthen cones"\r\n\r\nb.jpg,0,4" wide\r\n'
    (photos / "train.csv").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    manifest = load(photos / "train.csv")
    assert [sample.description for sample in manifest] == ['a 5" pipe,\r\nthen cones', '4" wide']
    assert manifest.labels.tolist() == [1, 0]


def test_csv_with_unnamed_columns(photos: Path) -> None:
    (photos / "train.csv").write_text("image,label,,\na.jpg,1,,\nb.jpg,0,,\n")  # as Excel leaves them
    assert load(photos / "train.csv").labels.tolist() == [1, 0]


def test_parquet_equals_csv_and_a_folder_with_metadata_too(photos: Path) -> None:
    (photos / "metadata.csv").write_text(TABLE)
    from_csv = load(photos)
    frame = pd.DataFrame(
        {
            "id": ["1", "2"],
            "image": ["a.jpg", "b.jpg"],
            "label": [1.0, None],
            "latitude": [40.5, None],
            "longitude": [-75.0, None],
            "weather": ["sunny", None],
            "description": ["cones, two", None],
        }
    )
    frame.to_parquet(photos / "table.parquet")
    assert load(photos / "table.parquet").samples == from_csv.samples
    (photos / "metadata.csv").unlink()
    (photos / "table.parquet").rename(photos / "metadata.parquet")
    assert load(photos).samples == from_csv.samples


def test_image_root(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    table = tmp_path_factory.mktemp("elsewhere") / "train.csv"
    table.write_text(TABLE)
    assert shade(load(table, image_root=str(photos)), 1) == 200
    with pytest.raises(DataError, match="there is no such file"):
        shade(load(table), 1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"id,image\n1,a.jpg,surplus\n", "row 1: has more cells than the header's 2"),
        (b"image\n\xff\xfe\n", "cannot be read .* expected a CSV table in UTF-8"),
        (b"image,label\n", "has no rows"),
        (b"", "has no rows"),
        (b"id;image\n1;a.jpg\n", "has no column 'image'"),
        (
            b'id,image,description\n1,a.jpg,\n2,b.jpg,"closed lane\n3,c.jpg,\n',
            ", row 2 or later: a quote is opened and not closed",
        ),
        (
            b'id,image,description\n1,a.jpg,"closed lane\n2,b.jpg,"cones, two"\n',
            ", row 1 or later: text follows the quote that closes a cell",
        ),
        (
            b'image,description\na.jpg,\nb.jpg,"' + b"x" * 2**17 + b'1"\n',
            ", row 2 or later: a cell has more than 131072 characters",
        ),
        (
            b"image,label,id,label\na.jpg,0,1,1\n",
            ", header: has the column 'label' 2 times, expected it once",
        ),
        (b'image,"label\na.jpg,1\n', ", header: a quote is opened and not closed"),
    ],
)
def test_unusable_csv(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=rf"t\.csv.*{said}") as told:
        load(tmp_path / "t.csv")
    assert "\n" not in str(told.value)


def test_unusable_sources(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="expected a Parquet table"):
        load(tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"nowhere: there is no such file or folder, expected a \.csv"):
        load(tmp_path / "nowhere")
    (tmp_path / "t.txt").touch()
    for path in (tmp_path, tmp_path / "t.txt"):
        (tmp_path / "t.parquet").unlink(missing_ok=True)
        with pytest.raises(DataError, match=r"of an unknown kind, expected a \.csv"):
            load(path)


def hugging_face_set() -> datasets.Dataset:
    """Columns as in the NATIX set: no GPS, no weather."""
    content = {
        "image": [{"bytes": jpeg(50), "path": None}, {"bytes": jpeg(200), "path": "x.jpg"}],
        "label": [0, 1],
        "scene_description": ["a street", None],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["None", "Roadwork"]),
            "scene_description": datasets.Value("string"),
        }
    )
    return datasets.Dataset.from_dict(content, features=features)


NATIX = {"columns": ColumnsConfig(description="scene_description")}


def check_natix(manifest: Manifest) -> None:
    assert manifest.labels.tolist() == [0, 1]
    assert [sample.description for sample in manifest] == ["a street", None]
    assert np.isnan(manifest.coordinates).all()
    assert not manifest.has_masks
    copy = pickle.loads(pickle.dumps(manifest))  # as it travels to loader workers
    assert [shade(copy, i) for i in range(2)] == [50, 200]


def test_data_set_saved_to_disk(tmp_path: Path) -> None:
    hugging_face_set().save_to_disk(tmp_path / "set")
    check_natix(load(tmp_path / "set", **NATIX))
    shuffled = hugging_face_set().select([1, 0])
    shuffled.save_to_disk(tmp_path / "shuffled")
    assert shade(load(tmp_path / "shuffled", **NATIX), 0) == 200


def test_a_format_that_was_saved_with_the_set_is_left_out(tmp_path: Path) -> None:
    formatted = hugging_face_set()
    formatted.set_format("torch", columns=["label"])
    formatted.save_to_disk(tmp_path / "set")
    check_natix(load(tmp_path / "set", **NATIX))


def classes(label: list[str], **others: list[str]) -> datasets.Dataset:
    """The set with other names of its labels, and further columns of names."""
    cells = {column: [len(names) - 1, -1] for column, names in others.items()}
    features = {column: datasets.ClassLabel(names=names) for column, names in others.items()}
    own = hugging_face_set().cast_column("label", datasets.ClassLabel(names=label))
    return own.from_dict(own.to_dict() | cells, features=datasets.Features(own.features | features))


def test_names_of_metadata_are_read_for_their_numbers(tmp_path: Path, photos: Path) -> None:
    named = classes(["0", "1"], weather=["sunny", "rainy"], daytime=["day", "none"])
    named.save_to_disk(tmp_path / "set")
    paths = named.remove_columns("image").add_column("image", ["a.jpg", "b.jpg"])
    paths.to_parquet(photos / "paths.parquet")
    for source in (tmp_path / "set", photos / "paths.parquet"):
        manifest = load(source, **NATIX)
        check_natix(manifest)
        assert [sample.weather for sample in manifest] == ["rainy", None]
        assert [sample.daytime for sample in manifest] == [None, None]


@pytest.mark.parametrize(
    "names",
    [
        ["Roadwork", "None"],
        ["WorkZone", "other"],
        ["under construction", "NoConstruction"],
        ["yes", "0"],
        ["1", "0"],
        ["street", "background"],
        ["label_true", "label_false"],
        ["roadworks", "free", "closed"],
    ],
)
def test_labels_whose_names_say_the_opposite_are_refused(names: list[str], tmp_path: Path) -> None:
    labels = classes(names)
    labels.save_to_disk(tmp_path / "set")
    labels.to_parquet(tmp_path / "one.parquet")
    for source in ("set", "one.parquet"):
        with pytest.raises(DataError, match=rf"the column 'label' has 0 = '{names[0]}'.*expected 1 to mean"):
            load(tmp_path / source, **NATIX)


@pytest.mark.parametrize(
    "names",
    [
        ["None", "Roadwork"],
        ["No roadwork", "Present"],
        ["noroadwork", "roadwork"],
        ["normal", "clear"],
        ["0", "1"],
        ["nothing", "works"],
        ["not under construction", "under construction"],
        ["roadwork absent", "roadwork present"],
    ],
)
def test_names_of_labels_that_may_be_right(
    names: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "roadwork_dist")
    classes(names).save_to_disk(tmp_path / "set")
    check_natix(load(tmp_path / "set", **NATIX))
    assert f"label: 0 = '{names[0]}', 1 = '{names[1]}'" in caplog.text


def test_splits_of_a_data_set_on_disk(tmp_path: Path) -> None:
    both = datasets.DatasetDict(train=hugging_face_set(), test=hugging_face_set().select([1]))
    both.save_to_disk(tmp_path / "set")
    check_natix(load(f"{tmp_path / 'set'}:train", **NATIX))
    assert len(load(f"{tmp_path / 'set'}:test", **NATIX)) == 1
    for source in (tmp_path / "set", f"{tmp_path / 'set'}:val"):
        with pytest.raises(DataError, match="has the splits train, test, expected one of them"):
            load(source, **NATIX)


def test_parquet_shards_and_one_parquet_file_with_photos(tmp_path: Path) -> None:
    for index in range(2):
        shard = tmp_path / "set" / "data" / f"train-{index:05d}-of-00002.parquet"
        shard.parent.mkdir(parents=True, exist_ok=True)
        hugging_face_set().select([index]).to_parquet(shard)
    check_natix(load(tmp_path / "set", **NATIX))
    hugging_face_set().to_parquet(tmp_path / "one.parquet")
    manifest = load(tmp_path / "one.parquet", **NATIX)
    check_natix(manifest)
    assert isinstance(manifest[0].image, DatasetImage)  # the photos stay on disk


def test_paths_and_null_photos_in_a_data_set(photos: Path, tmp_path: Path) -> None:
    paths = datasets.Dataset.from_dict({"image": ["a.jpg", "b.jpg"], "label": [0, 1]})
    paths.save_to_disk(photos / "set")
    assert shade(load(photos / "set", image_root=str(photos)), 1) == 200
    content = {"image": [{"bytes": jpeg(), "path": None}, None]}
    holes = datasets.Dataset.from_dict(content, features=datasets.Features({"image": datasets.Image()}))
    holes.save_to_disk(tmp_path / "holes")
    with pytest.raises(DataError, match=r"holes, row 2: image is null"):
        load(tmp_path / "holes")


def test_hub_id_is_loaded_by_split_and_failures_are_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_hub(repository: str, *, split: str) -> datasets.Dataset:
        if repository != "owner/name" or split != "train":
            raise ConnectionError("Couldn't reach the\nhub")
        return hugging_face_set()

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    check_natix(load("hf:owner/name:train", **NATIX))
    with pytest.raises(
        DataError, match=r"^hf:owner/other:train: cannot be loaded \(ConnectionError: Couldn't reach"
    ) as e:
        load("hf:owner/other:train")
    assert "\n" not in str(e.value)
    assert "hf auth login" in str(e.value)
    for source in ("hf:owner/name", "hf:name:train"):
        with pytest.raises(DataError, match="expected hf:owner/name:split"):
            load(source)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    def offline() -> list[bool]:
        return [constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE]

    asked: list[str] = []
    modes: list[bool] = []

    def no_network(request: urllib.request.Request, **_: Any) -> None:
        asked.append(request.full_url)
        raise OSError("no network in this test")

    def from_cache(*_: Any, **__: Any) -> None:
        modes.extend(offline())
        raise ConnectionError

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(datasets, "load_dataset", from_cache)
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    with pytest.raises(DataError, match=r"^hf:owner/absent:train: cannot be loaded"):
        load("hf:owner/absent:train")
    assert len(asked) == 1
    assert modes == [True, True]  # the client repeats nothing
    assert offline() == [False, False]


def coco_content() -> dict[str, Any]:
    """Five photos of 80 x 64: a cone and an overlapping worker, RLE, a road, nothing, a police officer."""
    names = list(CATEGORIES)
    number = {name: index for index, name in enumerate(names)}
    square = [8.0, 8.0, 40.0, 8.0, 40.0, 32.0, 8.0, 32.0]
    plane = np.zeros((64, 80), np.uint8)
    plane[16:32, 20:60] = 1
    compressed = coco.encode(np.asfortranarray(plane))
    flat = plane.T.ravel().astype(int)  # COCO counts down the columns
    runs = np.diff([0, *np.flatnonzero(np.diff(flat)) + 1, len(flat)])

    def annotation(image: int, category: str, segmentation: Any) -> dict[str, Any]:
        return {
            "image_id": image,
            "category_id": number[category],
            "segmentation": segmentation,
            "iscrowd": 0,
        }

    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 80, "height": 64} for i in range(5)],
        "categories": [{"id": index, "name": name} for name, index in number.items()],
        "annotations": [
            annotation(0, "Cone", [square]),
            annotation(0, "Worker", [[*square[:4], 40.0, 60.0, 8.0, 60.0], square]),
            annotation(1, "Drum", {"size": [64, 80], "counts": compressed["counts"].decode()}),
            annotation(1, "Arrow Board", {"size": [64, 80], "counts": [int(n) for n in runs]}),
            annotation(2, "Road", [square]),
            annotation(4, "Police Officer", [square]),
        ],
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    def write_json(content: dict[str, Any]) -> Path:
        path = tmp_path / "instances.json"
        path.write_text(json.dumps(content))
        return path

    return write_json


def test_coco_labels_and_masks(write: Callable[[dict[str, Any]], Path]) -> None:
    manifest = load(write(coco_content()))
    assert manifest.labels.tolist() == [1, 1, 0, 0, 0]
    masks = [pickle.loads(pickle.dumps(sample.mask)).bits() for sample in manifest]
    assert all(bits.shape == (64, 80) and bits.dtype == np.uint8 for bits in masks)
    drawn = Image.new("L", (80, 64))
    ImageDraw.Draw(drawn).rectangle((8, 8, 39, 31), fill=1)
    cone, worker = (masks[0] >> MASK_CLASSES.index(name) & 1 for name in ("cone", "worker"))
    np.testing.assert_array_equal(cone, np.asarray(drawn))
    assert (worker >= cone).all()
    assert worker[50, 20] == 1
    assert cone[50, 20] == 0
    expected = np.zeros((64, 80), np.uint8)
    expected[16:32, 20:60] = 1 << MASK_CLASSES.index("cone") | 1 << MASK_CLASSES.index("sign")
    np.testing.assert_array_equal(masks[1], expected)  # compressed and uncompressed RLE
    assert not any(bits.any() for bits in masks[2:])
    assert decode_mask(manifest[0].mask).shape == (6, 64, 64)  # type: ignore[arg-type]


def test_masks_are_kept_under_what_they_show(write: Callable[[dict[str, Any]], Path], tmp_path: Path) -> None:
    content = coco_content()
    names = [sample.mask.content() for sample in load(write(content)) if sample.mask is not None]
    assert len(set(names)) == 3  # two with masks, three empty ones
    # Nothing of this package is in the names: a class that moves must not lose what is kept.
    assert not any(b"roadwork" in name for name in names)
    content["images"][0]["file_name"] = "renamed.jpg"
    content["annotations"][0]["segmentation"][0][0] = 9.0
    changed = [sample.mask.content() for sample in load(write(content)) if sample.mask is not None]
    assert [before == after for before, after in zip(names, changed, strict=True)] == [False] + [True] * 4


def test_every_category_has_the_label_and_class_of_the_table(write: Callable[[dict[str, Any]], Path]) -> None:
    assert len(CATEGORIES) == 19
    content = coco_content()
    base = content["annotations"][0]
    for category in content["categories"]:
        content["annotations"] = [{**base, "category_id": category["id"]}]
        manifest = load(write(content))
        target = CATEGORIES[category["name"]]
        assert manifest.labels[0] == int(target is not None)
        if target is not None:
            assert manifest[0].mask is not None
            assert manifest[0].mask.bits().max() == 1 << MASK_CLASSES.index(target)


def test_boxes_without_segmentation_give_labels_but_no_mask(write: Callable[[dict[str, Any]], Path]) -> None:
    content = coco_content()
    content["annotations"][0]["segmentation"] = []
    manifest = load(write(content))
    assert manifest[0].label == 1
    assert manifest[0].mask is None
    assert manifest[2].mask is not None  # no roadwork: an empty mask is the truth
    for annotation in content["annotations"]:
        annotation.pop("segmentation")
    assert not load(write(content)).has_masks


def test_coco_metadata_kinds_and_image_folder(
    write: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    content = coco_content()
    content["images"][0] |= {"weather": "Sunny", "latitude": 40.44, "longitude": -80.0}
    content["categories"][0]["name"] = "Temporary Traffic Control Sign: road closed"
    path = write(content)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.jpg").write_bytes(jpeg(50))
    manifest = load(path)
    assert (manifest[0].weather, manifest[0].latitude, manifest[1].weather) == ("sunny", 40.44, None)
    assert manifest[0].mask is not None
    assert manifest[0].mask.bits().max() & 1 << MASK_CLASSES.index("sign")
    assert shade(manifest, 0) == 50


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("images"), "not a usable COCO JSON"),
        (lambda c: c["annotations"][0].update(category_id=99), "not a usable COCO JSON"),
        (lambda c: c["images"][0].pop("width"), "not a usable COCO JSON"),
        (lambda c: c["images"][0].update(width=10**6), "listed with 1000000x64 px"),
        (lambda c: c["images"].clear(), "has no rows"),
        (
            lambda c: c.update(categories=[{"id": 0, "name": "zebra"}]),
            "none of ROADWork's categories, only zebra",
        ),
        (lambda c: c["images"][1].update(id=0), "row 2: id '0' is also the id of row 1"),
    ],
)
def test_unusable_coco(
    write: Callable[[dict[str, Any]], Path], change: Callable[[dict[str, Any]], object], said: str
) -> None:
    content = coco_content()
    change(content)
    with pytest.raises(DataError, match=said):
        load(write(content), max_pixels=10**6)


def test_unusable_json_and_segmentation(write: Callable[[dict[str, Any]], Path], tmp_path: Path) -> None:
    for text in ("{", "[1]"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(DataError, match="expected a COCO JSON"):
            load(tmp_path / "x.json")
    content = coco_content()
    content["annotations"][2]["segmentation"]["size"] = [80, 64]
    mask = load(write(content))[1].mask
    assert mask is not None
    with pytest.raises(
        DataError,
        match=r"mask of 1\.jpg: a segmentation cannot be drawn .RLE of size .80, 64.*expected polygons",
    ):
        mask.bits()
