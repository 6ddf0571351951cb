"""Everything that may be wrong with tables, photos and folders, through the command line."""

import csv
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.tiny_run import tiny_arguments, tiny_set

from roadwork_dist.cli.main import main
from roadwork_dist.demo.synthetic.dataset import SyntheticSet

Row = dict[str, Any]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SyntheticSet:
    return tiny_set(tmp_path_factory.mktemp("synthetic"))


def rows_of(table: Path) -> list[Row]:
    """Rows with absolute paths, so that a changed table can lie elsewhere."""
    with table.open(newline="") as file:
        rows: list[Row] = list(csv.DictReader(file))
    return [{**row, "image": str(table.parent / row["image"]), "mask": ""} for row in rows]


def write_rows(path: Path, rows: list[Row]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def stopped(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command says which stops with exit code 2."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def change(number: int, **cells: Any) -> Callable[[list[Row]], list[Row]]:
    """Change cells of a row, counted from 1."""

    def apply(rows: list[Row]) -> list[Row]:
        rows[number - 1] |= cells
        return rows

    return apply


def drop(column: str) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [{name: cell for name, cell in row.items() if name != column} for row in rows]


TABLES: dict[str, tuple[Callable[[list[Row]], list[Row]], str]] = {
    "missing column": (drop("image"), "has no column 'image' for the image, expected one of id, label"),
    "no labels": (drop("label"), "no row has a label, expected 0 or 1"),
    "wrong type": (change(2, latitude="north"), "row 2: latitude is 'north', expected degrees"),
    "label 2": (change(3, label=2), "row 3: label is '2', expected 0 (no roadwork), 1 (roadwork) or null"),
    "duplicate id": (change(4, id="train-00000"), "row 4: id 'train-00000' is also the id of row 1"),
    "latitude 97": (change(1, latitude=97), "row 1: latitude is '97', expected degrees from -90 to 90"),
    "longitude 181": (
        change(1, longitude=181),
        "row 1: longitude is '181', expected degrees from -180 to 180",
    ),
    "no image": (change(5, image=""), "row 5: image is null"),
}


@pytest.mark.parametrize("command", ["pretrain", "data check"])
@pytest.mark.parametrize("case", TABLES)
def test_a_wrong_table_stops(
    case: str, command: str, data: SyntheticSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, says = TABLES[case]
    table = write_rows(tmp_path / "mine.csv", spoil(rows_of(data.train)))
    line = stopped([*command.split(), *tiny_arguments(data, tmp_path), f"--data.train={table}"], capsys)
    assert "mine.csv" in line
    assert says in line


def test_a_source_without_labels_is_said_to_be_of_little_use(
    data: SyntheticSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "no row has a label (column 'label'): these photos can be predicted"
    for name, spoil in (("none", drop("label")), ("some", change(1, label=""))):
        table = write_rows(tmp_path / f"{name}.csv", spoil(rows_of(data.train)))
        assert main(["data", "check", str(table)]) == 0
        assert (told in capsys.readouterr().out) == (name == "none")


def test_an_empty_split_stops(data: SyntheticSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "val.csv"
    empty.write_text("image,label\n")
    line = stopped(["pretrain", *tiny_arguments(data, tmp_path), f"--data.val={empty}"], capsys)
    assert "val.csv: has no rows, expected at least one photo" in line


def test_an_unknown_word_is_counted_and_reported_once(
    data: SyntheticSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row | {"weather": "hail" if number < 3 else ""} for number, row in enumerate(rows_of(data.train))]
    table = write_rows(tmp_path / "mine.csv", rows)
    assert main(["data", "check", str(table)]) == 0
    text = capsys.readouterr()
    assert text.out.count("hail") == 1
    assert "read as null: weather 'hail' ×3 (nearest: rainy," in text.out
    assert "hail" not in text.err


def test_a_folder_that_cannot_be_written_stops(
    data: SyntheticSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    arguments = [*tiny_arguments(data, tmp_path), f"--output_dir={tmp_path / 'file' / 'run'}"]
    line = stopped(["pretrain", *arguments], capsys)
    assert "file/run cannot be written to" in line
    assert "--output_dir" in line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--optim.name=adamv"], "unknown optimizer 'adamv': did you mean 'adamw'"),
        (["--schedule.name=cosin"], "unknown schedule 'cosin': did you mean 'cosine'"),
        (["--monitor=mcccc"], "monitor is 'mcccc', expected one of loss, mcc, accuracy"),
        (["--model.metadata=true", "--data.text_encoder=./none"], "none is not a folder"),
        (["--resume=never"], "run holds checkpoints up to step 2: choose another output_dir"),
    ],
)
def test_a_recipe_that_cannot_start_is_told_before_features_are_computed(
    words: list[str],
    says: str,
    data: SyntheticSet,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def extract(*arguments: Any, **named: Any) -> None:
        raise AssertionError("features are computed")

    monkeypatch.setattr("roadwork_dist.recipes.data.extract", extract)
    (tmp_path / "run" / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert says in stopped(["pretrain", *tiny_arguments(data, tmp_path), *words], capsys)


def jpeg(mode: str = "RGB", size: tuple[int, int] = (160, 120), orientation: int = 1) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.effect_noise(size, 60).convert(mode).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def png_16_bit() -> bytes:
    buffer = io.BytesIO()
    values = np.arange(160 * 120, dtype=np.uint16).reshape(120, 160) * 3
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of 30000x30000 px in a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


BROKEN: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "there is no such file, expected a photo"),
    "truncated": (jpeg()[:2000], "is broken"),
    "zero bytes": (b"", "the file is empty (0 bytes)"),
    "text": (b"I am no photo\n", "is not an image"),
    "bomb": (bomb(), "has 30000x30000 px, expected at most 200,000,000 px"),
    "10 px": (jpeg(size=(10, 10)), "has 10x10 px, expected at least 64 px"),
}

ACCEPTED = {"CMYK": jpeg("CMYK"), "grey": jpeg("L"), "rotated": jpeg(orientation=6), "16-bit": png_16_bit()}


def with_photos(data: SyntheticSet, folder: Path, photos: dict[str, bytes | None]) -> Path:
    """The training table with some photos replaced, beginning with the second."""
    rows = rows_of(data.train)
    for row, (name, content) in zip(rows[1:], photos.items(), strict=False):
        path = folder / f"{name.replace(' ', '-')}.jpg"
        row["image"] = str(path)
        if content is not None:
            path.write_bytes(content)
    return write_rows(folder / "mine.csv", rows)


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_photo_is_counted_and_past_the_share_stops(
    case: str, data: SyntheticSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, says = BROKEN[case]
    table = str(with_photos(data, tmp_path, {case: content}))
    assert main(["data", "check", table, "--data.max_unreadable_share=0.125"]) == 0
    text = capsys.readouterr().out
    assert "8 photos, 7 readable, 1 unreadable" in text
    assert f"unreadable: train-00001: {tmp_path / case.replace(' ', '-')}.jpg: {says}" in text
    line = stopped(["data", "check", table, "--data.max_unreadable_share=0.12"], capsys)
    assert "1 of 8 photos (12.5%) are unreadable, expected at most 12.0%" in line
    assert f"{case.replace(' ', '-')}.jpg: {says}" in line


@pytest.mark.parametrize("mode", ["cached", "online"])
def test_broken_photos_past_the_share_stop_a_run_before_training(
    mode: str, data: SyntheticSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = with_photos(data, tmp_path, {name: content for name, (content, _) in BROKEN.items()})
    arguments = [*tiny_arguments(data, tmp_path), f"--data.train={table}", f"--features.mode={mode}"]
    line = stopped(["pretrain", *arguments], capsys)
    assert "6 of 8 photos (75.0%) are unreadable, expected at most 1.0%" in line
    assert "and 3 more" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_broken_photos_below_the_share_are_left_out_and_odd_ones_are_trained_on(
    data: SyntheticSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos = {"text": BROKEN["text"][0], **ACCEPTED}
    table = with_photos(data, tmp_path, photos)
    arguments = [*tiny_arguments(data, tmp_path), f"--data.train={table}", "--data.max_unreadable_share=0.2"]
    assert main(["pretrain", *arguments, "--eval.report=false", "--gps.enabled=false"]) == 0
    assert "left out 1 of 8 photos that are unreadable" in caplog.text
    (line,) = [
        text for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if '"val"' in text
    ]
    assert "mcc" in line


def test_odd_photos_are_accepted(
    data: SyntheticSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = with_photos(data, tmp_path, dict(ACCEPTED))
    assert main(["data", "check", str(table)]) == 0
    text = capsys.readouterr().out
    assert "8 photos, 8 readable, 0 unreadable" in text
    assert "120x160 ×1" in text  # the rotated one, upright
