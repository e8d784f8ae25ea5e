"""Tables in README and docs follow from their records; a wrong kind or record is named."""

import json
from pathlib import Path

import pytest

from loadtest.report.tables import MARKED, rewritten, speedup

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_marked_table_is_what_its_records_say(page: Path) -> None:
    text = page.read_text()
    assert rewritten(text, ROOT) == text


def test_there_are_marked_tables() -> None:
    found = [match[2] for page in PAGES for match in MARKED.finditer(page.read_text())]
    assert {"runs", "coverage", "kernels", "demo_quality", "demo_speed"} <= set(found)


def test_a_table_by_hand(tmp_path: Path) -> None:
    shares = {"p50": 0.951, "rate": 0.94}
    (tmp_path / "c.json").write_text(json.dumps({"coverage": {"independent": shares}}))
    page = "before\n<!-- table: coverage c.json -->\nold\n<!-- end of table -->\nafter\n"
    assert rewritten(page, tmp_path) == (
        "before\n<!-- table: coverage c.json -->\n| noise | p50 | rate |\n| --- | ---: | ---: |\n"
        "| independent | 95.1% | 94.0% |\n<!-- end of table -->\nafter\n"
    )
    assert rewritten(rewritten(page, tmp_path), tmp_path) == rewritten(page, tmp_path)


def test_wrong_marks_are_named(tmp_path: Path) -> None:
    for kind, message in (("coverages", "'coverages' is not known"), ("coverage", "c.json cannot")):
        page = f"<!-- table: {kind} c.json -->\n<!-- end of table -->\n"
        with pytest.raises(ValueError, match=message):
            rewritten(page, tmp_path)


def test_a_speedup_without_interval_is_the_ratio_alone() -> None:
    assert speedup({"ratio": 1.234, "low": None, "high": None}) == "1.23"
    assert speedup({"ratio": 1.234, "low": 1.1, "high": 1.3}) == "1.23 (1.10 to 1.30)"
