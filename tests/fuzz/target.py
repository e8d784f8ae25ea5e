"""A strategy and a check -> inputs for it: a few, always the same, or many new ones.

A check raises only if what it tests is wrong: an exception that is not documented, no end within
`LIMIT_S`, or an assertion.
"""

import itertools
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy

LIMIT_S = 60  # on a busy machine
TICK_S = 5  # while this process is stopped (Ctrl-Z) it is told of one tick, not of all
MAX_BYTES = 16 << 30  # of addresses: what would take all memory fails, and is found


class HangsError(Exception):
    """A check took longer than `LIMIT_S`."""


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    Attributes:
        name: of the target.
        inputs: what is drawn.
        check: what each input is given to.
    """

    name: str
    inputs: SearchStrategy[Any]
    check: Callable[[Any], None]

    def run(self, num_examples: int, number: int | None = None) -> None:
        """Draws examples and checks them.

        Args:
            num_examples: at most.
            number: seed; None: the same examples each time.

        Raises:
            Exception: what the check raised, for the smallest such input.
        """

        @settings(
            max_examples=num_examples,
            derandomize=number is None,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(self.inputs)
        def probe(drawn: Any) -> None:
            ticks = itertools.count(1)

            def tick(number: int, frame: FrameType | None) -> None:
                if next(ticks) * TICK_S >= LIMIT_S:
                    raise HangsError(f"no end within {LIMIT_S} s")

            before = signal.signal(signal.SIGALRM, tick)
            signal.setitimer(signal.ITIMER_REAL, TICK_S, TICK_S)
            try:
                self.check(drawn)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)

        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, hard))
        try:
            (probe if number is None else seed(number)(probe))()
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
