import json
import math
from pathlib import Path

import pytest
from support.synthetic_run import synthetic_history

from roadwork_dist.common.errors import DataError
from roadwork_dist.evaluation.history import (
    curve,
    fold_charts,
    read_history,
    training_charts,
    training_facts,
)


def test_history_is_read_back(tmp_path: Path) -> None:
    lines = synthetic_history(epochs=2, steps=3)
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_history(tmp_path / "m.jsonl") == lines
    assert read_history(tmp_path / "absent.jsonl") == []


def test_a_cut_last_line_is_left_out_but_not_one_before(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    assert read_history(path) == [{"kind": "train", "step": 1}]
    path.write_text('{"kind": "tr\n{"kind": "train", "step": 1}\n')
    with pytest.raises(DataError, match=r"m\.jsonl, line 1 is not JSON"):
        read_history(path)
    path.write_text("3\n")
    with pytest.raises(DataError, match="line 1 is 3, expected a JSON object"):
        read_history(path)


def test_figures_written_as_text_are_numbers_again() -> None:
    history = [{"kind": "train", "step": 1, "loss": "nan"}, {"kind": "train", "step": 2, "loss": 0.5}]
    points = curve(history, "train", "loss")
    assert math.isnan(points[0][1])
    assert points[1] == (2.0, 0.5)


def test_charts_show_loss_parts_validation_and_rate() -> None:
    charts = training_charts(synthetic_history())
    assert [chart.title for chart in charts] == [
        "Loss",
        "Parts of the training loss",
        "Validation",
        "Learning rate",
    ]
    assert [line.name for line in charts[0].legend] == ["training", "validation"]
    assert [line.name for line in charts[1].legend] == ["focal", "consistency", "weather", "dice"]
    assert charts[0].svg.count('class="skip"') == 1
    assert charts[2].svg.count("<circle") == 24  # 12 validations, two figures


@pytest.mark.parametrize(
    "history",
    [
        [],
        [{"kind": "train", "step": 1, "loss": 0.5}],
        [{"kind": "train", "step": 1, "loss": "nan"}],
        [{"kind": "val", "step": 4, "mcc": -0.2, "loss": 1.0}],
        [{"kind": "skip", "step": 1, "loss": "inf"}],
    ],
)
def test_short_and_odd_histories(history: list[dict[str, object]]) -> None:
    assert len(training_charts(history)) == (4 if history else 0)
    training_facts(history)


def test_facts() -> None:
    facts = dict(training_facts(synthetic_history()))
    best = max((y, x) for x, y in curve(synthetic_history(), "val", "mcc"))
    assert facts["Optimizer steps"] == "287"
    assert facts["Epochs"] == "12"
    assert facts["Skipped steps"] == "1"
    assert facts["Photos per second"] == "41.5"
    assert facts["Waiting for data"] == "4.3%"
    assert facts["Best validation MCC"] == f"{best[0]:.3f} at step {best[1]:.0f}"


def test_every_fold_has_a_line() -> None:
    (chart,) = fold_charts({"fold 0": synthetic_history(2, 3), "fold 1": synthetic_history(3, 3)})
    assert [line.name for line in chart.legend] == ["fold 0", "fold 1"]
    assert fold_charts({}) == fold_charts({"fold 0": []}) == []
