"""One request on its way through the gateway: what came in, its deadline, what became of it."""

import asyncio
import math
from collections.abc import Awaitable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response

from cast_serve.gateway.api.errors import bad_request
from cast_serve.gateway.metrics import Metrics
from cast_serve.gateway.middleware.request_log import CLIENT_LEFT
from cast_serve.latency import Stopwatch

GENERATING = ("/v1/completions", "/v1/chat/completions")
TIMEOUT_HEADER = "x-request-timeout"
T = TypeVar("T")


class Outcome:
    """Counts a request once, whatever ends it."""

    def __init__(self, metrics: Metrics, route: str) -> None:
        self.metrics = metrics
        self.route = route
        self.variant = ""
        self._has_ended = False

    def end(self, status: int) -> None:
        if not self._has_ended:
            self._has_ended = True
            self.metrics.requests.labels(self.variant, self.route, str(status)).inc()


class Exchange:
    """A checked request.

    Attributes:
        has_usage: whether the client asked for the usage chunk of its stream.
        deadline_s: on the event loop's clock.
        sent_s: when a worker got it, on the stopwatch's clock.
    """

    def __init__(
        self,
        route: str,
        body: dict[str, Any],
        stopwatch: Stopwatch,
        deadline_s: float,
        outcome: Outcome,
        facts: dict[str, Any],
    ) -> None:
        self.route = route
        self.body = body
        self.stopwatch = stopwatch
        self.deadline_s = deadline_s
        self.outcome = outcome
        self.facts = facts
        self.sent_s = 0.0
        self.is_stream = route in GENERATING and body.get("stream") is True
        self.has_usage = (body.get("stream_options") or {}).get("include_usage") is True

    def body_for(self, variant: str) -> dict[str, Any]:
        body = {**self.body, "model": variant}
        if self.is_stream:
            body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
        return body


def deadline_s(request: Request, longest_s: float) -> float:
    """The event loop's time by which a request must be answered.

    Args:
        request: its X-Request-Timeout may ask for less time.
        longest_s: the most that it may ask, and what it gets if it does not ask.

    Raises:
        APIError: 400.
    """
    timeout_s = longest_s
    if (given := request.headers.get(TIMEOUT_HEADER)) is not None:
        try:
            timeout_s = math.nan if "_" in given else float(given)
        except ValueError:
            timeout_s = math.nan
        if not 0 < timeout_s <= longest_s:
            raise bad_request(
                f"X-Request-Timeout is {given[:50]!r}, but must be seconds above 0 and up to "
                f"{longest_s:g}",
                "X-Request-Timeout",
            )
    return asyncio.get_running_loop().time() + timeout_s


async def before(deadline_s: float, awaited: Awaitable[T]) -> T:
    """What is awaited; TimeoutError once the deadline has passed."""
    async with asyncio.timeout_at(deadline_s):
        return await awaited


async def unless_the_client_leaves(
    request: Request, answer: Awaitable[Response], outcome: Outcome
) -> Response:
    """The answer; if the client closes the connection first, the work for it is cancelled."""

    async def until_left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, left = asyncio.ensure_future(answer), asyncio.ensure_future(until_left())
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        outcome.end(CLIENT_LEFT)
        return Response(status_code=CLIENT_LEFT)
    finally:
        work.cancel()
        left.cancel()
        await asyncio.gather(work, left, return_exceptions=True)
