"""How report.html looks, wide and narrow, light and dark, and axe's rules."""

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from loadtest.record import Recorded
from loadtest.report import html, pareto
from loadtest.report.result import result_of
from tests.browser import LOOKS, Watched, picture, violations, wider_than_the_window
from tests.loadtest.recordings import broken_runs, simulated, two_pairs

DIRECTORIES = {
    "dense": {"path": "data/models/dense", "model": "dense-135m", "bits_per_weight": 16},
    "sparse": {
        "path": "runs/demo/int8",
        "model": "dense-135m",
        "bits_per_weight": 5.0234,
        "zeros": 0.5,
        "quantized": "int8",
        "quality": {
            "perplexity": 54.8058,
            "text": "heldout-wiki.txt",
            "num_tokens": 8176,
            "is_before_quantizing": True,
        },
    },
}
MACHINE = {
    "cpu": "A CPU",
    "family": "6",
    "model": "207",
    "flags": ["avx2"],
    "cores": [0, 1],
    "load_average": [0.1, 1.9],
}
RUN = simulated(
    1,
    speedup=1.5,
    num_block_pairs=8,
    directories=DIRECTORIES,
    machine=MACHINE,
    guard={"min_speedup": {"tpot_p50": 1.2}},
)


def show(watched: Watched, tmp_path: Path, page: str) -> None:
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    watched.page.goto(file.as_uri())


@pytest.mark.parametrize(("look", "width", "scheme"), LOOKS)
def test_it_looks_right(
    watched: Watched, tmp_path: Path, look: str, width: int, scheme: Any
) -> None:
    page = watched.page
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    show(watched, tmp_path, html.report(RUN, result_of(RUN)))
    picture(page, tmp_path, f"report-{look}")
    assert violations(page) == []
    folds = page.locator("details")
    assert folds.count() == 3
    for fold in folds.all():
        is_folded = not fold.locator("summary ~ *").first.is_visible()
        assert is_folded == fold.locator("summary").is_visible() == (width < 640)
        if is_folded:
            fold.locator("summary").click()
    expect(page.locator("svg").last).to_be_visible()
    if width < 640:
        picture(page, tmp_path, f"report-{look}-unfolded")
        assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert wider_than_the_window(page) == []


def test_the_first_screen_says_what_is_worth_knowing(watched: Watched, tmp_path: Path) -> None:
    page = watched.page
    show(watched, tmp_path, html.report(RUN, result_of(RUN)))
    for text in (
        "sparse against dense",
        "Load test of 2026-11-25 10:00 UTC, A CPU (family 6, model 207), 2 cores",
        "PASS",
        "pass: min_speedup.tpot_p50: ",
        "54.81 before int8 (heldout-wiki.txt, 8,176 tokens)",
        "runs/demo/int8",
        "not measured",
        "5.02",
    ):
        box = page.get_by_text(text).first.bounding_box()
        assert box is not None
        assert box["y"] + box["height"] <= 900, text


@pytest.mark.parametrize("run", [two_pairs(), *broken_runs()])
def test_axe_finds_nothing_in_runs_that_went_wrong(
    watched: Watched, tmp_path: Path, run: Recorded
) -> None:
    show(watched, tmp_path, html.report(run, result_of(run)))
    assert violations(watched.page) == []


def test_axe_finds_nothing_in_a_sweep(watched: Watched, tmp_path: Path) -> None:
    sweep = pareto.sweep_of([("1", RUN), ("2", two_pairs())])
    pareto.write_sweep(tmp_path, sweep)
    show(watched, tmp_path, (tmp_path / "report.html").read_text(encoding="utf-8"))
    assert violations(watched.page) == []
