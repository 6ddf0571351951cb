import json
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from roadwork_dist.common.errors import BackboneError
from roadwork_dist.config.experiment import AugmentConfig
from roadwork_dist.features.content_hashes import INDEX_NAME, content_hashes
from roadwork_dist.features.extract import Extraction, _share_of, extract
from roadwork_dist.features.store import FeatureSpace, FeatureStore
from roadwork_dist.features.store.index import concatenate
from roadwork_dist.photos.augment import Augmenter
from roadwork_dist.photos.images import BytesImage, FileImage
from roadwork_dist.photos.manifest import Sample
from roadwork_dist.photos.photo import PhotoViews
from roadwork_dist.photos.views import ViewGeometry

SIDE = 48
GEOMETRY = ViewGeometry(SIDE)
SPACE = FeatureSpace(GEOMETRY.identity(), None, "tiny conv", "fp32")


def jpeg(seed: int, size: tuple[int, int] = (120, 90)) -> bytes:
    """A synthetic photo: smooth random colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def samples_in(folder: Path, count: int = 5) -> list[Sample]:
    """Photos on disk; every third is too small for more than the global view."""
    samples = []
    for k in range(count):
        path = folder / f"{k}.jpg"
        path.write_bytes(jpeg(k, (70, 64) if k % 3 == 2 else (120, 90)))
        samples.append(Sample(f"s{k}", FileImage(path)))
    return samples


class TinyEncoder:
    """A small convolution, as an encoder that counts what it is given."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 8, 5, stride=3)
        self.shapes: list[tuple[int, ...]] = []

    @torch.no_grad()
    def __call__(self, views: Tensor) -> Tensor:
        self.shapes.append(tuple(views.shape))
        return self.conv(views.float() / 255).relu().mean((2, 3))  # type: ignore[no-any-return]


@pytest.fixture
def plain() -> PhotoViews:
    return PhotoViews(GEOMETRY)


@pytest.fixture
def augmenting() -> PhotoViews:
    return PhotoViews(GEOMETRY, Augmenter(AugmentConfig(copies=2), 5))


def space_of(views: PhotoViews) -> FeatureSpace:
    augment = None if views.augmenter is None else views.augmenter.identity()
    return FeatureSpace(views.geometry.identity(), augment, "tiny conv", "fp32")


def run(
    samples: list[Sample], views: PhotoViews, root: Path, encode: TinyEncoder, **options: object
) -> Extraction:
    store = FeatureStore(root, space_of(views))
    hashes = content_hashes([s.image for s in samples], root)
    return extract(samples, hashes, views=views, store=store, encode=encode, batch_views=8, **options)  # type: ignore[arg-type]


def contents(root: Path) -> dict[tuple[int, int], tuple[int, bytes]]:
    """Every entry of the only space of a store: views and bytes by key."""
    (manifest,) = root.glob("*/manifest.json")
    fields = json.loads(manifest.read_text())
    found = {}
    with FeatureStore(root, FeatureSpace(**fields)) as store:
        entries = concatenate([store.catalogue.merged, store.catalogue.recent]).in_order()
        for high, low, offset, part, views, _ in zip(*(c.tolist() for c in entries.columns()), strict=True):
            values = store.catalogue.parts[part].files.values.read_bytes()
            found[high, low] = views, values[offset : offset + views * store.view_bytes]
    return found


def test_views_of_photos_are_batched_together_and_told(tmp_path: Path, plain: PhotoViews) -> None:
    encode, told = TinyEncoder(), []
    report = run(
        samples_in(tmp_path), plain, tmp_path / "store", encode, on_progress=lambda *x: told.append(x)
    )
    # 4 photos of 12 views and one of 1 view are 49 views: 7 calls of 8, the last filled up
    assert encode.shapes == [(8, 3, SIDE, SIDE)] * 7
    assert report == Extraction(5, 0, {})
    assert told == [(k, 5) for k in range(6)]


def test_stored_features_are_the_encoder_s(tmp_path: Path, augmenting: PhotoViews) -> None:
    samples, encode = samples_in(tmp_path), TinyEncoder()
    run(samples, augmenting, tmp_path / "store", encode)
    store = FeatureStore(tmp_path / "store", space_of(augmenting))
    hashes = content_hashes([s.image for s in samples])
    for sample, content in zip(samples, hashes, strict=True):
        for copy in (0, 1):
            views = augmenting.augmented(augmenting.plain(sample.image), sample.id, copy)
            assert len(views) == (1 if sample.id == "s2" else 12)
            stored = store.get(str(content), sample.id, copy)
            torch.testing.assert_close(stored, encode(views), rtol=1e-5, atol=1e-6)


def test_stored_bytes_depend_neither_on_workers_nor_shares_nor_order(
    tmp_path: Path, augmenting: PhotoViews
) -> None:
    samples = samples_in(tmp_path)
    run(samples, augmenting, tmp_path / "a", TinyEncoder())
    run(samples, augmenting, tmp_path / "b", TinyEncoder(), workers=2)
    reports = [run(samples, augmenting, tmp_path / "c", TinyEncoder(), share=(r, 2)) for r in (1, 0)]
    run(samples[::-1], augmenting, tmp_path / "d", TinyEncoder())
    expected = contents(tmp_path / "a")
    assert len(expected) == 10
    assert {len(values) // views for views, values in expected.values()} == {8 * 4}
    for other in "bcd":
        assert contents(tmp_path / other) == expected
    assert [r.computed for r in reports] == [4, 6]


def test_a_disk_without_room_is_told_beforehand(
    tmp_path: Path, plain: PhotoViews, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    samples = samples_in(tmp_path)
    needed = 5 * 12 * 8 * 4  # entries · views at most · D · bytes
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed))
    run(samples, plain, tmp_path / "enough", TinyEncoder())
    assert not caplog.text
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    run(samples, plain, tmp_path / "scarce", TinyEncoder())
    assert "the features of 5 photos and copies take up to" in caplog.text


def owners(locations: list[str | None], ranks: int) -> list[int]:
    """Which rank has each row; exactly one has."""
    places = [SimpleNamespace(location=location) if location else SimpleNamespace() for location in locations]
    rows = [SimpleNamespace(image=place) for place in places]
    shares = [_share_of(rows, rank, ranks) for rank in range(ranks)]  # type: ignore[arg-type]
    assert all(sum(owned) == 1 for owned in zip(*shares, strict=True))
    return [owned.index(True) for owned in zip(*shares, strict=True)]


def test_shares_are_whole_shards_or_blocks_of_neighbours() -> None:
    shards = [f"{number}.tar" for number in range(8) for _ in range(3)]
    assert owners(shards, 2) == [0, 0, 0, 1, 1, 1] * 4
    assert owners(shards, 4) == [0, 1, 2, 3] * 6, "two shards each would be dealt unevenly"
    assert owners([None] * 64, 2) == [0, 0, 1, 1] * 16
    assert owners([*shards, None], 2) == [k % 2 for k in range(25)]
    assert owners([], 2) == []
    large = owners([None] * 20_000, 2)
    assert large[:512] == [0] * 256 + [1] * 256


def test_what_is_there_is_not_decoded_again(
    tmp_path: Path, plain: PhotoViews, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = samples_in(tmp_path, 3)
    run(samples, plain, tmp_path / "store", TinyEncoder())
    monkeypatch.setattr(PhotoViews, "plain", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(FileImage, "read", lambda *_: pytest.fail("read"))
    encode = TinyEncoder()
    assert run(samples, plain, tmp_path / "store", encode) == Extraction(0, 3, {})
    assert encode.shapes == []


def test_the_same_photo_under_two_ids_is_computed_once(tmp_path: Path, plain: PhotoViews) -> None:
    samples = samples_in(tmp_path, 2)
    samples.append(Sample("double", samples[0].image))
    assert run(samples, plain, tmp_path / "store", TinyEncoder()).computed == 2


def test_unreadable_photos_are_named_and_the_others_go_on(tmp_path: Path, plain: PhotoViews) -> None:
    samples = samples_in(tmp_path)
    (tmp_path / "1.jpg").write_bytes(jpeg(1)[:900])
    (tmp_path / "3.jpg").unlink()
    samples.append(Sample("double", FileImage(tmp_path / "1.jpg")))
    report = run(samples, plain, tmp_path / "store", TinyEncoder())
    assert report.computed == 3
    assert sorted(report.unreadable) == [1, 3, 5]
    assert "1.jpg: is broken" in report.unreadable[1] == report.unreadable[5]
    assert "3.jpg: there is no such file" in report.unreadable[3]


def test_features_that_are_not_finite_are_refused(tmp_path: Path, plain: PhotoViews) -> None:
    samples = samples_in(tmp_path, 1)
    with pytest.raises(BackboneError, match=r"not finite for .*0\.jpg"):
        run(samples, plain, tmp_path / "store", lambda views: torch.full((len(views), 4), torch.nan))  # type: ignore[arg-type]


def test_hashes_are_remembered_until_the_photo_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [s.image for s in samples_in(tmp_path, 3)]
    memory = BytesImage("in memory", jpeg(9))
    first = content_hashes([*sources, memory], tmp_path)
    assert len(set(first)) == 4
    assert content_hashes([FileImage(tmp_path / "gone.jpg")], tmp_path) == [None]
    with (tmp_path / INDEX_NAME).open("a") as index:
        index.write("0123 torn li")
    (tmp_path / "1.jpg").write_bytes(jpeg(77))
    second = content_hashes(sources, tmp_path)
    assert (second[0], second[2]) == (first[0], first[2])
    assert second[1] != first[1]
    monkeypatch.setattr(FileImage, "read", lambda *_: pytest.fail("read"))
    assert content_hashes(sources, tmp_path) == second


def test_a_reduced_photo_is_not_taken_for_a_whole_one_of_the_same_bytes() -> None:
    data = jpeg(1)
    whole = BytesImage("whole", data)
    reduced = SimpleNamespace(name="reduced", read=lambda: data, original_size=(4032, 3024))
    one, other = content_hashes([whole, reduced])  # type: ignore[list-item]
    assert other == f"{one} of 4032x3024", "views are laid out for the original's size"


def test_copies_augmented_on_the_device_give_the_features_of_the_loader_s(
    tmp_path: Path, augmenting: PhotoViews
) -> None:
    samples = samples_in(tmp_path)
    device = {"augment_on": torch.device("cpu")}
    for name, options in (("loader", {}), ("device", device), ("workers", {**device, "workers": 2})):
        run(samples, augmenting, tmp_path / name, TinyEncoder(), **options)
    stored = [contents(tmp_path / name) for name in ("loader", "device", "workers")]
    assert stored[1] == stored[2]
    assert stored[0].keys() == stored[1].keys()
    for entry, (views, values) in stored[0].items():
        count, others = stored[1][entry]
        assert count == views
        a, b = (torch.frombuffer(bytearray(each), dtype=torch.float32) for each in (values, others))
        assert (a - b).abs().max() < 0.02 * a.abs().max()
