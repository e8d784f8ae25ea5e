"""A plan, a schedule and lists of loads from the command line -> the runs to make, one a load."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from loadtest.send.paired import Plan
from loadtest.send.schedule import Schedule

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Load:
    """One paired run of a sweep.

    Attributes:
        name: of its sub-directory; None when it is the only one.
        plan: what to send.
        schedule: when.
    """

    name: str | None
    plan: Plan
    schedule: Schedule

    def out(self, out: Path) -> Path:
        """Where it is written to: a sweep has a sub-directory for each load."""
        return out / self.name if self.name else out


def sweep(plan: Plan, schedule: Schedule, concurrency: list[int], rate: list[float]) -> list[Load]:
    """One load for each concurrency, or for each rate.

    Args:
        plan: with the first concurrency.
        schedule: with the first rate, if any.
        concurrency: requests in flight, at least one number.
        rate: requests a second; empty without --rate.

    Raises:
        ValueError: if both are lists, or one does not fit plan or schedule.
    """
    if len(concurrency) > 1 and (len(rate) > 1 or schedule.kind != "closed"):
        raise ValueError(
            f"--concurrency {','.join(map(str, concurrency))} is a sweep of closed loops; give one "
            "number, or drop --schedule and --rate"
        )
    if len(concurrency) > 1:
        return [
            Load(f"concurrency-{places}", replace(plan, concurrency=places), schedule)
            for places in concurrency
        ]
    if len(rate) > 1:
        return [
            Load(f"rate-{per_s:g}", plan, replace(schedule, rate_per_s=per_s)) for per_s in rate
        ]
    return [Load(None, plan, schedule)]


def parse_concurrency(text: str) -> list[int]:
    """Parses `4` or `1,4,16`.

    Raises:
        ValueError: if it is none of these.
    """
    if not all(part.isascii() and part.isdigit() for part in text.split(",")):
        raise ValueError(f"--concurrency {text} is no list of whole numbers; write 4 or 1,4,16")
    return _distinct("--concurrency", [int(part) for part in text.split(",")])


def parse_rate(text: str | None) -> list[float]:
    """Parses `4` or `0.5,1,2`; empty for None.

    Raises:
        ValueError: if it is none of these.
    """
    if text is None:
        return []
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = [math.nan]
    if not all(map(math.isfinite, rates)):
        raise ValueError(f"--rate {text} is no list of numbers; write 4 or 0.5,1,2")
    return _distinct("--rate", rates)


def _distinct(option: str, values: list[Number]) -> list[Number]:
    if len(set(values)) < len(values):
        raise ValueError(f"{option} {','.join(map(str, values))} has a number twice; drop one")
    return values
