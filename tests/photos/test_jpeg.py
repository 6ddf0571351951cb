"""The fast way of JPEGs against the slow one, and who takes which."""

import threading
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter
from sklearn.datasets import load_sample_image
from torch import Tensor

from roadwork_dist.common.errors import DataError
from roadwork_dist.photos import jpeg
from roadwork_dist.photos.images import decode, open_picture, verify
from roadwork_dist.photos.jpeg import KEPT_BYTES, decode_baseline, decode_for_views, is_plain_jpeg
from roadwork_dist.photos.photo import views_of_photo
from roadwork_dist.photos.views import ViewGeometry, make_views, photo_boxes

PHOTO = Image.fromarray(load_sample_image("china.jpg"))
_TO_STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def photo(width: int, height: int) -> Image.Image:
    """A photo no sharper at its pixels than a camera's, whose lens and colour filter blur it."""
    return PHOTO.resize((width, height), Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(1.5))


def encoded(upright: Image.Image, orientation: int = 1, **options: object) -> bytes:
    """A JPEG that shows ``upright`` once its orientation is applied."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(_TO_STORED[orientation]) if orientation in _TO_STORED else upright
    buffer = BytesIO()
    stored.save(buffer, "JPEG", **{"quality": 92, "exif": exif, **options})  # type: ignore[arg-type]
    return buffer.getvalue()


def psnr(a: Tensor, b: Tensor) -> float:
    error = (a.float() - b.float()).square().mean().clamp_min(1e-4)
    return float(10 * torch.log10(255**2 / error))


def slow_views(data: bytes, geometry: ViewGeometry) -> Tensor:
    """Pillow's full decode, turned before anything else."""
    return make_views(decode(data), geometry)


def goes_fast(data: bytes, monkeypatch: pytest.MonkeyPatch, geometry: ViewGeometry) -> bool:
    taken: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(jpeg, "decode", lambda *_, **__: taken.append(1) or torch.zeros(3, 64, 64).byte())
        decode_for_views(data, geometry, name="x")
    return not taken


@settings(max_examples=40, deadline=None)
@given(
    st.integers(64, 420),
    st.integers(64, 420),
    st.integers(1, 8),
    st.sampled_from([0, 1, 2]),
    st.sampled_from(["fast", "exact"]),
    st.sampled_from(["auto", "all"]),
)
def test_views_of_the_fast_way_are_those_of_the_slow_one(
    width: int, height: int, orientation: int, subsampling: int, quality: str, policy: str
) -> None:
    geometry = ViewGeometry(48, policy=policy, quality=quality)  # type: ignore[arg-type]
    data = encoded(photo(width, height), orientation, subsampling=subsampling)
    views, slow = views_of_photo(data, geometry), slow_views(data, geometry)
    assert views.shape == slow.shape
    assert views.is_contiguous()
    least = 50 if quality == "exact" else 38  # a shift of one pixel gives less than 34
    assert min(psnr(a, b) for a, b in zip(views, slow, strict=True)) >= least


def test_a_shift_of_a_pixel_would_be_seen() -> None:
    image = torch.from_numpy(np.array(photo(400, 300))).permute(2, 0, 1)
    views, moved = (make_views(image[..., k : 398 + k], ViewGeometry(48)) for k in (0, 1))
    assert min(psnr(a, b) for a, b in zip(views, moved, strict=True)) < 34


@pytest.mark.parametrize("size", [(640, 480), (641, 479), (642, 480), (480, 640)])
def test_a_large_photo_s_views_are_close_to_lanczos_crops(size: tuple[int, int]) -> None:
    geometry, image = ViewGeometry(96), photo(*size)
    views = views_of_photo(encoded(image, quality=95), geometry)
    for view, box in zip(views, photo_boxes(geometry, *size), strict=True):
        edges = (box.left, box.top, box.left + box.width, box.top + box.height)
        direct = image.resize((96, 96), Image.Resampling.LANCZOS, box=edges)
        assert psnr(view, torch.from_numpy(np.array(direct)).permute(2, 0, 1)) >= 41


def test_exact_quality_keeps_drawn_edges() -> None:
    image = Image.new("RGB", (2016, 1512), (40, 60, 80))
    draw = ImageDraw.Draw(image)
    for k in range(0, 2016, 72):
        draw.line((k, 0, 2016 - k, 1512), fill=(255, 250, 240), width=3)
        draw.text((k, 3 * k // 4), "ROAD WORK 35", fill=(255, 140, 0), font_size=28)
    data = encoded(image, quality=95, subsampling=0)
    decoded = Image.open(BytesIO(data))
    worst = {}
    for quality in ("fast", "exact"):
        geometry = ViewGeometry(256, quality=quality)  # type: ignore[arg-type]
        views = views_of_photo(data, geometry)
        boxes = photo_boxes(geometry, 2016, 1512)
        edges = [(b.left, b.top, b.left + b.width, b.top + b.height) for b in boxes]
        crops = [decoded.resize((256, 256), Image.Resampling.LANCZOS, box=box) for box in edges]
        direct = [torch.from_numpy(np.array(crop)).permute(2, 0, 1) for crop in crops]
        worst[quality] = min(psnr(a, b) for a, b in zip(views, direct, strict=True))
    assert worst["exact"] >= 49
    assert worst["fast"] < 45


KINDS = {
    "baseline": (encoded(photo(200, 160)), True),
    "4:4:4": (encoded(photo(200, 160), subsampling=0), True),
    "odd": (encoded(photo(201, 163)), True),
    "restart markers": (encoded(photo(200, 160), restart_marker_blocks=3), True),
    "bytes behind it": (encoded(photo(200, 160)) + b"junk" * 50, True),
    "progressive": (encoded(photo(200, 160), progressive=True), False),
    "grey": (encoded(photo(200, 160).convert("L")), False),
    "cmyk": (encoded(photo(200, 160).convert("CMYK")), False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_who_goes_which_way_and_both_give_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, is_fast = KINDS[kind]
    geometry = ViewGeometry(48, quality="exact")
    assert goes_fast(data, monkeypatch, geometry) is is_fast
    slow = slow_views(data, geometry)
    assert all(psnr(a, b) >= 50 for a, b in zip(views_of_photo(data, geometry), slow, strict=True))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_other_formats_go_the_slow_way(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = BytesIO()
    photo(200, 160).save(buffer, kind)
    assert not goes_fast(buffer.getvalue(), monkeypatch, ViewGeometry(48))
    assert torch.equal(
        views_of_photo(buffer.getvalue(), ViewGeometry(48)), slow_views(buffer.getvalue(), ViewGeometry(48))
    )


@pytest.mark.parametrize("quality", ["fast", "exact"])
@pytest.mark.parametrize("kept", [0.3, 0.9, -2])
def test_a_jpeg_cut_short_is_told(kept: float, quality: str) -> None:
    data = encoded(photo(640, 480))
    data = data[: int(kept if kept < 0 else kept * len(data))]
    with pytest.raises(DataError, match=r"street/7\.jpg: is broken .* expected a complete image"):
        views_of_photo(data, ViewGeometry(48, quality=quality), name="street/7.jpg")  # type: ignore[arg-type]


def test_flipped_bits_are_told_or_read_as_before() -> None:
    """The check of a data set goes through Pillow; nothing it lets pass may fail later, nor the reverse."""
    data = bytearray(encoded(photo(160, 120)))
    rng = np.random.default_rng(0)
    for place in rng.integers(2, len(data), 150).tolist():
        damaged = bytes(data[:place]) + bytes([data[place] ^ 1 << int(rng.integers(8))]) + data[place + 1 :]
        outcomes = []
        for read in (verify, lambda data: views_of_photo(data, ViewGeometry(32))):
            try:
                read(damaged)
                outcomes.append("read")
            except DataError:
                outcomes.append("told")
        assert outcomes[0] == outcomes[1], place


def test_a_decoder_s_complaint_sends_a_photo_the_slow_way(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photo(200, 160))
    marker = data.index(b"\xff\xda") + 200
    damaged = data[:marker] + b"\xff\xd3" + data[marker + 2 :]  # a restart marker that is not due
    assert decode_baseline(damaged, (200, 160)) is None
    assert not goes_fast(damaged, monkeypatch, ViewGeometry(48))


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_a_reduced_decode_is_pillow_s(reduction: int) -> None:
    data = encoded(photo(648, 416))
    pixels = decode_baseline(data, (648, 416), reduction)
    assert pixels is not None
    assert pixels.shape == (416 // reduction, 648 // reduction, 3)
    slow = decode(data, reduction=reduction)
    assert (torch.from_numpy(pixels).permute(2, 0, 1).int() - slow.int()).abs().float().mean() < 0.5


def test_memory_is_used_again_and_large_memory_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photo(640, 480))
    first, second = decode_baseline(data, (640, 480)), decode_baseline(data, (640, 480), 2)
    assert first is not None
    assert second is not None
    assert np.shares_memory(first, second)
    others: list[object] = []
    thread = threading.Thread(target=lambda: others.append(decode_baseline(data, (640, 480))))
    thread.start()
    thread.join()
    assert not np.shares_memory(first, others[0])  # type: ignore[arg-type]
    monkeypatch.setattr(jpeg, "_memory", threading.local())
    monkeypatch.setattr(jpeg, "KEPT_BYTES", 1000)
    assert decode_baseline(data, (640, 480)) is not None
    assert not hasattr(jpeg._memory, "pixels")
    assert KEPT_BYTES >= 12_192_768 * 3, "a photo of 4032x3024 px is worth keeping"


def test_views_do_not_share_the_memory_that_is_used_again() -> None:
    data, other = encoded(photo(64, 64)), encoded(Image.new("RGB", (64, 64)))
    views = views_of_photo(data, ViewGeometry(64))  # not resized at all
    before = views.clone()
    views_of_photo(other, ViewGeometry(64))
    assert torch.equal(views, before)


def test_only_jpegs_in_colour_are_plain() -> None:
    assert is_plain_jpeg(open_picture(KINDS["baseline"][0], "x"))
    assert not is_plain_jpeg(open_picture(KINDS["grey"][0], "x"))
