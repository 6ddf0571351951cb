"""``roadwork-dist demo-real`` on cut-outs of its own."""

import json
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from roadwork_dist.cli.main import main

SMALL = (
    "--data.folds=2",
    "--views.size=64",
    "--model.width=64",
    "--epochs=1",
    "--augment.copies=1",
    "--eval.bootstrap=100",
    "--device=cpu",
)


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    for number in range(12):
        folder = tmp_path / "stamps" / ("town/roadsigns" if number % 3 == 0 else "animals/birds")
        folder.mkdir(parents=True, exist_ok=True)
        stamp = Image.new("RGBA", (90, 60), (0, 0, 0, 0))
        ImageDraw.Draw(stamp).ellipse((10, 5, 80, 55), fill=(20 * number, 200, 10, 255))
        stamp.save(folder / f"thing_{'abcdefghijkl'[number]}.png")
    return tmp_path / "stamps"


def test_it_writes_the_photos_and_prints_the_figures(
    stamps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = (f"--stamps={stamps}", f"--photos={tmp_path}/photos", f"--features.dir={tmp_path}/features")
    assert main(["demo-real", *places, f"--output_dir={tmp_path}/run", *SMALL]) == 0
    said = capsys.readouterr().out
    assert "real photographs" in said
    assert "out-of-fold: 12 labelled photos, 4 with roadwork" in said
    assert "MCC" in said
    assert "missed roadwork" in said
    assert f"report: {tmp_path}/run/report.html" in said
    assert (tmp_path / "run/report.html").is_file()
    assert json.loads((tmp_path / "run/evaluation.json").read_text())["out-of-fold"]["scored"] == 12


def test_missing_stamps_say_what_to_install(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo-real", f"--stamps={tmp_path}/none", f"--photos={tmp_path}/photos"]) == 2
    assert "apt-get install tuxpaint-stamps-default" in capsys.readouterr().err
    assert not (tmp_path / "photos").exists()


def test_its_own_options_are_in_the_help_and_wrong_settings_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo-real", "--help"])
    assert stop.value.code == 0
    assert "--photos FOLDER" in capsys.readouterr().out
    assert main(["demo-real", "--optim.lrr=1"]) == 2
    assert "optim.lr" in capsys.readouterr().err
