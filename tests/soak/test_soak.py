"""Short forms of what `make soak` runs for hours."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def soak(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.soak", "--seed", "1", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, found["passed"]) == (0, True), found
    return found


def test_no_answer_is_lost_or_wrong_under_faults(tmp_path: Path) -> None:
    keep = os.path.relpath(tmp_path / "logs", ROOT)
    words = ("--requests", "1200", "--faults", "6", "--clients", "16", "--keep", keep)
    found = soak("--minutes", "1", *words)
    assert (tmp_path / "logs/gateway.log").is_file()
    assert found["num_requests"] >= 1200
    assert found["num_faults"] == 6
    assert found["num_answers_by_code"]["200"] > 300
    assert found["num_wrong"] == 0


def test_no_stream_breaks_when_the_gateway_is_ended() -> None:
    found = soak("--drains", "2")
    assert (found["num_streams"], found["num_broken"]) == (128, 0)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--real", "nowhere"], "holds no model"),
        (["--processes", "0"], "must be from 1 to --clients"),
    ],
)
def test_wrong_use_is_told(words: list[str], reason: str) -> None:
    command = [sys.executable, "-m", "tests.soak", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert reason in done.stderr
