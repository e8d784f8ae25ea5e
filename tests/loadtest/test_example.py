"""The committed records can be read and pass; test_tables.py checks the pages against them."""

import re
from pathlib import Path

import pytest

from loadtest.record import Recorded
from loadtest.report import html, pareto
from loadtest.report.result import result_of

DRAWN = re.compile(r"<svg.*?</svg>", re.DOTALL)  # as matplotlib of one version draws it
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs/example/smollm2-closed"
RUNS = sorted(path.parent for path in EXAMPLE.glob("*/run.json"))
RECORDS = sorted(path.parent for path in (ROOT / "benchmarks/records").rglob("run.json"))


@pytest.mark.parametrize("run", [*RUNS, *RECORDS], ids=lambda run: f"{run.parent.name}/{run.name}")
def test_a_committed_run_passes(run: Path) -> None:
    assert result_of(Recorded.read(run))["verdict"] == "pass"


def test_there_are_an_example_and_records() -> None:
    assert (len(RUNS), len(RECORDS)) == (3, 61)


@pytest.mark.parametrize("name", ["concurrency-1", "concurrency-16"])
def test_a_committed_report_is_what_its_record_says(name: str) -> None:
    run = Recorded.read(EXAMPLE / name)
    page = (EXAMPLE / name / "report.html").read_text()
    assert DRAWN.sub("", html.report(run, result_of(run))) == DRAWN.sub("", page)


def test_a_committed_sweep_is_what_its_records_say(tmp_path: Path) -> None:
    pareto.write_sweep(tmp_path, pareto.sweep_of(pareto.runs_in(EXAMPLE)))
    found, page = (path / "report.html" for path in (tmp_path, EXAMPLE))
    assert DRAWN.sub("", found.read_text()) == DRAWN.sub("", page.read_text())


def test_two_names_of_one_model_are_equally_fast() -> None:
    result = result_of(Recorded.read(ROOT / "benchmarks/records/launches-same"))
    assert result["is_aa"]
    assert result["num_launches"] == 6
    claim = result["speedups"]["tpot_p50"]
    assert claim["low"] <= 1 <= claim["high"]
