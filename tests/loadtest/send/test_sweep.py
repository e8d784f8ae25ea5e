"""Lists of loads become runs, one a load."""

from pathlib import Path

import pytest

from loadtest.send.paired import Plan
from loadtest.send.schedule import Schedule
from loadtest.send.sweep import Load, parse_concurrency, parse_rate, sweep

PLAN = Plan(num_prompts=16)
POISSON = Schedule("poisson", 1.0)


def test_one_load_is_no_sweep() -> None:
    (load,) = sweep(PLAN, POISSON, [1], [1.0])
    assert load == Load(None, PLAN, POISSON)
    assert load.out(Path("report")) == Path("report")


def test_a_sweep_of_closed_loops() -> None:
    loads = sweep(PLAN, Schedule(), [1, 4, 16], [])
    assert [load.plan.concurrency for load in loads] == [1, 4, 16]
    assert [load.out(Path("report")) for load in loads][1] == Path("report/concurrency-4")


def test_a_sweep_of_rates() -> None:
    loads = sweep(PLAN, POISSON, [1], [0.5, 2.0])
    assert [load.schedule.rate_per_s for load in loads] == [0.5, 2.0]
    assert [load.name for load in loads] == ["rate-0.5", "rate-2"]


@pytest.mark.parametrize(
    ("schedule", "rate"), [(POISSON, [1.0]), (POISSON, [1.0, 2.0]), (Schedule(), [1.0, 2.0])]
)
def test_two_sweeps_at_once_are_refused(schedule: Schedule, rate: list[float]) -> None:
    with pytest.raises(ValueError, match="--concurrency 1,4 is a sweep of closed loops; give one"):
        sweep(PLAN, schedule, [1, 4], rate)


def test_a_load_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="give at least 32 to keep --concurrency busy"):
        sweep(PLAN, Schedule(), [1, 32], [])
    with pytest.raises(ValueError, match=r"--rate -1.0 is out of range"):
        sweep(PLAN, POISSON, [1], [1.0, -1.0])


def test_parsing() -> None:
    assert parse_concurrency("4") == [4]
    assert parse_concurrency("1,4,16") == [1, 4, 16]
    assert parse_rate("0.5,1") == [0.5, 1.0]
    assert parse_rate(None) == []


@pytest.mark.parametrize("text", ["", "a", "1,,2", "1.5", "-1", "²", "1, 2"])
def test_no_concurrency(text: str) -> None:
    with pytest.raises(ValueError, match="is no list of whole numbers; write 4 or 1,4,16"):
        parse_concurrency(text)


@pytest.mark.parametrize("text", ["", "a", "1,,2", "inf", "1,nan"])
def test_no_rate(text: str) -> None:
    with pytest.raises(ValueError, match="is no list of numbers; write 4 or 0.5,1,2"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["1,1", "1,2,1"])
def test_a_load_given_twice_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"--concurrency {text} has a number twice"):
        parse_concurrency(text)
    with pytest.raises(ValueError, match="has a number twice"):
        parse_rate(text)
