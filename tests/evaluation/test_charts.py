import math
import xml.etree.ElementTree as ElementTree

import pytest

from roadwork_dist.evaluation.charts import (
    Line,
    Scale,
    domain,
    histogram,
    line_chart,
    path,
    reliability,
    thin,
    tick_text,
    ticks,
    wilson,
)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 288, [0, 50, 100, 150, 200, 250]),
        (2, 2, [2]),
        (math.nan, 1, []),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.25, "0.25"), (0, "0"), (3e-4, "3e-4"), (12000, "12k"), (-0.5, "-0.5"), (150, "150")],
)
def test_tick_texts_are_short(value: float, text: str) -> None:
    assert tick_text(value) == text


def test_scale_maps_the_ends_and_survives_an_empty_range() -> None:
    assert [Scale(0, 10, 100, 0)(v) for v in (0, 5, 10)] == [100, 50, 0]
    assert Scale(3, 3, 0, 10)(3) == 0


def test_domain_of_nothing_and_of_one_value() -> None:
    assert domain([]) == (0, 1)
    assert domain([math.nan]) == (0, 1)
    low, high = domain([5.0])
    assert low < 5 < high


def test_a_point_that_is_not_finite_leaves_a_gap() -> None:
    scale = Scale(0, 1, 0, 1)
    assert path([(0, 0), (1, math.nan), (2, 1), (3, 1)], scale, scale) == "M0.0,0.0M2.0,1.0L3.0,1.0"


def test_thinning_keeps_the_mean_and_the_length_low() -> None:
    points = [(float(i), float(i % 7)) for i in range(1000)]
    few = thin(points, 100)
    assert len(few) == 100
    assert sum(y for _, y in few) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
    assert thin(points[:50], 100) == points[:50]


def test_line_chart_draws_each_curve_and_says_its_end() -> None:
    lines = [Line("a <b>", [(0, 1), (1, 2)], "c1"), Line("none", [(0, math.nan)], "c2")]
    chart = line_chart("Loss & more", lines, x_label="step")
    root = ElementTree.fromstring(chart.svg)
    assert root.get("aria-label") == "Loss & more: a <b> ends at 2"
    assert [p.get("class") for p in root.iter("path")] == ["line c1"]
    assert chart.legend == []


def test_a_chart_of_nothing_is_well_formed() -> None:
    root = ElementTree.fromstring(line_chart("Loss", [], x_label="step").svg)
    assert root.get("aria-label") == "Loss: no values"
    ElementTree.fromstring(reliability("Reliability", []).svg)
    ElementTree.fromstring(histogram("p", [0] * 5, [0] * 5, 0.5).svg)


def test_histogram_bars_are_as_high_as_their_counts() -> None:
    root = ElementTree.fromstring(histogram("p", [0, 4], [2, 0], 0.25).svg)
    heights = [float(rect.get("height", 0)) for rect in root.iter("rect")]
    assert heights[1] == pytest.approx(2 * heights[2], abs=0.15)
    assert heights[0] == heights[3] == 0
    assert "threshold 0.25" in [text.text for text in root.iter("text")]


def test_reliability_writes_the_counts() -> None:
    root = ElementTree.fromstring(reliability("Reliability", [(0.1, 0.0, 7), (0.9, 1.0, 3)]).svg)
    assert [text.text for text in root.iter("text") if text.get("class") == "count"] == ["7", "3"]


def test_wilson_interval() -> None:
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
