"""The simulation finds intervals that hold, and those that cannot."""

import pytest

from benchmarks.coverage import NOISES, coverage


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


def test_the_same_seed_gives_the_same_shares() -> None:
    assert coverage(2, 3, lambda: None) == coverage(2, 3, lambda: None)
