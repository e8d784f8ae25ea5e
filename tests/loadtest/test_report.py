"""The three files come together or not at all."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from loadtest import report
from loadtest.report import check_out, result_of, table_of, write_out
from loadtest.workload import Workload
from tests.loadtest.test_statistics import two_pairs

RUN = two_pairs()
RESULT = result_of("http://server", RUN, Workload(run_number=5))


def test_files_hold_the_result_and_the_raw_stamps(tmp_path: Path) -> None:
    write_out(tmp_path / "new" / "out", RESULT, RUN)
    out = tmp_path / "new" / "out"
    names = ["report.png", "requests.jsonl", "result.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert json.loads((out / "result.json").read_text()) == RESULT
    lines = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
    assert len(lines) == RESULT["num_requests"]
    assert lines[0]["token_events_s"] == [3.0, 3.5, 4.0]
    assert [lines[3 * block]["variant"] for block in range(4)] == RESULT["block_order"]
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_nothing_is_left_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(report, "_draw", full)
    with pytest.raises(OSError, match="disk full"):
        write_out(tmp_path / "out", RESULT, RUN)
    assert list(tmp_path.iterdir()) == []


def test_taken_or_impossible_places_are_refused(tmp_path: Path) -> None:
    check_out(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="exists already; name a new directory"):
        check_out(tmp_path)
    with pytest.raises(ValueError, match="file is not a directory"):
        check_out(tmp_path / "file" / "out")


def test_table_fits_a_narrow_terminal() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table_of(RESULT))
    text = capture.get()
    assert "2.500 [2.000, 3.000]" in text
    assert "8500.00" in text
    assert "…" not in text
