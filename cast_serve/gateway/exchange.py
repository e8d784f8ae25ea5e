"""One request on its way through the gateway: what came in, its deadline, what became of it.

A client's request is an exchange, and so is each that the gateway sends itself to compare variants.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response

from cast_serve.gateway.api.errors import bad_request
from cast_serve.gateway.middleware.request_log import CLIENT_LEFT
from cast_serve.latency import RequestTiming, Stopwatch

GENERATING = ("/v1/completions", "/v1/chat/completions")
TIMEOUT_HEADER = "x-request-timeout"

T = TypeVar("T")


@dataclass(eq=False)
class Exchange:
    """The state of one request; each stage sets what it finds out.

    Attributes:
        route: where it came in, and where it is sent on to.
        keeps_text: whether `text` is wanted; it costs memory in a stream.
        on_end: called once, however it ends; None: it is not counted.
        facts: more for its log line.
        stopwatch: runs from its arrival.
        body: as it came, without the fields that have no effect.
        num_body_bytes: of it that came, see `BodyReader`.
        deadline_s: on the event loop's clock.
        variant: who was asked for; empty until that is known.
        epoch: of the comparison when it arrived (compare/live.py).
        sent_s: when a worker got it, on the stopwatch's clock.
        answered_by: the variant that answered in full; as the next three, set by `finish`.
        timing: None unless text was generated.
        prompt_tokens: as the worker counted them.
        text: of the first choice.
        status: the HTTP status it ended with; None while it runs.
    """

    route: str
    keeps_text: bool
    on_end: Callable[["Exchange"], None] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    body: dict[str, Any] = field(default_factory=dict)
    num_body_bytes: int = 0
    deadline_s: float = 0.0
    variant: str = ""
    epoch: int = 0
    sent_s: float = 0.0
    answered_by: str = ""
    timing: RequestTiming | None = None
    prompt_tokens: int = 0
    text: str = ""
    status: int | None = None

    @property
    def is_stream(self) -> bool:
        return self.route in GENERATING and self.body.get("stream") is True

    @property
    def has_usage(self) -> bool:
        """Whether the client asked for the usage chunk of its stream."""
        return (self.body.get("stream_options") or {}).get("include_usage") is True

    def body_for(self, variant: str) -> dict[str, Any]:
        """What a variant's worker gets: a stream is always asked for its usage."""
        body = {**self.body, "model": variant}
        if self.is_stream:
            body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
        return body

    def finish(self, variant: str, usage: dict[str, Any], text: str) -> None:
        """Records a complete answer.

        Args:
            variant: whose it is.
            usage: OpenAI's, with `prompt_tokens` and `completion_tokens`.
            text: of the first choice; empty unless `keeps_text`.
        """
        self.answered_by = variant
        self.timing = self.stopwatch.finish(usage.get("completion_tokens"))
        self.prompt_tokens = usage.get("prompt_tokens", 0)
        self.text = text

    def end(self, status: int) -> None:
        """Ends it; only the first call counts."""
        if self.status is None:
            self.status = status
            if self.on_end is not None:
                self.on_end(self)


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
                f"X-Request-Timeout is {given[:50]!r}, but must be a number of seconds above 0 "
                f"and up to {longest_s:g}",
                "X-Request-Timeout",
            )
    return asyncio.get_running_loop().time() + timeout_s


async def unless_left(work: Awaitable[T], leaving: Awaitable[object]) -> T | None:
    """The result of the work; None if the client leaves first: the work is then cancelled."""
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(leaving)
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        left.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def unless_the_client_leaves(
    request: Request, answer: Awaitable[Response], exchange: Exchange
) -> Response:
    """The answer; 499 if the client closes the connection first."""

    async def until_left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    response = await unless_left(answer, until_left())
    if response is None:
        exchange.end(CLIENT_LEFT)
        return Response(status_code=CLIENT_LEFT)
    return response
