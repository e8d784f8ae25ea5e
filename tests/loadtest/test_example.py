"""The committed records can be read and pass; test_tables.py holds the docs to what they say."""

from pathlib import Path

import pytest

from loadtest.record import Recorded
from loadtest.report.result import result_of

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = sorted(path.parent for path in (DOCS / "example").glob("*/*/run.json"))
RECORDS = sorted(path.parent for path in (DOCS.parent / "benchmarks/records").glob("*/run.json"))


@pytest.mark.parametrize(
    "run", [*EXAMPLES, *RECORDS], ids=lambda run: f"{run.parent.name}/{run.name}"
)
def test_a_committed_run_passes(run: Path) -> None:
    assert result_of(Recorded.read(run))["passed"]


def test_there_are_examples_and_records() -> None:
    assert (len(EXAMPLES), len(RECORDS)) == (8, 2)


def test_two_names_of_one_model_are_equally_fast() -> None:
    result = result_of(Recorded.read(DOCS.parent / "benchmarks/records/launches-same"))
    assert result["is_aa"]
    assert result["num_launches"] == 6
    claim = result["speedups"]["tpot_p50"]
    assert claim["low"] <= 1 <= claim["high"]
