"""Plots are what their records say, and each page that shows one says in words what is seen."""

import re
from pathlib import Path

import matplotlib
import pytest

from benchmarks.plots.svg import PLOTS, files
from tests.docs.pages import PAGES, ROOT

FOLDER = ROOT / "docs/plots"
IMAGE = re.compile(r'<img alt="([^"]*)" src="([^"]*plots/[^"]*)">')
DARK = re.compile(r'<source media="\(prefers-color-scheme: dark\)" srcset="([^"]*)">')


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_what_its_records_say(name: str) -> None:
    for file, text in files(name, ROOT / "benchmarks/records").items():
        before = (FOLDER / file).read_text()
        if f"Matplotlib v{matplotlib.__version__}," in before:  # others draw in other words
            assert text == before, f"{file} is old: python -m benchmarks.plots {name}"


def test_files_and_functions_correspond() -> None:
    names = {f"{name}{suffix}.svg" for name in PLOTS for suffix in ("", "-dark")}
    assert {path.name for path in FOLDER.iterdir()} == names


@pytest.mark.parametrize("page", PAGES)
def test_a_plot_on_a_page_has_its_files_and_says_what_is_seen(page: str) -> None:
    text = (ROOT / page).read_text()
    light = IMAGE.findall(text)
    assert [src.replace(".svg", "-dark.svg") for _, src in light] == DARK.findall(text)
    for alt, src in light:
        assert ((ROOT / page).parent / src).is_file(), src
        assert len(alt) > 30, alt


def test_every_plot_is_on_a_page() -> None:
    texts = [(ROOT / page).read_text() for page in PAGES]
    shown = {Path(src).stem for text in texts for _, src in IMAGE.findall(text)}
    assert shown == set(PLOTS)
