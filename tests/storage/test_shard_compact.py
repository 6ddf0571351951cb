from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.ExifTags import Base as ExifTag
from support.shards import load, picture, write_photos, write_set

from roadwork_dist.common.errors import ConfigError, DataError
from roadwork_dist.features.content_hashes import content_hashes
from roadwork_dist.photos.images import BytesImage, decode, photo_size
from roadwork_dist.photos.photo import PhotoViews, views_of_photo
from roadwork_dist.photos.views import ViewGeometry, layout_of
from roadwork_dist.storage.shards.compact import compact_photo, compact_size
from roadwork_dist.storage.shards.image import ShardImage

S = 64
GEOMETRY = ViewGeometry(S)


def opened(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data))


def psnr(left: torch.Tensor, right: torch.Tensor) -> float:
    error = (left.float() - right.float()).square().mean().item()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


@pytest.mark.parametrize(
    ("size", "stored"),
    [
        ((640, 480), (160, 120)),  # the long side is 2.5 S
        ((480, 640), (120, 160)),
        ((4032, 3024), (160, 120)),
        ((1000, 350), (183, 64)),  # wider than 2.5: the short side is S
        ((2000, 500), (2000, 500)),  # the shared image would be lower than pictures may be
        ((4000, 100), (4000, 100)),
        ((155, 110), (155, 110)),  # never enlarged
        ((300, 90), (214, 64)),  # global view only: its short side keeps S px
        ((90, 90), (64, 64)),
        ((64, 64), (64, 64)),
    ],
)
def test_what_is_stored_is_the_shared_image(size: tuple[int, int], stored: tuple[int, int]) -> None:
    assert compact_size(GEOMETRY, *size) == stored
    compact = compact_photo(BytesImage("x", picture(1, size, quality=100)), GEOMETRY)
    assert opened(compact).size == stored


def test_it_is_a_jpeg_without_subsampling_and_exif() -> None:
    exif = Image.Exif()
    exif[ExifTag.Make] = "camera"
    photo = BytesImage("x", picture(2, (640, 480), exif=exif))
    compact = opened(compact_photo(photo, GEOMETRY))
    assert compact.format == "JPEG"
    assert compact.layer == [(1, 1, 1, 0), (2, 1, 1, 1), (3, 1, 1, 1)]  # type: ignore[attr-defined]
    assert not compact.getexif()
    assert len(compact_photo(photo, GEOMETRY, 60)) < len(compact_photo(photo, GEOMETRY, 95)) / 1.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTag.Orientation] = orientation
    photo = BytesImage("x", picture(3, (640, 480), exif=exif))
    compact = BytesImage("y", compact_photo(photo, GEOMETRY))
    assert opened(compact.data).size == ((160, 120) if orientation < 5 else (120, 160))
    assert psnr(views_of_photo(photo, GEOMETRY), views_of_photo(compact, GEOMETRY)) > 38


def test_a_small_photo_keeps_its_bytes() -> None:
    small = BytesImage("x", picture(4, (155, 110), quality=80))
    assert compact_photo(small, GEOMETRY) == small.data
    png = BytesImage("x", picture(4, (155, 110), "PNG"))
    assert len(compact_photo(png, GEOMETRY)) <= len(png.data)


def test_a_broken_photo_is_an_error() -> None:
    with pytest.raises(DataError, match=r"^x: is broken"):
        compact_photo(BytesImage("x", picture(5)[:400]), GEOMETRY)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), count=6, size=(801, 599))


@pytest.fixture(scope="module")
def shards(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sets") / "compact"
    written = write_set(table, out, compact=GEOMETRY)
    assert written.shards.kind == "compact"
    assert written.photo_bytes < written.source_bytes / 3
    return out


def test_views_of_a_compact_set_are_those_of_its_photos(table: Path, shards: Path) -> None:
    views = PhotoViews(GEOMETRY)
    for own, other in zip(load(table), load(shards), strict=True):
        assert isinstance(other.image, ShardImage)
        assert other.image.original_size == (801, 599)
        assert photo_size(other.image) == (599, 801)
        assert decode(other.image).shape == (3, 120, 160)
        expected, got = views.plain(own.image), views.plain(other.image)
        assert got.shape == expected.shape == (12, 3, S, S)
        assert psnr(got, expected) > 35
        assert (own.mask is None) == (other.mask is None)


def test_the_layout_is_that_of_the_original() -> None:
    """A photo with a short side just above 1.5 S has tiles, and its compact copy just the same."""
    geometry = ViewGeometry(S, scale=1.0, grid=2)
    photo = BytesImage("x", picture(6, (128, 96)))
    assert layout_of(geometry, 128, 96).tiles
    compact = compact_photo(photo, geometry)
    assert opened(compact).size == (85, 64)
    assert len(views_of_photo(compact, geometry)) == 1  # as a photo of its own it would be a small one

    class Source(BytesImage):
        original_size = (128, 96)

    assert len(views_of_photo(Source("y", compact), geometry)) == len(views_of_photo(photo, geometry)) == 7


def test_features_of_compact_photos_are_never_taken_for_those_of_originals(table: Path, shards: Path) -> None:
    """Stored features are found by the hash of a photo's content."""
    originals = content_hashes([sample.image for sample in load(table)])
    compact = content_hashes([sample.image for sample in load(shards)])
    assert None not in originals
    assert not set(originals) & set(compact)
    hashes = [sample.image.content_hash for sample in load(shards)]  # type: ignore[attr-defined]
    assert [str(value).split(" of ")[0] for value in compact] == hashes  # and the original's size


def test_a_set_of_another_form_is_not_gone_on_with(table: Path, shards: Path) -> None:
    with pytest.raises(ConfigError, match="holds shards with kind 'compact', now it is 'original'"):
        write_set(table, shards)
    with pytest.raises(ConfigError, match="holds shards with quality 95, now it is 90"):
        write_set(table, shards, compact=GEOMETRY, quality=90)
    assert write_set(table, shards, compact=GEOMETRY).written == 0
