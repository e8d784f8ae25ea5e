"""The record and what follows from it agree."""

import json
from pathlib import Path

import pytest

from loadtest.record import Recorded
from loadtest.report.files import markdown_of
from loadtest.report.result import result_of
from tests.loadtest.recordings import broken_runs, two_pairs, write_out

RUN = two_pairs()
RESULT = result_of(RUN)
FILES = [
    "report.html",
    "report.md",
    "report.png",
    "requests.jsonl",
    "result.json",
    "run.json",
]


def test_everything_is_computed_from_the_record(tmp_path: Path) -> None:
    write_out(tmp_path / "new" / "out", RUN)
    out = tmp_path / "new" / "out"
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert json.loads((out / "result.json").read_text()) == RESULT
    assert result_of(Recorded.read(out)) == RESULT
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("run", broken_runs())
def test_broken_runs_are_written_too(tmp_path: Path, run: Recorded) -> None:
    write_out(tmp_path / "out", run)
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result_of(run)


def test_markdown() -> None:
    text = markdown_of(RESULT)
    assert text.startswith(
        "# sparse against dense\n\nLoad test of 2026-11-25 10:00 UTC, machine not"
    )
    assert "**NO GUARD RAIL SET**: sparse is 2.00x (no interval) as fast per token" in text
    assert "| TPOT p50, ms | 500.00 | 250.00 | 2.00x (no interval) |" in text
    assert "| model of | dense | sparse |" in text
    assert "| perplexity | not recorded | not recorded |" in text
    assert "> **2 block pairs are too few" in text
    assert "- passed: error_rate: no request failed" in text
