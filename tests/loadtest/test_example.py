"""The committed records can be read and pass; test_tables.py holds the docs to what they say."""

import re
from pathlib import Path

import pytest

from loadtest.record import Recorded
from loadtest.report import html, pareto
from loadtest.report.result import result_of

DRAWN = re.compile(r"<svg.*?</svg>", re.DOTALL)  # as matplotlib of one version draws it
DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = sorted(path.parent for path in (DOCS / "example").glob("*/*/run.json"))
RECORDS = sorted(path.parent for path in (DOCS.parent / "benchmarks/records").glob("*/run.json"))


@pytest.mark.parametrize(
    "run", [*EXAMPLES, *RECORDS], ids=lambda run: f"{run.parent.name}/{run.name}"
)
def test_a_committed_run_passes(run: Path) -> None:
    assert result_of(Recorded.read(run))["passed"]


def test_there_are_examples_and_records() -> None:
    assert (len(EXAMPLES), len(RECORDS)) == (8, 3)


@pytest.mark.parametrize("name", ["llama-1b/concurrency-1", "smollm2-poisson/rate-4"])
def test_a_committed_report_is_what_its_record_says(name: str) -> None:
    run = Recorded.read(DOCS / "example" / name)
    page = (DOCS / "example" / name / "report.html").read_text()
    assert DRAWN.sub("", html.report(run, result_of(run))) == DRAWN.sub("", page)


def test_a_committed_sweep_is_what_its_records_say(tmp_path: Path) -> None:
    folder = DOCS / "example/llama-1b"
    pareto.write_sweep(tmp_path, pareto.sweep_of(pareto.runs_in(folder)))
    found, page = (path / "report.html" for path in (tmp_path, folder))
    assert DRAWN.sub("", found.read_text()) == DRAWN.sub("", page.read_text())


def test_two_names_of_one_model_are_equally_fast() -> None:
    result = result_of(Recorded.read(DOCS.parent / "benchmarks/records/launches-same"))
    assert result["is_aa"]
    assert result["num_launches"] == 6
    claim = result["speedups"]["tpot_p50"]
    assert claim["low"] <= 1 <= claim["high"]
