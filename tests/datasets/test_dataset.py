from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from support.disks import make_read_only, small_file_system
from torch import Tensor

from roadwork_dist.common.errors import BackboneError, DataError
from roadwork_dist.config.batch import DAYTIME, SCENE, WEATHER, Batch
from roadwork_dist.config.experiment import AugmentConfig
from roadwork_dist.datasets.dataset import RoadworkDataset, collate
from roadwork_dist.datasets.mix import MixedRows
from roadwork_dist.features.content_hashes import content_hashes
from roadwork_dist.features.extract import extract
from roadwork_dist.features.masks import mask_targets
from roadwork_dist.features.store import FeatureSpace, FeatureStore
from roadwork_dist.features.text import TextCache, embed_descriptions
from roadwork_dist.photos.augment import Augmenter
from roadwork_dist.photos.images import FileImage
from roadwork_dist.photos.manifest import Manifest, Sample
from roadwork_dist.photos.mask_images import PngMask, decode_mask
from roadwork_dist.photos.photo import PhotoViews, views_of_photo
from roadwork_dist.photos.views import ViewGeometry, make_views
from roadwork_dist.trainer.feed.loader import load_batches

SIDE = 48
GEOMETRY = ViewGeometry(SIDE)


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """A synthetic photo: smooth random colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    sizes = [(120, 90), (70, 64), (90, 120), (300, 80)]
    for k, size in enumerate(sizes):
        picture(k, size).save(tmp_path / f"{k}.jpg", quality=95)
    mask = np.zeros((90, 120), np.uint8)
    mask[40:60, 30:50] = 0b100001
    Image.fromarray(mask).save(tmp_path / "mask.png")
    mask_source = PngMask(FileImage(tmp_path / "mask.png"))
    images = [FileImage(tmp_path / f"{k}.jpg") for k in range(4)]
    return Manifest(
        "synthetic",
        (
            Sample("a", images[0], 1, 40.5, -74.25, "rainy", "night", "urban", "cones", mask_source),
            Sample("b", images[1], 0, 12.0, None),
            Sample("c", images[2], None, description="no cones"),
            Sample("d", images[3], 0, weather="sunny", description="cones"),
        ),
    )


class TinyEncoder(torch.nn.Module):
    """A small real convolutional encoder, [N, 3, S, S] uint8 -> [N, 8]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 5, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3)
        )

    @torch.no_grad()
    def forward(self, views: Tensor) -> Tensor:
        return self.layers(views.float() / 255).mean((2, 3))  # type: ignore[no-any-return]


def fake_text(texts: list[str]) -> Tensor:
    return torch.stack([torch.full((384,), float(len(text))) for text in texts])


def test_rows_encode_metadata_without_nan(manifest: Manifest) -> None:
    text = embed_descriptions([s.description for s in manifest], fake_text)
    masks = mask_targets([s.mask for s in manifest])
    dataset = RoadworkDataset(manifest, views=PhotoViews(GEOMETRY), text=text, masks=masks)
    batch = collate([dataset[i] for i in range(4)])
    assert batch["id"] == ["a", "b", "c", "d"]
    assert batch["index"].tolist() == [0, 1, 2, 3]
    assert batch["label"].tolist() == [1, 0, -1, 0]
    assert batch["gps"].tolist() == [[40.5, -74.25], [0, 0], [0, 0], [0, 0]]
    assert batch["gps_known"].tolist() == [True, False, False, False]
    assert batch["weather"].tolist() == [WEATHER.index("rainy"), 7, 7, WEATHER.index("sunny")]
    assert batch["daytime"].tolist() == [DAYTIME.index("night"), 5, 5, 5]
    assert batch["scene"].tolist() == [SCENE.index("urban"), 6, 6, 6]
    assert batch["text"][:, 0].tolist() == [5, 0, 8, 5]
    assert batch["text_known"].tolist() == [True, False, True, True]
    assert batch["mask_known"].tolist() == [True, False, False, False]
    assert torch.equal(batch["mask"][0], decode_mask(manifest[0].mask))  # type: ignore[arg-type]
    assert batch["mask"][1:].abs().sum() == 0
    for name, dtype in {
        "label": torch.int64, "index": torch.int64, "weather": torch.int64, "gps": torch.float32,
        "gps_known": torch.bool, "text": torch.float32, "text_known": torch.bool, "views": torch.uint8,
        "view_mask": torch.bool, "mask": torch.float32, "mask_known": torch.bool,
    }.items():  # fmt: skip
        assert batch[name].dtype == dtype, name  # type: ignore[literal-required]
    assert "features" not in batch


def test_the_view_axis_is_padded_and_masked(manifest: Manifest) -> None:
    dataset = RoadworkDataset(manifest, views=PhotoViews(GEOMETRY))
    batch = collate([dataset[0], dataset[1]])
    assert batch["views"].shape == (2, 12, 3, SIDE, SIDE)
    assert batch["view_mask"].sum(1).tolist() == [12, 1]
    assert torch.equal(batch["views"][1, :1], dataset[1]["views"])
    assert batch["views"][1, 1:].sum() == 0
    assert collate([dataset[1]])["views"].shape == (1, 1, 3, SIDE, SIDE)
    assert "mask" not in batch
    assert batch["text_known"].tolist() == [False, False]


@pytest.mark.parametrize("copies", [None, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 2**-8)])
def test_cached_features_are_the_online_ones(
    tmp_path: Path, manifest: Manifest, copies: int | None, dtype: str, tolerance: float
) -> None:
    augmenter = None if copies is None else Augmenter(AugmentConfig(copies=copies), 3)
    views, encode = PhotoViews(GEOMETRY, augmenter), TinyEncoder()
    identity = None if augmenter is None else augmenter.identity()
    store = FeatureStore(tmp_path / "f", FeatureSpace(GEOMETRY.identity(), identity, "tiny", dtype))  # type: ignore[arg-type]
    hashes = content_hashes([s.image for s in manifest], tmp_path / "f")
    extract(manifest.samples, hashes, views=views, store=store, encode=encode, batch_views=10)
    online = RoadworkDataset(manifest, views=views)
    cached = RoadworkDataset(manifest, views=views, store=store, hashes=hashes)
    of_epoch = []
    for epoch in range(4):
        online.set_epoch(epoch)
        cached.set_epoch(epoch)
        fresh, kept = (collate([data[i] for i in range(4)]) for data in (online, cached))
        assert kept["features"].dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        assert torch.equal(fresh["view_mask"], kept["view_mask"])
        features = encode(fresh["views"].flatten(0, 1)).view(4, 12, 8) * fresh["view_mask"][..., None]
        torch.testing.assert_close(kept["features"].float(), features, rtol=tolerance, atol=1e-6)
        of_epoch.append(kept["features"])
    assert torch.equal(of_epoch[0], of_epoch[2])
    assert torch.equal(of_epoch[0], of_epoch[1]) == (copies is None)


def test_draws_do_not_depend_on_order_or_workers(manifest: Manifest) -> None:
    views = PhotoViews(GEOMETRY, Augmenter(AugmentConfig(copies=0), 3))
    dataset = RoadworkDataset(manifest, views=views)

    def rows(batches: list[list[int]], workers: int) -> dict[str, Tensor]:
        loader = load_batches(dataset, batches, epoch=5, workers=workers, collate=collate)
        return {
            name: batch["views"][k][batch["view_mask"][k]]
            for batch in loader
            for k, name in enumerate(batch["id"])
        }

    alone, together = rows([[3], [1], [2], [0]], 0), rows([[0, 1], [2, 3]], 2)
    for name, expected in alone.items():
        assert torch.equal(together[name], expected)
    dataset.set_epoch(6)
    assert not torch.equal(dataset[0]["views"], alone["a"])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(480, 300), (300, 480), (480, 80)])
def test_a_rotated_photo_gives_the_views_of_the_upright_one(
    tmp_path: Path, orientation: int, size: tuple[int, int]
) -> None:
    upright = picture(1, size)
    undo = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if undo is None else upright.transpose(undo)
    stored.save(tmp_path / "x.png", exif=exif)  # lossless, so that views can be compared exactly
    expected = make_views(torch.from_numpy(np.array(upright)).permute(2, 0, 1), GEOMETRY)
    assert torch.equal(views_of_photo(FileImage(tmp_path / "x.png"), GEOMETRY), expected)
    stored.save(tmp_path / "x.jpg", exif=exif, quality=97)
    from_jpeg = views_of_photo(FileImage(tmp_path / "x.jpg"), GEOMETRY)  # a reduced decode, too
    assert (from_jpeg.float() - expected.float()).abs().mean() < 6  # a wrong turn: dozens


def test_the_geometry_of_a_reduced_decode_is_that_of_the_photo(tmp_path: Path) -> None:
    picture(0, (1000, 420)).save(tmp_path / "x.jpg", quality=95)
    # At 1/8 the photo would be 53 px high: below 1.5 S, but the photo itself is not.
    assert len(views_of_photo(FileImage(tmp_path / "x.jpg"), ViewGeometry(40))) == 12


def test_an_unreadable_photo_is_named(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "2.jpg").write_bytes(b"not a photo")
    dataset = RoadworkDataset(manifest, views=PhotoViews(GEOMETRY))
    with pytest.raises(DataError, match=r"2\.jpg: is not an image"):
        dataset[2]
    store = FeatureStore(tmp_path / "f", FeatureSpace(GEOMETRY.identity(), None, "tiny", "fp32"))
    cached = RoadworkDataset(manifest, views=PhotoViews(GEOMETRY), store=store, hashes=["a", None, "c", "d"])
    with pytest.raises(DataError, match=r"1\.jpg: could not be read when features were computed"):
        cached[1]
    with pytest.raises(DataError, match=r"sample 'a': its stored features .* are missing"):
        cached[0]


def test_tables_must_fit_the_manifest(tmp_path: Path, manifest: Manifest) -> None:
    store = FeatureStore(tmp_path / "f", FeatureSpace(GEOMETRY.identity(), None, "tiny", "fp32"))
    with pytest.raises(ValueError, match="needs the hashes"):
        RoadworkDataset(manifest, views=PhotoViews(GEOMETRY), store=store)
    with pytest.raises(ValueError, match="hashes has 1 rows, the manifest 4"):
        RoadworkDataset(manifest, views=PhotoViews(GEOMETRY), store=store, hashes=["a"])


def test_texts_are_embedded_once_and_kept(tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def encode(texts: list[str]) -> Tensor:
        calls.append(texts)
        return fake_text(texts)

    cache = TextCache(tmp_path, "encoder 1")
    first = embed_descriptions(["cones", None, "a sign", "cones"], encode, cache)
    assert calls == [["cones", "a sign"]]
    assert first.values[:, 0].tolist() == [5, 0, 6, 5]
    assert first.known.tolist() == [True, False, True, True]
    again = embed_descriptions(["a sign", "worker", "cones"], encode, cache)
    assert calls[1:] == [["worker"]]
    assert again.values[:, 0].tolist() == [6, 6, 5]
    embed_descriptions(["cones"], encode, TextCache(tmp_path, "encoder 2"))
    assert calls[2:] == [["cones"]], "another encoder has a cache of its own"
    cache.path.write_bytes(cache.path.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="is damaged"):
        assert embed_descriptions(["cones"], encode, cache).values[0, 0] == 5
    assert embed_descriptions([None, None], encode).known.tolist() == [False, False]
    with pytest.raises(BackboneError, match=r"gave \(1, 7\) for 1 texts"):
        embed_descriptions(["x"], lambda texts: torch.zeros(len(texts), 7))


def test_mask_targets_are_kept_exactly(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [s.mask for s in manifest]
    first = mask_targets(sources, tmp_path / "f")
    monkeypatch.setattr("roadwork_dist.features.masks.decode_mask", lambda *_: pytest.fail("decoded"))
    second = mask_targets(sources, tmp_path / "f")
    assert first[0][1]
    assert not first[1][1]
    assert torch.equal(first[0][0], second[0][0])
    assert torch.equal(first[0][0], decode_mask(manifest[0].mask))  # type: ignore[arg-type]


def test_what_a_store_that_may_only_be_read_lacks_is_not_kept(
    tmp_path: Path, manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    sources, masks = [s.image for s in manifest], [s.mask for s in manifest] * 4
    descriptions = [s.description for s in manifest]
    with small_file_system(tmp_path / "disk", "64k") as root:
        writes: dict[str, Callable[[], object]] = {
            "hashes": lambda: content_hashes(sources, root),
            "masks": lambda: mask_targets(masks, root).rows(range(16))[0].tolist(),
            "texts": lambda: embed_descriptions(
                descriptions, fake_text, TextCache(root, "e")
            ).values.tolist(),
        }
        with pytest.raises(OSError, match="No space left"):
            (root / "other").write_bytes(bytes(1 << 17))
        for write in writes.values():
            with pytest.raises(OSError, match="No space left"):
                write()
        (root / "other").unlink()
        make_read_only(root)
        missing = {name: write() for name, write in writes.items()}
        assert not list(root.rglob("*.safetensors"))
    root = tmp_path / "writable"
    assert missing == {name: write() for name, write in writes.items()}
    (told,) = (record.message for record in caplog.records if "is read-only" in record.message)
    assert told.startswith(f"{tmp_path / 'disk'} is read-only (Read-only file system): hashes of photos")


def stored(
    folder: Path, manifest: Manifest, copies: int | None, dtype: Literal["bf16", "fp32"] = "fp32"
) -> RoadworkDataset:
    """The manifest with everything a row can have, read from a store."""
    augmenter = None if copies is None else Augmenter(AugmentConfig(copies=copies), 3)
    views = PhotoViews(GEOMETRY, augmenter)
    identity = None if augmenter is None else augmenter.identity()
    store = FeatureStore(folder, FeatureSpace(GEOMETRY.identity(), identity, "tiny", dtype))
    hashes = content_hashes([s.image for s in manifest])
    extract(manifest.samples, hashes, views=views, store=store, encode=TinyEncoder(), batch_views=10)
    text = embed_descriptions([s.description for s in manifest], fake_text)
    masks = mask_targets([s.mask for s in manifest])
    return RoadworkDataset(manifest, views=views, store=store, hashes=hashes, text=text, masks=masks)


def assert_same(one: Batch, other: Batch) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        expected = other[name]  # type: ignore[literal-required]
        if isinstance(value, Tensor):
            assert value.dtype == expected.dtype, name
            assert torch.equal(value, expected), name
        else:
            assert value == expected, name


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("copies", [None, 2])
def test_rows_that_are_read_together_are_those_read_singly(
    tmp_path: Path, manifest: Manifest, copies: int | None, dtype: Literal["bf16", "fp32"], resident: bool
) -> None:
    dataset = stored(tmp_path / "f", manifest, copies, dtype)
    plain = RoadworkDataset(manifest, views=dataset.views, store=dataset.store, hashes=dataset.hashes)
    assert dataset.make_resident(torch.device("cpu")) if resident else not dataset.in_memory
    for data, epoch in [(dataset, 0), (dataset, 3), (plain, 1)]:
        data.set_epoch(epoch)
        for rows in ([0, 1, 2, 3], [3, 1, 1], [1], [2, 0]):
            together = collate(data.__getitems__(rows))
            singly = collate([data[row] for row in rows])
            assert_same(together, singly)
            (loaded,) = load_batches(data, [rows], epoch=epoch, collate=collate)
            assert_same(loaded, singly)
            assert_same(collate(list(data.__getitems__(rows))), singly)


def test_the_metadata_columns_are_the_rows_fields(tmp_path: Path, manifest: Manifest) -> None:
    dataset = stored(tmp_path / "f", manifest, None)
    online = RoadworkDataset(manifest, views=PhotoViews(GEOMETRY), text=dataset.text, masks=dataset.masks)
    assert isinstance(online.__getitems__([0, 1]), list)
    batch, expected = dataset.batch([2, 0, 3]), collate(online.__getitems__([2, 0, 3]))
    assert_same(
        {name: value for name, value in batch.items() if name != "features"},  # type: ignore[arg-type]
        {name: value for name, value in expected.items() if name != "views"},  # type: ignore[arg-type]
    )


def test_a_store_that_does_not_fit_is_left_on_disk(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = stored(tmp_path / "f", manifest, 2)
    size = 2 * (12 + 12 + 12 + 1) * 8 * 4  # copies · views · D · bytes; photo 1 is too small for crops
    for free, fits in [(4 * size - 1, False), (4 * size, True)]:
        monkeypatch.setattr(
            "roadwork_dist.features.store.resident.free_memory", lambda device, free=free: free
        )
        assert dataset.make_resident(torch.device("cpu")) is fits
        assert dataset.in_memory is fits


def test_photos_in_memory_are_read_without_other_processes(tmp_path: Path, manifest: Manifest) -> None:
    dataset = stored(tmp_path / "f", manifest, None)
    assert load_batches(dataset, [[0]], workers=1, collate=collate).num_workers == 1
    dataset.make_resident(torch.device("cpu"))
    assert load_batches(dataset, [[0]], workers=1, pin_memory=True, collate=collate).num_workers == 0


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_mixed_rows_are_the_same_wherever_features_are(
    tmp_path: Path, manifest: Manifest, mix: Literal["mixup", "cutmix"]
) -> None:
    dataset = stored(tmp_path / "f", manifest, 2)
    mixed = MixedRows(dataset, [1, 0, -1, 0], AugmentConfig(mix=mix, mix_alpha=1.0), seed=1)
    (on_disk,) = load_batches(mixed, [[0, 1, 2, 3]], epoch=1, collate=collate)
    dataset.make_resident(torch.device("cpu"))
    (in_memory,) = load_batches(mixed, [[0, 1, 2, 3]], epoch=1, collate=collate)
    assert_same(on_disk, in_memory)
    assert on_disk["soft_label"].tolist() != [1, 0, 0, 0]
