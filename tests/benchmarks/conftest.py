"""Fixtures of training's and the load test's tests, and whether a record is stamped in time."""

import os
from collections.abc import Callable, Mapping, Sized
from typing import Any

import pytest

from tests.cast_train.conftest import heldout_file, llama_dir, text_file
from tests.loadtest.conftest import serve, serve_app

__all__ = ["heldout_file", "llama_dir", "serve", "serve_app", "text_file"]

CheckStamp = Callable[[Mapping[str, Any]], None]
LoadOf = Callable[[Sized], CheckStamp]


@pytest.fixture
def load_of(monkeypatch: pytest.MonkeyPatch) -> LoadOf:
    """`check = load_of(done)`: the machine's load is how much has been done; none when stamped."""

    def begin(done: Sized) -> CheckStamp:
        monkeypatch.setattr(os, "getloadavg", lambda: (float(len(done)), 0.0, 0.0))

        def check(record: Mapping[str, Any]) -> None:
            assert len(done) > 0
            averages = record["machine"]["load_average"]
            assert (averages[0] if isinstance(averages, list) else averages) == 0
            assert {"cpu", "family", "model"} <= record["machine"].keys()
            assert "python" in record["versions"]  # and the commit, in a checkout
            assert record["date"].endswith("+00:00")
            assert record["num_launches"] == 1

        return check

    return begin
