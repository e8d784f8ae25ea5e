"""Directories that are made whole or not at all, and places that are refused."""

import json
import sys
from pathlib import Path

import pytest

from loadtest.report.directory import check_matplotlib, check_out, new_directory


def test_taken_or_impossible_places_are_refused(tmp_path: Path) -> None:
    check_out(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="exists already; name a new directory"):
        check_out(tmp_path)
    with pytest.raises(ValueError, match="file: Not a directory; name a place"):
        check_out(tmp_path / "file" / "out")


def test_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"need matplotlib; install .*'cast-serve\[loadtest\]'"):
        check_matplotlib()


def test_a_new_directory_is_there_when_its_files_are(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with new_directory(out, {"a": 1}) as partial:
        assert not out.exists()
        (partial / "more").touch()
    assert sorted(path.name for path in out.iterdir()) == ["more", "result.json"]
    assert json.loads((out / "result.json").read_text()) == {"a": 1}


def fail(out: Path) -> None:
    with new_directory(out, {}):
        raise OSError("disk full")


def test_a_directory_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"):
        fail(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
