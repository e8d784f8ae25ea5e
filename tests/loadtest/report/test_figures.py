"""What is drawn, by the values in the axes, and elements that parse and are always the same."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from loadtest.report import figures
from loadtest.report.result import result_of
from tests.loadtest.recordings import four_pairs, recorded, request, two_pairs

RUN = two_pairs()
RESULT = result_of(RUN)


def drawn(draw: Callable[..., str], *arguments: Any) -> tuple[Any, str]:
    """The axes and the caption of one chart."""
    axes = Figure().subplots()
    return axes, draw(axes, *arguments)


def lines_of(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """By label, the points of each line."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for line in axes.get_lines():
        points = zip(line.get_xdata(), line.get_ydata(), strict=True)
        lines[line.get_label()] = [(float(across), float(up)) for across, up in points]
    return lines


def test_a_distribution_by_hand() -> None:
    axes, caption = drawn(figures.distribution, RUN, "ttft")
    lines = lines_of(axes)
    # 1, 2, 3, 3, 3 and 5 s; the line goes on to the longest of both, 9 s.
    across, up = zip(*lines["sparse, n = 6"], strict=True)
    assert across == pytest.approx([1000, 1000, 2000, 3000, 3000, 3000, 5000, 9000])
    assert up == pytest.approx([number / 6 for number in (0, 1, 2, 3, 4, 5, 6, 6)])
    assert {line.get_drawstyle() for line in axes.get_lines()} == {"steps-post"}
    assert axes.get_xscale() == "linear"
    assert caption == "Further left is faster."
    lost = request(0, 0, "dense", None)
    axes, _ = drawn(figures.distribution, recorded([*RUN.requests, lost]), "ttft")
    assert lines_of(axes)["dense, n = 7, 1 failed"][-1] == pytest.approx((9000, 6 / 7))
    few, many = request(0, 0, "dense", 0.1), request(0, 0, "dense", 2.0)
    run = recorded([few, many, request(1, 0, "sparse", 0.2)])
    axes, _ = drawn(figures.distribution, run, "ttft")
    assert axes.get_xscale() == "log"  # they span more than tenfold


def test_block_pairs_and_the_run_by_hand() -> None:
    result = result_of(four_pairs())
    axes, caption = drawn(figures.block_pairs, result, "ttft")
    points = [(1.0, 2.0), (2.0, 3.0), (3.0, 2.0), (4.0, 3.0)]
    assert points in lines_of(axes).values()
    speedup = result["speedups"]["ttft_p50"]
    box = axes.patches[0].get_bbox()
    assert (box.y0, box.y1) == pytest.approx((speedup["low"], speedup["high"]))
    assert "2.83x (1.85 to 4.33)" in caption
    assert all(tick == round(tick) for tick in axes.get_xticks())
    axes, caption = drawn(figures.block_pairs, RESULT, "ttft")
    assert "2.83x (no interval)" in caption
    assert len(axes.patches) == 0  # no band


def test_drift_by_hand() -> None:
    axes, caption = drawn(figures.drift, RUN, RESULT, "ttft")
    assert lines_of(axes) == {
        "dense": [(0.0, 4000.0), (300.0, 9000.0)],
        "sparse": [(100.0, 2000.0), (200.0, 3000.0)],
    }
    assert "dense 2.250x, sparse 1.500x" in caption


def test_a_timeline_counts_from_each_blocks_start_and_crosses_what_failed() -> None:
    lost = request(1, 0, "sparse", None, sent_s=102.0)
    axes, caption = drawn(figures.timeline, recorded([*RUN.requests, lost]), "ttft")
    lines = list(lines_of(axes).values())
    assert sorted(lines[0]) == sorted((0.0, 1e3 * s) for s in (3, 4, 8, 9, 9, 9))
    assert lines[-1] == [(2.0, 0.98)]
    assert "13 of 13 requests" in caption


def test_a_front_names_its_points_on_the_side_with_more_room() -> None:
    front = [(1.0, 100.0), (9.0, 10.0)]
    series = [(variant, front, [(front[0], "few"), (front[1], "many")]) for variant in ("a", "b")]
    axes, _ = drawn(figures.front, series)
    sides = {text.get_text(): text.get_horizontalalignment() for text in axes.texts}
    assert sides == {"few": "left", "many": "right"}
    assert lines_of(axes)["a"] == front


def one_chart(axes: Any) -> str:
    axes.set_title('a < b & "c"')
    axes.plot([1, 2], [1, 2], marker="o", label="<line>")
    axes.legend()
    return "caption & all"


def test_svg_keeps_its_text_is_always_the_same_and_has_ids_of_its_own() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    text, _ = figures.svg(one_chart)
    assert dict(matplotlib.rcParams) == before
    root = ElementTree.fromstring(text)
    found = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {'a < b & "c"', "<line>", "1.0"} <= found
    assert text == figures.svg(one_chart)[0]
    assert not re.search(r"Matplotlib|20\d\d-\d\d-\d\d", text)

    def another(axes: Any) -> str:
        one_chart(axes)
        axes.set_title("another")
        return ""

    ids = [re.findall(r' id="([^"]+)"', found) for found in (text, figures.svg(another)[0])]
    assert ids[0]
    assert not set(ids[0]) & set(ids[1])
    assert len(set(ids[0])) == len(ids[0])
    assert set(re.findall(r'(?:url\(|href=")#(\w+)', text)) == set(ids[0])


def test_runs_without_values_say_so() -> None:
    run = recorded([request(None, None, "dense", None)])
    result = result_of(run)
    for draw, arguments in (
        (figures.distribution, (run, "ttft")),
        (figures.speedups, (result,)),
        (figures.block_pairs, (result, "tpot")),
        (figures.drift, (run, result, "ttft")),
        (figures.timeline, (run, "e2e")),
        (figures.front, ([("dense", [], []), ("sparse", [], [])],)),
    ):
        axes, caption = drawn(draw, *arguments)
        assert caption == axes.texts[0].get_text()


def test_matplotlib_is_not_imported_before_a_chart_is_drawn() -> None:
    code = "import sys, loadtest.__main__; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
