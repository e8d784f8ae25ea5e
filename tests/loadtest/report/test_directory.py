"""Directories that are made whole or not at all, and places that are refused."""

import json
import sys
from pathlib import Path

import pytest

from loadtest.report.directory import check_out, new_directory


def test_impossible_places_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_out(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: Not a directory; name a place"):
        check_out(tmp_path / "file" / "out")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"need matplotlib; install .*'cast-serve\[loadtest\]'"):
        check_out(tmp_path / "a")


def test_a_new_directory_has_its_result_or_is_not_there(tmp_path: Path) -> None:
    new_directory(tmp_path / "new" / "out", {"a": 1})
    assert json.loads((tmp_path / "new" / "out" / "result.json").read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        new_directory(tmp_path / "new" / "other", {"a": object()})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
