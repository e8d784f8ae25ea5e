"""A request that failed at one replica -> whether another may be asked, and why it was.

A request may be what breaks a worker, and sent on it would break the next one too. So it goes on
freely only where no worker has seen it. One that a worker answered with a failure of its own goes
to one more, as long as few requests do: when all workers fail, twice the load is no help. One whose
connection was lost goes to nobody else, since its worker may have died of it.
"""

BUDGET = 10.0  # requests that may be sent on before others have succeeded in between
BUDGET_SHARE = 0.2  # of all requests, that may be sent on in the long run

UNREACHED = "unreached"  # no worker has seen it
FAILED = "failed"  # a worker answered 5xx, gave it up, or sent what is not an answer
STALE = "stale"  # a worker closed a kept connection as it was written to: to the same one again
REASONS = (UNREACHED, FAILED, STALE)


class RetryBudget:
    """How many requests that a worker may have begun can be sent to another, over all requests."""

    def __init__(self) -> None:
        self._left = BUDGET

    def note_request(self) -> None:
        self._left = min(BUDGET, self._left + BUDGET_SHARE)

    def take(self) -> bool:
        """Whether one more may be sent on; it is then counted."""
        if self._left < 1:
            return False
        self._left -= 1
        return True
