import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from roadwork_dist.common.errors import DataError
from roadwork_dist.config.batch import MASK_CLASSES
from roadwork_dist.photos.images import (
    BytesImage,
    FileImage,
    as_image_source,
    content_hash,
    decode,
    photo_size,
    verify,
)
from roadwork_dist.photos.mask_images import PngMask, decode_mask


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}), **options)
    return buffer.getvalue()


def corners(width: int = 160, height: int = 96) -> Image.Image:
    """Red, green, blue and white quarters: every one of the eight orientations looks different."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2, 0] = 255
    pixels[: height // 2, width // 2 :, 1] = 255
    pixels[height // 2 :, : width // 2, 2] = 255
    pixels[height // 2 :, width // 2 :] = 255
    return Image.fromarray(pixels)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", ihdr)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


# What a camera does to the upright scene before it stores it under each value of the tag.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),  # shown after a clockwise quarter turn
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_every_exif_orientation_is_shown_upright(orientation: int, kind: str) -> None:
    upright = np.asarray(corners())
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    data = encoded(stored, kind, exif=exif)
    for reduction in (1, 2):
        shown = decode(data, reduction=reduction)
        assert shown.shape[2] > shown.shape[1]
        full = torch.nn.functional.interpolate(shown[None].float(), size=(96, 160))[0]
        wanted = torch.from_numpy(upright.copy()).permute(2, 0, 1).float()
        assert (full - wanted).abs().mean() < 12
    assert photo_size(data) == verify(data) == (96, 160)


@pytest.mark.parametrize(
    ("image", "kind", "colour"),
    [
        (Image.new("L", (80, 80), 100), "JPEG", (100, 100, 100)),
        (Image.new("CMYK", (80, 80), (0, 200, 200, 30)), "JPEG", (225, 48, 48)),  # (255-c)(255-k)/255
        (Image.fromarray(np.full((80, 80), 40000, np.uint16)), "PNG", (156, 156, 156)),  # 40000 / 256
        (Image.new("RGB", (80, 80), (10, 200, 30)).quantize(4), "PNG", (10, 200, 30)),
        (Image.new("RGBA", (80, 80), (200, 0, 0, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (80, 80), (0, 0, 0, 127)), "PNG", (128, 128, 128)),
        (Image.new("LA", (80, 80), (50, 255)), "PNG", (50, 50, 50)),
        (Image.new("1", (80, 80), 1), "PNG", (255, 255, 255)),
        (Image.new("RGB", (80, 80), (10, 200, 30)), "WEBP", (10, 200, 30)),
        (Image.new("RGB", (80, 80), (10, 200, 30)), "BMP", (10, 200, 30)),
    ],
    ids=["grey", "cmyk", "16-bit", "palette", "transparent", "half", "grey-alpha", "1-bit", "webp", "bmp"],
)
def test_every_kind_of_picture_becomes_rgb(image: Image.Image, kind: str, colour: tuple[int, ...]) -> None:
    pixels = decode(encoded(image, kind))
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 80, 80)
    expected = torch.tensor(colour)[:, None, None]
    assert (pixels.int() - expected).abs().max() <= 5


def test_palette_with_a_transparent_entry_shows_white() -> None:
    image = Image.new("P", (64, 64), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    assert decode(encoded(image, "PNG", transparency=b"\x00\xff")).float().mean() == 255


def test_16_bit_colour_png_is_converted() -> None:
    rows = b"".join(b"\0" + struct.pack(">HHH", 0xFFFF, 0x8000, 0x0100) * 64 for _ in range(64))

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert decode(data)[:, 5, 5].tolist() == [255, 128, 1]


@pytest.mark.parametrize(("reduction", "got"), [(1, (900, 1600)), (2, (450, 800)), (8, (113, 200))])
def test_a_reduced_decode_has_that_fraction_of_the_size(reduction: int, got: tuple[int, int]) -> None:
    data = encoded(corners(1600, 900))
    assert decode(data, reduction=reduction).shape == (3, *got)
    assert decode(encoded(corners(), "PNG"), reduction=reduction).shape == (3, 96, 160)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"just a text file\n" * 10, "is not an image"),
        (encoded(corners())[:-900], "is broken"),
        (encoded(corners(), "PNG")[:-60], "is broken"),
        (b"\xff\xd8\xff\xe0garbage", "is broken"),
        (png_header(30000, 30000), "30000x30000 px, expected at most 200,000,000"),
        (encoded(Image.new("RGB", (10, 10))), "10x10 px, expected at least 64"),
    ],
    ids=["zero", "text", "truncated-jpeg", "truncated-png", "garbage", "bomb", "10px"],
)
@pytest.mark.parametrize("read", [decode, verify])
def test_unusable_bytes_give_one_clear_line(data: bytes, said: str, read) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match=said) as caught:
        read(BytesImage("street/7.jpg", data))
    message = str(caught.value)
    assert message.startswith("street/7.jpg: ")
    assert "expected" in message
    assert "\n" not in message


def test_truncation_is_found_at_reduced_scale_too() -> None:
    data = encoded(corners(1600, 900))
    with pytest.raises(DataError, match="is broken"):
        decode(data[: len(data) // 2], reduction=8)


def test_missing_file_is_named_with_advice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jpg: there is no such file, expected .*: fix the path"):
        decode(FileImage(tmp_path / "gone.jpg"))


def test_limits_can_be_set() -> None:
    data = encoded(Image.new("RGB", (20, 20)))
    assert decode(data, min_side=16).shape == (3, 20, 20)
    with pytest.raises(DataError, match="at most 399"):
        decode(data, min_side=16, max_pixels=399)


def test_a_photo_above_pillows_own_limit_is_read_when_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow would warn, or raise from 200 px on
    assert decode(encoded(corners())).shape == (3, 96, 160)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0no TIFF header",  # Pillow raises SyntaxError
        b"Exif\0\0MM\0*\0\0\0\x08\0\x09" + b"\xff" * 40,  # nine entries are promised: Pillow warns
    ],
)
def test_broken_exif_does_not_make_a_photo_unreadable_nor_warn(exif: bytes, kind: str) -> None:
    data = encoded(corners(), kind, exif=exif)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert decode(data).shape == (3, 96, 160)
    assert not caught


def test_cells_of_a_table_become_sources(tmp_path: Path) -> None:
    data = encoded(corners())
    (tmp_path / "a.jpg").write_bytes(data)
    cells = [
        "a.jpg",
        tmp_path / "a.jpg",
        data,
        {"bytes": data, "path": "a.jpg"},
        {"bytes": None, "path": "a.jpg"},
    ]
    for cell in cells:
        assert as_image_source(cell, root=tmp_path, name="row 1").read() == data
    with pytest.raises(DataError, match="row 1: image is a float"):
        as_image_source(1.5, root=None, name="row 1")


def test_content_hash_is_sha256() -> None:
    assert content_hash(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def naive_mask(bits: np.ndarray, side: int) -> np.ndarray:
    """Mean over each cell's area, for sizes that are multiples of ``side``."""
    height, width = bits.shape
    planes = np.stack([(bits >> i & 1).astype(np.float32) for i in range(len(MASK_CLASSES))])
    return planes.reshape(6, side, height // side, side, width // side).mean(axis=(2, 4))


def test_mask_target_is_the_area_mean_of_each_class() -> None:
    generator = np.random.default_rng(0)
    bits = (generator.integers(0, 64, (24, 40)) * (generator.random((24, 40)) < 0.5)).astype(np.uint8)
    bits = np.kron(bits, np.ones((8, 16), np.uint8))  # 192 x 640, classes overlap
    target = decode_mask(PngMask(BytesImage("m", encoded(Image.fromarray(bits), "PNG"))))
    assert target.shape == (6, 64, 64)
    assert target.dtype == torch.float32
    np.testing.assert_allclose(target.numpy(), naive_mask(bits, 64), atol=2 / 255)


def test_a_small_cone_leaves_a_trace_in_a_large_mask() -> None:
    bits = np.zeros((3024, 4032), np.uint8)
    bits[2000:2025, 1000:1015] = 1
    target = decode_mask(PngMask(BytesImage("m", encoded(Image.fromarray(bits), "PNG"))))
    assert target[0].sum().item() == pytest.approx(25 * 15 / (47.25 * 63), abs=0.01)
    assert target[1:].sum() == 0


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (Image.new("RGB", (64, 64)), "mode 'RGB', expected an 8-bit greyscale"),
        (Image.new("L", (64, 64), 64), "values above 63"),
    ],
)
def test_unusable_masks_give_one_clear_line(image: Image.Image, said: str) -> None:
    with pytest.raises(DataError, match=said):
        decode_mask(PngMask(BytesImage("mask.png", encoded(image, "PNG"))))
