import logging
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from roadwork_dist.common.errors import DataError
from roadwork_dist.config.experiment import ColumnsConfig
from roadwork_dist.photos.check import check_images
from roadwork_dist.photos.manifest import Manifest, build_manifest


def picture(width: int, height: int, kind: str = "JPEG", mode: str = "RGB", orientation: int = 1) -> bytes:
    buffer, exif = BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.effect_noise((width, height), 50).convert(mode).save(buffer, kind, exif=exif)
    return buffer.getvalue()


def manifest_of(*rows: dict[str, object]) -> Manifest:
    return build_manifest(rows, name="train.csv", columns=ColumnsConfig())


def mixed() -> Manifest:
    good = picture(320, 240)
    mask = BytesIO()
    Image.new("L", (320, 240), 3).save(mask, "PNG")
    return manifest_of(
        {"image": good, "label": 1, "weather": "sunny", "mask": mask.getvalue()},
        {"image": good[: len(good) // 2], "label": 0, "weather": "hail"},
        {"image": picture(96, 64, "PNG"), "label": 0, "latitude": 1, "longitude": 2},
        {"image": picture(320, 240, orientation=6)},
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_unreadable_photos_are_dropped_and_said(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    progress: list[tuple[int, int]] = []
    manifest = mixed()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        report = check_images(
            manifest, max_share=0.25, workers=workers, on_progress=lambda *done: progress.append(done)
        )
    assert report.readable.ids == ("row-1", "row-3", "row-4")
    ((name, reason),) = report.unreadable
    assert name == "row-2"
    assert "is broken" in reason
    assert report.sizes.tolist() == [[240, 320], [64, 96], [320, 240]]  # the last one upright
    assert progress == [(n, 4) for n in range(1, 5)]
    assert "left out 1 of 4 photos" in caplog.text


def test_too_large_a_share_stops_with_the_figures() -> None:
    with pytest.raises(
        DataError,
        match=r"train.csv: 1 of 4 photos \(25.0%\) are unreadable, expected at most 24.0%.*row 2: is broken",
    ):
        check_images(mixed(), max_share=0.24)


def test_lines_tell_labels_nulls_sizes_words_and_broken_photos() -> None:
    text = "\n".join(check_images(mixed(), max_share=1.0).lines())
    assert "train.csv: 4 photos, 3 readable, 1 unreadable" in text
    assert "labels: 2 no roadwork · 1 roadwork · 1 unlabelled" in text
    assert "gps 75% · weather 75% · daytime 100%" in text
    assert "mask 75%" in text
    assert "320x240 ×1" in text
    assert "short side 64 to 240 px" in text
    assert "read as null: weather 'hail' ×1 (nearest: rainy," in text
    assert "unreadable: row-2: train.csv, row 2: is broken" in text


def test_a_set_without_faults_is_returned_as_it_is() -> None:
    manifest = manifest_of({"image": picture(64, 64)})
    report = check_images(manifest, max_share=0.0)
    assert report.readable is manifest
    assert report.unreadable == ()


def test_nothing_readable_is_still_reported() -> None:
    report = check_images(manifest_of({"image": b"x"}), max_share=1.0)
    assert len(report.readable) == 0
    assert report.sizes.shape == (0, 2)
    assert any("1 unreadable" in line for line in report.lines())


def test_masks_are_read_and_must_be_upright() -> None:
    lying = BytesIO()
    Image.fromarray(np.zeros((240, 320), np.uint8)).save(lying, "PNG")
    rotated = {"image": picture(320, 240, orientation=6), "mask": lying.getvalue()}
    broken = {"image": picture(320, 240), "mask": b"no png"}
    report = check_images(manifest_of(rotated, broken), max_share=1.0)
    reasons = [reason for _, reason in report.unreadable]
    assert "mask has 320x240 px but the upright photo 240x320" in reasons[0]
    assert "row 2, mask: is not an image" in reasons[1]


def test_pixel_limit_is_passed_on() -> None:
    with pytest.raises(DataError, match="expected at most 5,000 px"):
        check_images(manifest_of({"image": picture(100, 100)}), max_share=0.0, max_pixels=5000)
