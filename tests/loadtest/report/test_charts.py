"""Positions by hand, and elements that parse."""

from xml.etree import ElementTree

import pytest

from loadtest.report import charts
from loadtest.report.charts import Scale


def test_even_scale_by_hand() -> None:
    scale = Scale(10.0, 20.0, 0.0, 100.0)
    assert (scale(10.0), scale(15.0), scale(20.0)) == (0.0, 50.0, 100.0)
    assert scale.ticks() == [10, 12, 14, 16, 18, 20]


def test_log_scale_by_hand() -> None:
    scale = Scale(1.0, 100.0, 0.0, 100.0, is_log=True)
    assert scale(10.0) == pytest.approx(50.0)
    assert scale.ticks() == [1, 2, 5, 10, 20, 50, 100]


def test_whole_numbers_only() -> None:
    assert Scale(0.5, 2.5, 0.0, 1.0, is_whole=True).ticks() == [1, 2]


def test_scales_take_the_logarithm_where_values_span_tenfold() -> None:
    assert charts.x_scale([1.0, 11.0]).is_log
    assert not charts.x_scale([1.0, 9.0]).is_log
    assert not charts.x_scale([0.0, 9.0]).is_log


@pytest.mark.parametrize("values", [[3.0], [0.0], [2.0, 2.0]])
def test_equal_values_still_have_a_scale(values: list[float]) -> None:
    scale = charts.y_scale(values)
    assert scale.low < values[0] < scale.high
    assert scale.ticks()


def test_thinning_keeps_both_ends() -> None:
    assert charts.thinned(range(5)) == [0, 1, 2, 3, 4]
    found = charts.thinned(range(10_000))
    assert len(found) == charts.MAX_POINTS
    assert (found[0], found[-1]) == (0, 9999)
    assert found == sorted(set(found))


def test_steps_go_right_before_up() -> None:
    x = y = Scale(0.0, 10.0, 0.0, 10.0)
    path = charts.steps([(0.0, 0.0), (4.0, 5.0)], x, y, "v0")
    assert 'points="0.0,0.0 4.0,0.0 4.0,5.0"' in path


def test_a_chart_parses_and_escapes() -> None:
    x, y = charts.x_scale([0.0, 1.0]), charts.y_scale([0.0, 1.0])
    marks = [
        charts.line([(0.0, 0.0), (1.0, 1.0)], x, y, "v0"),
        charts.dots([(0.5, 0.5, "a < b")], x, y, "v1"),
        charts.crosses([(0.5, "lost & gone")], x, charts.TOP, "v1"),
        charts.labels([(0.1, 0.5, "left"), (0.9, 0.5, "right")], x, y),
        charts.band(0.2, 0.4, y),
        charts.level(0.3, y, "even"),
    ]
    svg = charts.chart("a <title>", x, y, "x & y", "<y>", marks)
    root = ElementTree.fromstring(svg)
    texts = [element.text for element in root.iter() if element.text]
    assert {"a <title>", "x & y", "<y>", "a < b", "lost & gone", "left", "right"} <= set(texts)
    anchors = {e.text: e.get("text-anchor") for e in root.iter("text")}
    assert (anchors["left"], anchors["right"]) == ("start", "end")


@pytest.mark.parametrize(
    ("low", "high", "kind"), [(1.1, 1.3, "better"), (0.8, 0.9, "worse"), (0.9, 1.1, "same")]
)
def test_bars_tell_on_which_side_of_one_they_are(low: float, high: float, kind: str) -> None:
    bar = ElementTree.fromstring(charts.interval_bar((low + high) / 2, low, high, (0.5, 2.0)))
    assert bar.get("class") == f"bar {kind}"
    even, range_ = bar.iter("line")
    assert float(even.attrib["x1"]) == 80.0  # 1 lies in the middle of 1/2 to 2
    assert (float(range_.attrib["x1"]) > 80) == (low > 1)
