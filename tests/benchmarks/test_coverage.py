"""The simulation finds intervals that hold, and those that cannot."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.coverage import NOISES, coverage
from loadtest.__main__ import app


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    return dict(coverage(100, 1, lambda: None)["coverage"])


def test_intervals_hold_the_truth_where_the_noise_is_in_the_blocks(
    found: dict[str, dict[str, float]],
) -> None:
    assert list(found) == list(NOISES)
    for noise in NOISES:
        if noise != "launches, 1 launch":
            # A share of 95 % in 100 runs lies below 88 % one time in 400.
            assert min(found[noise].values()) >= 0.88, noise


def test_one_launch_cannot_know_what_a_launch_does(found: dict[str, dict[str, float]]) -> None:
    assert found["launches, 1 launch"]["p50"] < 0.7
    assert found["launches, 6 launches"]["p50"] >= 0.88
    assert "until certain" not in found["launches, 1 launch"]


def test_the_command_gives_the_same_for_a_seed_and_checks_its_file_first(tmp_path: Path) -> None:
    assert coverage(2, 3, lambda: None) == coverage(2, 3, lambda: None)
    absent = str(tmp_path / "none" / "x.json")
    done = CliRunner().invoke(app, ["coverage", "--runs", "1000000000", "--out", absent])
    assert done.exit_code == 2
    assert "x.json cannot be written: " in done.stderr
    assert done.stderr.count("\n") == 1
