"""The record and what follows from it agree."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from loadtest.record import Recorded
from loadtest.report.result import result_of, table_of
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


def test_the_table_fits_a_narrow_terminal() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table_of(RESULT))
    text = capture.get()
    assert "2.83x (no interval)" in text
    assert "8500" in text
    assert "…" not in text
