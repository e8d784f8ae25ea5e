"""A short form of what `make soak` runs for hours."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def soak(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.soak", "--seed", "1", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


def test_no_answer_is_lost_or_wrong_under_faults(tmp_path: Path) -> None:
    keep = os.path.relpath(tmp_path / "logs", ROOT)
    words = ("--requests", "1200", "--faults", "6", "--clients", "16", "--keep", keep)
    done = soak("--minutes", "1", *words)
    found = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, found["passed"]) == (0, True), found
    assert (tmp_path / "logs/gateway.log").is_file()
    assert found["num_requests"] >= 1200
    assert found["num_faults"] == 6
    assert found["num_answers_by_code"]["200"] > 300
    assert found["num_wrong"] == 0


def test_a_directory_without_a_model_is_wrong_use() -> None:
    done = soak("--real", "nowhere")
    assert (done.returncode, "holds no model" in done.stderr) == (2, True)
