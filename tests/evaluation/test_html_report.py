import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from support.synthetic_run import synthetic_history, synthetic_predictions, synthetic_views

from roadwork_dist.common.errors import DataError
from roadwork_dist.evaluation.evaluator import evaluate_predictions, labels_and_probabilities
from roadwork_dist.evaluation.predictions import write_predictions
from roadwork_dist.evaluation.report import (
    EvaluatedSplit,
    ReportInput,
    render,
    report_from_run,
    splits_of,
    write_report,
)
from roadwork_dist.metrics.classification import best_threshold

VOID = {"meta", "img", "br", "link", "hr", "input"}
LOADING = {"src", "href", "srcset", "data", "poster", "action", "background", "xlink:href"}


class Page(HTMLParser):
    """Reads a page, checks that elements nest, and keeps what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "elements left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, f"{tag} closed out of turn"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def assert_loads_nothing(self, source: str) -> None:
        for tag, attributes in self.tags:
            assert tag not in ("script", "link", "iframe", "object", "embed"), tag
            assert not [key for key in attributes if key.startswith("on")]
            for key in LOADING & set(attributes):
                assert attributes[key].startswith(("#", "data:image/jpeg;base64,")), (
                    tag,
                    key,
                    attributes[key][:80],
                )
        style = re.findall(r"<style>(.*?)</style>", source, re.S)
        assert len(style) == 1
        assert "url(" not in style[0]
        assert "@import" not in style[0]
        assert "@font-face" not in style[0]


def split_of(frame: pd.DataFrame, **settings: Any) -> EvaluatedSplit:
    name = settings.pop("name", "val")
    given = {"threshold": 0.5, "held_out": False, "threshold_from": name, **settings}
    return EvaluatedSplit(name=name, frame=frame, **given)


def page_of(*splits: EvaluatedSplit, **settings: Any) -> tuple[Page, str]:
    given = {"title": "run 7", "synthetic": False, "bootstrap": 100, **settings}
    source = render(ReportInput(sections=splits, **given))
    page = Page(source)
    page.assert_loads_nothing(source)
    for drawing in re.findall(r"<svg.*?</svg>", source, re.S):
        root = ElementTree.fromstring(drawing)
        assert root.get("aria-label") or root.get("aria-hidden") == "true"
        assert not re.search(r"\b(nan|inf)\b", drawing)
    return page, source


def test_whole_page(tmp_path: Path) -> None:
    target = synthetic_predictions(90, "target", seed=1, skill=1.5)
    splits = [
        split_of(synthetic_predictions(60), threshold=0.47),
        split_of(target, name="target", threshold=0.47, held_out=True, threshold_from="val"),
    ]
    report = ReportInput(
        title="demo <run>",
        synthetic=True,
        history=synthetic_history(),
        sections=splits,
        config_text="seed: 42\n",
        views_of=lambda split, name: synthetic_views(name),
        environment={"torch": "2.9"},
        bootstrap=100,
    )
    write_report(tmp_path / "report.html", report)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(source) < 3_000_000
    page = Page(source)
    page.assert_loads_nothing(source)
    assert "Synthetic data." in page.text
    assert "demo <run>" in page.text
    assert page.text.index("Photos: target held out") < page.text.index("Photos: val used for choices")
    assert "seed: 42" in page.text
    assert "torch 2.9" in page.text
    for title in (
        "Loss",
        "Learning rate",
        "Reliability",
        "Confusion matrix",
        "Slices",
        "Worst errors",
        "ROC curve",
    ):
        assert title in page.text
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    errors = [section_errors(split) for split in splits]
    assert len(pictures) == 12 * sum(min(10, count) for count in errors)
    assert all(picture["alt"] for picture in pictures)
    assert page.text.count("pruned") == 4 * sum(min(10, count) for count in errors)


def section_errors(split: EvaluatedSplit) -> int:
    counts = evaluate_predictions(split.frame, threshold=split.threshold, bootstrap=100)["confusion"]
    return int(counts["fp"] + counts["fn"])


def test_figures_of_the_page_are_those_of_the_metrics() -> None:
    frame = synthetic_predictions(100, skill=1.2)
    page, source = page_of(split_of(frame))
    result = evaluate_predictions(frame, threshold=0.5, bootstrap=100, seed=42)
    for figure in result["metrics"].values():
        texts = [f"{figure[key]:.3f}" for key in ("value", "low", "high")]
        assert f"{texts[0]} {texts[1]} – {texts[2]}" in page.text
    mcc = result["metrics"]["mcc"]
    # the interval is drawn where it lies: the axis goes from 0 to 1
    start, width = re.findall(r'class="range" style="left:([\d.]+)%;width:([\d.]+)%"', source)[0]
    assert float(start) == pytest.approx(100 * mcc["low"], abs=0.01)
    assert float(width) == pytest.approx(100 * (mcc["high"] - mcc["low"]), abs=0.02)
    counts = result["confusion"]
    cells = re.findall(r"<b>(\d+)</b>", source)
    assert cells == [str(counts[key]) for key in ("tp", "fn", "fp", "tn")]
    right = counts["tp"] + counts["tn"]
    assert f"{right} right, {counts['fp']} false alarms, {counts['fn']} missed" in source


def test_optimism_and_honesty_are_said() -> None:
    frame = synthetic_predictions(60, skill=1.2)
    optimistic, _ = page_of(split_of(frame))
    assert "chosen on these same photos, so the figures are optimistic" in optimistic.text
    assert "95 % interval of that choice" in optimistic.text
    honest, _ = page_of(split_of(frame, name="target", held_out=True, threshold_from="val"))
    assert "No weight, checkpoint or threshold was chosen with the labels" in honest.text
    assert "optimistic" not in honest.text
    assert "chosen on “val”" in honest.text
    fixed, _ = page_of(split_of(frame, threshold_from=None))
    assert "fixed in advance" in fixed.text


def test_the_width_of_the_interval_is_said() -> None:
    frame = synthetic_predictions(25, skill=1.2)
    mcc = evaluate_predictions(frame, threshold=0.5, bootstrap=100)["metrics"]["mcc"]
    page, _ = page_of(split_of(frame))
    assert f"With 25 photos, the interval of MCC is {mcc['high'] - mcc['low']:.2f} wide" in page.text


def test_real_data_is_not_called_synthetic() -> None:
    page, _ = page_of(split_of(synthetic_predictions(20)))
    assert "ynthetic" not in page.text


HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>&amp;'


def test_hostile_names_stay_text() -> None:
    frame = synthetic_predictions(40, skill=0.1)
    frame["id"] = [f"{HOSTILE}{i}" for i in range(40)]
    frame["weather"] = frame["scene"] = HOSTILE
    frame[["latitude", "longitude"]] = [41.9, -87.6]
    frame.loc[3, ["latitude", "longitude"]] = [48.9, 2.3]
    page, source = page_of(
        split_of(frame, name=HOSTILE, role=HOSTILE),
        title=HOSTILE,
        config_text=HOSTILE,
        environment={HOSTILE: HOSTILE},
        history=[{"kind": "train", "step": 1, "loss": 1.0, f"loss/{HOSTILE}": 1.0, f"loss/b{HOSTILE}": 2.0}],
        views_of=lambda split, name: synthetic_views("x", views=1, side=32),
    )
    assert "<script" not in source
    assert page.text.count("<script>alert(1)</script>") > 40


def nothing(frame: pd.DataFrame) -> None:
    """Leave the frame as it is."""


def no_gps(frame: pd.DataFrame) -> None:
    frame[["latitude", "longitude"]] = math.nan


def no_metadata(frame: pd.DataFrame) -> None:
    frame[["weather", "daytime", "scene"]] = None


def one_class(frame: pd.DataFrame) -> None:
    frame["label"] = 1


def no_labels(frame: pd.DataFrame) -> None:
    frame["label"] = pd.array([pd.NA] * len(frame), dtype="Int64")


def no_probabilities(frame: pd.DataFrame) -> None:
    frame["probability"] = math.nan


def one_probability(frame: pd.DataFrame) -> None:
    frame["probability"] = 0.5


def perfect(frame: pd.DataFrame) -> None:
    frame["probability"] = frame["label"].astype(float)


def inverted(frame: pd.DataFrame) -> None:
    frame["probability"] = 1 - frame["probability"]


def no_gates(frame: pd.DataFrame) -> None:
    frame["view_gates"] = None


def no_sizes(frame: pd.DataFrame) -> None:
    frame[["width", "height"]] = pd.NA


@pytest.mark.parametrize("rows", [1, 30])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (nothing, "Slices"),
        (no_gps, "there is no map"),
        (no_metadata, "Slices"),
        (one_class, "All labels are of one class"),
        (no_labels, "there are no figures"),
        (no_probabilities, "there are no figures"),
        (one_probability, "Slices"),
        (perfect, "There is no error"),
        (inverted, "Worst errors"),
        (no_gates, "Slices"),
        (no_sizes, "Slices"),
    ],
)
def test_poor_data_makes_a_page_too(spoil: Any, said: str, rows: int) -> None:
    frame = synthetic_predictions(rows)
    spoil(frame)
    page, _ = page_of(split_of(frame), views_of=lambda split, name: synthetic_views(name, side=32))
    assert said in page.text


def test_one_error_among_hundreds_is_not_none() -> None:
    frame = synthetic_predictions(600)
    frame["label"] = pd.array([0] * 300 + [1] * 300, dtype="Int64")
    frame["probability"] = [0.9] + [0.1] * 299 + [0.1] * 30 + [0.9] * 270
    page, _ = page_of(split_of(frame))
    for said in ("0.3 % false alarms", "99.7 % right", "90 % found", "10 % missed"):
        assert said in page.text


def test_a_property_that_parts_nothing_has_no_table() -> None:
    frame = synthetic_predictions(30)
    frame[["weather", "daytime"]] = None
    _, source = page_of(split_of(frame))
    assert "<caption>scene</caption>" in source
    assert "<caption>weather</caption>" not in source
    alone, _ = page_of(split_of(synthetic_predictions(1)))
    assert "No known property divides these photos" in alone.text


def test_a_cross_validation_says_what_held_out_means(run_dir: Path) -> None:
    frame = synthetic_predictions(40, "out-of-fold", skill=1.2)
    rows = [{**row, "fold": number % 4} for number, row in enumerate(rows_of(frame))]
    write_predictions(run_dir / "predictions.parquet", rows)
    history = (run_dir / "metrics.jsonl").rename(run_dir / "history")
    for fold in range(4):
        (run_dir / f"fold-{fold}").mkdir()
        (run_dir / f"fold-{fold}" / "metrics.jsonl").write_bytes(history.read_bytes())
    page = Page(source := report_from_run(run_dir).read_text(encoding="utf-8"))
    assert "MCC out of fold (every photo held out once)" in page.text
    assert "predicted by a model that was trained without it (4 folds)" in page.text
    assert "No weight, checkpoint or threshold was chosen" not in page.text
    assert "Threshold 0.500, fixed in advance." in page.text
    assert "Loss of each fold" in page.text
    assert "<caption>fold</caption>" in source
    assert all(f"fold {fold} 10 " in page.text for fold in range(4))


def test_a_negative_mcc_widens_the_axis() -> None:
    frame = synthetic_predictions(60)
    inverted(frame)
    mcc = evaluate_predictions(frame, threshold=0.5, bootstrap=100)["metrics"]["mcc"]
    assert mcc["value"] < -0.5
    page, _ = page_of(split_of(frame))
    assert f"−{abs(mcc['value']):.3f}" in page.text
    assert "−1 −0.5 0 0.5 1" in page.text


def test_a_perfect_score_does_not_look_certain() -> None:
    frame = synthetic_predictions(50)
    perfect(frame)
    page, _ = page_of(split_of(frame))
    assert "from 50 photos. No error in so few photos still allows 5.8 % errors." in page.text


def test_nothing_at_all_makes_a_page() -> None:
    page, _ = page_of()
    assert "No set of photos was evaluated." in page.text
    assert "The configuration is not available." in page.text


def test_photos_not_at_hand_are_said_and_listed() -> None:
    frame = synthetic_predictions(60, skill=0.3)
    page, _ = page_of(split_of(frame), views_of=None)
    assert page.text.count("The photos are not available") == 10
    assert not [tag for tag, _ in page.tags if tag == "img"]


def test_galleries_stop_after_two_sets() -> None:
    frame = synthetic_predictions(30, skill=0.2)
    splits = [split_of(frame, name=name) for name in ("a", "b", "c")]
    page, _ = page_of(*splits, views_of=lambda split, name: synthetic_views(name, views=1, side=32))
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 20


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{**row, "fold": None, "label": int(row["label"])} for row in frame.to_dict("records")]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    frames = [synthetic_predictions(50, "val"), synthetic_predictions(40, "target", skill=1.2)]
    rows = [row for frame in frames for row in rows_of(frame)]
    write_predictions(tmp_path / "predictions.parquet", rows, synthetic=True)
    lines = [json.dumps(line) for line in synthetic_history(2, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"seed": 5, "eval": {"bootstrap": 150, "worst": 2}}))
    return tmp_path


def test_report_of_a_run_folder(run_dir: Path) -> None:
    path = report_from_run(run_dir)
    page = Page(path.read_text(encoding="utf-8"))
    assert path == run_dir / "report.html"
    assert "Synthetic data." in page.text
    assert "Optimizer steps 8" in page.text
    threshold = best_threshold(*labels_and_probabilities(synthetic_predictions(50, "val")))
    target = synthetic_predictions(40, "target", skill=1.2)
    mcc = evaluate_predictions(target, threshold=threshold, bootstrap=150, seed=5)["metrics"]["mcc"]
    assert f"95 % bootstrap interval {mcc['low']:.3f} – {mcc['high']:.3f}, from 40 photos" in page.text
    assert "The 2 of " in page.text


def test_report_of_a_folder_with_predictions_alone(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "config.yaml").unlink()
    page = Page(report_from_run(run_dir, synthetic=False, threshold=0.3).read_text(encoding="utf-8"))
    assert "Synthetic" not in page.text
    assert "Threshold 0.300, fixed in advance." in page.text


def test_a_folder_without_predictions_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"predictions\.parquet does not exist"):
        report_from_run(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        report_from_run(tmp_path / "absent")


def test_threshold_is_chosen_on_validation_only() -> None:
    val, target = synthetic_predictions(50, "val"), synthetic_predictions(40, "target")
    target["label"] = 1 - target["label"]  # would move the threshold if it were looked at
    splits = {split.name: split for split in splits_of(pd.concat([val, target]))}
    expected = best_threshold(*labels_and_probabilities(val))
    assert {split.threshold for split in splits.values()} == {expected}
    assert {split.threshold_from for split in splits.values()} == {"val"}
    assert (splits["val"].held_out, splits["target"].held_out) == (False, True)
    alone = splits_of(target)[0]
    assert (alone.threshold, alone.threshold_from) == (0.5, None)
