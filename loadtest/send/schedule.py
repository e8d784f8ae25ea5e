"""How requests should arrive, and a seed -> the timetable of a block, in seconds from its start.

    closed     no timetable: `concurrency` in flight, and the next leaves when one comes back
    constant   one every 1 / rate
    poisson    independent users: gaps drawn from an exponential distribution of mean 1 / rate
    burst      `burst` at once, every burst / rate
    ramp       the rate grows evenly from `rate` to `rate_to` over the block
    trace      the times in a file (trace.py), stretched to a mean of `rate` if it is given

All but the first are open loops: a request leaves at its time however many are outstanding. All
blocks get the same timetable.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from loadtest.errors import UsageError
from loadtest.send.trace import Arrival

KINDS = ("closed", "constant", "poisson", "burst", "ramp", "trace")


@dataclass(frozen=True)
class Schedule:
    """A kind of timetable.

    Attributes:
        kind: one of KINDS.
        rate_per_s: requests a second; ramp: at a block's start; trace: None keeps its own. Not for
            closed.
        rate_to_per_s: ramp: at a block's end.
        burst: burst: requests that leave at once.
        trace: trace: arrivals, by time.
        seed: poisson: the same seed gives the same gaps.
    """

    kind: str = "closed"
    rate_per_s: float | None = None
    rate_to_per_s: float | None = None
    burst: int | None = None
    trace: tuple[Arrival, ...] = field(default=(), repr=False)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"--schedule {self.kind} is unknown; give one of {', '.join(KINDS)}")
        for option, value, kinds, others in (
            ("--rate", self.rate_per_s, ("constant", "poisson", "burst", "ramp"), ("trace",)),
            ("--rate-to", self.rate_to_per_s, ("ramp",), ()),
            ("--burst", self.burst, ("burst",), ()),
            ("--trace", self.trace or None, ("trace",), ()),
        ):
            if value is None and self.kind in kinds:
                raise UsageError(f"--schedule {self.kind} needs {option}")
            if value is not None and self.kind not in (*kinds, *others):
                names = " and ".join((*kinds, *others))
                raise UsageError(f"{option} is for --schedule {names}; drop it")
            if isinstance(value, int | float) and not 0 < value < math.inf:
                raise UsageError(f"{option} {value} is out of range; give a number above 0")

    @property
    def has_lengths(self) -> bool:
        """Whether each arrival of a trace says how many tokens prompt and answer have."""
        return bool(self.trace) and self.trace[0].prompt_tokens is not None

    @property
    def mean_rate_per_s(self) -> float | None:
        """Requests a second over a block; None for closed, and for trace at its own speed."""
        if self.rate_per_s is None or self.rate_to_per_s is None:
            return self.rate_per_s
        return (self.rate_per_s + self.rate_to_per_s) / 2

    def times_s(self, num: int) -> tuple[float, ...] | None:
        """When each request of a block leaves; None for a closed loop.

        All blocks have the same timetable: gaps of their own would give each block pair another
        load, and that would look like drift.
        """
        if self.kind == "closed":
            return None
        if self.kind == "trace":
            return _trace_s([arrival.due_s for arrival in self.trace[:num]], self.rate_per_s)
        rate = self.rate_per_s or 0.0
        if self.kind == "constant":
            return tuple(place / rate for place in range(num))
        if self.kind == "burst":
            burst = self.burst or 1
            return tuple(place // burst * burst / rate for place in range(num))
        if self.kind == "ramp":
            return _ramp_s(num, rate, self.rate_to_per_s or rate)
        rng = random.Random(self.seed)
        time_s, times_s = 0.0, []
        for _ in range(num):
            time_s += rng.expovariate(rate)
            times_s.append(time_s)
        return tuple(times_s)


def _trace_s(own_s: Sequence[float], rate_per_s: float | None) -> tuple[float, ...]:
    """A trace's own times, or as much faster or slower as a mean rate needs."""
    if rate_per_s is None or not own_s[-1]:
        return tuple(own_s)
    factor = (len(own_s) - 1) / own_s[-1] / rate_per_s
    return tuple(factor * time_s for time_s in own_s)


def _ramp_s(num: int, start: float, end: float) -> tuple[float, ...]:
    """When the integral of a rate that goes evenly from `start` to `end` reaches 0, 1, ... num - 1.

    It is start * t + slope / 2 * t^2, and reaches num at the block's end, at the mean rate.
    """
    duration_s = num / ((start + end) / 2)
    slope = (end - start) / duration_s
    # The root in the form that does not cancel when the slope is 0.
    return tuple(
        2 * place / (start + math.sqrt(start**2 + 2 * slope * place)) for place in range(num)
    )
