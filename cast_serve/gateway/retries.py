"""A request that failed at one replica -> whether another may be tried.

The request itself may be what breaks a worker, and would then break the next one too. So it is
retried freely only if no worker has seen it. If a worker reported a failure, one more is tried,
within a budget: when all workers fail, doubling the load does not help. If the connection was lost,
no other worker is tried, as the request may have killed this one.
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
