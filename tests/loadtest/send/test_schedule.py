"""Timetables by hand, and what is refused."""

import statistics
from typing import Any

import pytest

from loadtest.send.schedule import Schedule
from loadtest.send.trace import Arrival


def arrivals(*times_s: float) -> tuple[Arrival, ...]:
    return tuple(Arrival(time_s, None, None) for time_s in times_s)


@pytest.mark.parametrize(
    ("schedule", "mean", "times_s"),
    [
        (Schedule(), None, None),
        (Schedule("constant", 4.0), 4.0, (0.0, 0.25, 0.5, 0.75, 1.0)),
        # Three at once, every 3 / 2 s.
        (Schedule("burst", 2.0, burst=3), 2.0, (0.0, 0.0, 0.0, 1.5, 1.5)),
        (
            Schedule("trace", trace=arrivals(0.0, 0.5, 0.5, 2.0, 3.0, 9.0)),
            None,
            (0.0, 0.5, 0.5, 2.0, 3.0),
        ),
    ],
)
def test_timetables_by_hand(
    schedule: Schedule, mean: float | None, times_s: tuple[float, ...] | None
) -> None:
    assert schedule.mean_rate_per_s == mean
    assert schedule.times_s(5) == times_s


def test_a_trace_is_stretched_to_a_rate() -> None:
    # Four arrivals in 3 s are three gaps of a second on average; at 2/s they take half as long.
    slow = Schedule("trace", 2.0, trace=arrivals(0.0, 1.0, 1.0, 3.0, 9.0))
    assert slow.times_s(4) == pytest.approx((0.0, 0.5, 0.5, 1.5))
    assert slow.mean_rate_per_s == 2.0
    assert Schedule("trace", 2.0, trace=arrivals(0.0)).times_s(1) == (0.0,)


def test_ramp_by_hand() -> None:
    # From 1/s to 3/s the mean is 2/s, so 16 take 8 s, and t + t^2 / 8 have left by t.
    times_s = Schedule("ramp", 1.0, 3.0).times_s(16)
    assert times_s is not None
    assert [t + t**2 / 8 for t in times_s] == pytest.approx(range(16))
    falling = Schedule("ramp", 3.0, 1.0).times_s(16)
    assert falling is not None
    assert [3 * t - t**2 / 8 for t in falling] == pytest.approx(range(16))
    assert Schedule("ramp", 1.0, 3.0).mean_rate_per_s == 2.0
    assert Schedule("ramp", 2.0, 2.0).times_s(3) == pytest.approx((0.0, 0.5, 1.0))


def test_poisson_is_seeded_and_has_exponential_gaps() -> None:
    schedule = Schedule("poisson", 5.0, seed=3)
    times_s = schedule.times_s(4000)
    assert times_s == Schedule("poisson", 5.0, seed=3).times_s(4000)
    assert times_s != Schedule("poisson", 5.0, seed=4).times_s(4000)
    assert times_s is not None
    gaps_s = [after - before for before, after in zip(times_s, times_s[1:], strict=False)]
    assert min(gaps_s) >= 0
    assert statistics.mean(gaps_s) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(gaps_s) == pytest.approx(0.2, rel=0.1)  # as its mean
    assert statistics.median(gaps_s) == pytest.approx(0.2 * 0.6931, rel=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "random"}, "--schedule random is unknown; give one of closed, constant, poisson"),
        ({"kind": "poisson"}, "--schedule poisson needs --rate"),
        (
            {"rate_per_s": 1.0},
            "--rate is for --schedule constant and poisson and burst and ramp and trace",
        ),
        (
            {"kind": "constant", "rate_per_s": 0.0},
            "--rate 0.0 is out of range; give a number above",
        ),
        ({"kind": "constant", "rate_per_s": float("inf")}, "--rate inf is out of range"),
        ({"kind": "constant", "rate_per_s": float("nan")}, "--rate nan is out of range"),
        ({"kind": "ramp", "rate_per_s": 1.0}, "--schedule ramp needs --rate-to"),
        ({"kind": "burst", "rate_per_s": 1.0}, "--schedule burst needs --burst"),
        ({"kind": "burst", "rate_per_s": 1.0, "burst": 0}, "--burst 0 is out of range"),
        ({"kind": "trace"}, "--schedule trace needs --trace"),
        (
            {"kind": "constant", "rate_per_s": 1.0, "trace": arrivals(0.0)},
            "--trace is for --schedule",
        ),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**fields)
