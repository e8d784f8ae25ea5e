"""A request for a variant -> a place at its workers, a place in its queue, or 429 with Retry-After.

`Places` has an `Admission` for each variant.

Each variant has so many places (`max_running` per replica that is up) and a bounded queue, first
come, first served. vLLM queues too, but without bound and before it has checked anything.

A client may leave, or its time may run out, in the same pass of the event loop in which its turn
comes. So a turn whose client has left is skipped, and a turn that came too late is given back.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

from cast_serve.gateway.api.errors import ShedError
from cast_serve.gateway.upstream.replica import Variant

RATE_WINDOW = 64  # finished requests that the service rate is measured over
MAX_RETRY_AFTER_S = 60


class NoPlacesError(Exception):
    """The variant went down while the request waited in its queue."""


class Admission:
    """The places of one variant.

    Args:
        num_places: how many requests may run now; asked whenever one may be admitted.
        max_queued: how many may wait.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        num_places: Callable[[], int],
        max_queued: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_places = num_places
        self._max_queued = max_queued
        self._clock = clock
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._again: deque[asyncio.Future[None]] = deque()  # whose turn comes before
        self._finished_busy_s: deque[float] = deque(maxlen=RATE_WINDOW)
        self._busy_s = 0.0  # with a request running, up to `_busy_since_s`
        self._busy_since_s: float | None = None
        self.num_running = 0

    @property
    def num_queued(self) -> int:
        return len(self._again) + len(self._waiting)

    @asynccontextmanager
    async def place(self, timeout_s: float, is_again: bool = False) -> AsyncIterator[None]:
        """Waits for a place, and gives it back at the end.

        Args:
            timeout_s: how long to wait.
            is_again: for a request that has had a place, whose replica failed: its turn comes
                before those that have not, however many they are.

        Raises:
            ShedError: 429 if the queue is full, 504 if no place was free in time.
            NoPlacesError: if the variant went down meanwhile, see `turn_away`.
        """
        await self._enter(timeout_s, is_again)
        try:
            yield
        finally:
            self._give_back()
            self._finished_busy_s.append(self._busy_now_s())
            # Not at once: whoever goes on to another replica with `is_again` joins the queue first.
            asyncio.get_running_loop().call_soon(self.admit)

    def retry_after_s(self) -> int:
        """Whole seconds until a request sent then should find a place: backlog over service rate.

        The rate is that of the latest finished requests, over the time in which any was running; 1
        a second while fewer than two have finished.
        """
        rate = 1.0
        if len(self._finished_busy_s) > 1:
            busy_s = self._busy_now_s() - self._finished_busy_s[0]
            rate = (len(self._finished_busy_s) - 1) / max(busy_s, 1e-3)
        return min(max(math.ceil((self.num_queued + 1) / rate), 1), MAX_RETRY_AFTER_S)

    def admit(self) -> None:
        """Admits as many as there are places; call it when a replica comes up."""
        while self.num_queued and self.num_running < self._num_places():
            turn = (self._again or self._waiting).popleft()
            if not turn.done():  # else its client has left, and is about to leave the queue
                self._take()
                turn.set_result(None)

    def turn_away(self) -> None:
        """Turns everyone in the queue away; call it when the variant's last replica is down."""
        while self.num_queued:
            turn = (self._again or self._waiting).popleft()
            if not turn.done():
                turn.set_exception(NoPlacesError())

    async def _enter(self, timeout_s: float, is_again: bool) -> None:
        num_before = len(self._again) if is_again else self.num_queued
        if self.num_running < self._num_places() and not num_before:
            self._take()
            return
        if len(self._waiting) >= self._max_queued and not is_again:
            raise ShedError(
                429,
                f"{len(self._waiting)} requests are waiting, the limit of this variant; try again "
                "after Retry-After seconds",
                "rate_limit_error",
                "queue_full",
                headers={"Retry-After": str(self.retry_after_s())},
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue = self._again if is_again else self._waiting
        queue.append(turn)
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except BaseException as error:  # also when the client left
            if turn in queue:
                queue.remove(turn)
            elif turn.done() and not turn.cancelled() and turn.exception() is None:
                self._give_back()  # its turn came at the same moment
            self.admit()
            if isinstance(error, TimeoutError):
                raise ShedError(
                    504,
                    f"no place was free within {timeout_s:g} s; try again later, or allow more "
                    "time with X-Request-Timeout",
                    "server_error",
                    "timeout",
                    headers={"Retry-After": str(self.retry_after_s())},
                ) from None
            raise

    def _take(self) -> None:
        if self._busy_since_s is None:
            self._busy_since_s = self._clock()
        self.num_running += 1

    def _give_back(self) -> None:
        self.num_running -= 1
        if self.num_running == 0:
            self._busy_s = self._busy_now_s()
            self._busy_since_s = None

    def _busy_now_s(self) -> float:
        if self._busy_since_s is None:
            return self._busy_s
        return self._busy_s + self._clock() - self._busy_since_s


class Places:
    """Each variant's places: `max_running` per replica that is up, `max_queued` in its queue."""

    def __init__(self, variants: Mapping[str, Variant], max_running: int, max_queued: int) -> None:
        self._variants = variants
        self._max_running = max_running
        self.admissions = {
            name: Admission(partial(self._num_places, variant), max_queued)
            for name, variant in variants.items()
        }

    def _num_places(self, variant: Variant) -> int:
        return self._max_running * sum(replica.is_up for replica in variant.replicas)

    def note_state(self, name: str) -> None:
        """Admits or turns away the queue; call it when a variant may have come up or gone down."""
        if self._variants[name].is_up:
            self.admissions[name].admit()
        else:
            self.admissions[name].turn_away()

    def place(
        self, name: str, until_s: float, is_again: bool = False
    ) -> AbstractAsyncContextManager[None]:
        """`Admission.place` of a variant, until a time on the event loop's clock."""
        left_s = until_s - asyncio.get_running_loop().time()
        return self.admissions[name].place(left_s, is_again)
