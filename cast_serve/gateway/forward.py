"""A replica and an exchange -> the replica's answer, whole or as a stream of events.

Nothing here chooses whom to ask. A replica that is lost before a byte of its answer was passed on
raises `BrokenError`, so that another may be asked; after that, the stream ends with an error event.
To count tokens every stream is asked for usage, and that chunk is taken out again where the client
did not ask.
"""

import asyncio
import dataclasses
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from typing import Any

import httpx
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from cast_serve import sse
from cast_serve.gateway.api import answers
from cast_serve.gateway.api.errors import APIError, unavailable
from cast_serve.gateway.compare.shadow import Shadow
from cast_serve.gateway.exchange import GENERATING, Exchange, before
from cast_serve.gateway.metrics import Metrics
from cast_serve.gateway.middleware import tracing
from cast_serve.gateway.middleware.request_log import CLIENT_LEFT
from cast_serve.gateway.upstream.variants import Replica, note_doubt, note_failure
from cast_serve.latency import RequestTiming, Stopwatch

logger = logging.getLogger(__name__)

# Servers close a connection that was idle for 5 s (uvicorn's and vLLM's own limit): before that it
# must not be taken for another request.
KEEP_ALIVE_S = 2.0
# A connection that ended before the answer began: the server may have closed it while it was idle.
DROPPED = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)


class BrokenError(Exception):
    """A replica was lost before a byte of its answer was passed on: another may be asked."""


class Forwarder:
    """The HTTP client to the workers.

    Args:
        metrics: counts what is in flight and what was finished.
        on_lost: called with a replica that was just marked down.

    Attributes:
        shadow: gets every finished request; set by who makes it, which needs `complete` for it.
    """

    shadow: Shadow

    def __init__(self, metrics: Metrics, on_lost: Callable[[Replica], None]) -> None:
        self.metrics = metrics
        self.client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=5),  # the request's deadline bounds the rest
            limits=httpx.Limits(
                max_connections=None,
                max_keepalive_connections=None,
                keepalive_expiry=KEEP_ALIVE_S,
            ),
            trust_env=False,  # proxies are for the outside, workers are ours
        )
        self._on_lost = on_lost

    async def forward(
        self, replica: Replica, exchange: Exchange, stack: AsyncExitStack
    ) -> Response:
        """One try at one replica: its whole answer, or a stream whose first event has come.

        Args:
            replica: who is asked.
            exchange: the request.
            stack: what is held for the request; a stream takes it over and closes it at its end.

        Raises:
            BrokenError: if the replica was lost, or failed, before a byte was passed on.
            APIError: its refusal (4xx), or 504.
        """
        stack.enter_context(_Counted(replica, self.metrics))
        exchange.sent_s = time.perf_counter()
        upstream = await self._send(replica, exchange)
        stack.push_async_callback(upstream.aclose)
        media_type = upstream.headers.get("content-type", "application/json")
        if exchange.is_stream and upstream.status_code == 200:
            events = self._events(upstream, replica, exchange)
            await stack.enter_async_context(aclosing(events))
            first = await anext(events)
            return _ProxiedStream(first, events, exchange, media_type, stack.pop_all().aclose)
        try:
            content = await before(exchange.deadline_s, upstream.aread())
        except TimeoutError:
            raise late(replica.variant) from None
        except httpx.HTTPError as error:
            raise self._broken(replica, error) from None
        if upstream.status_code >= 500:
            self._check_status(replica, upstream.status_code, content)
        if upstream.status_code >= 400:
            answers.check_shape(upstream.status_code, content)
        if upstream.status_code == 200:
            self._finish_whole(replica, exchange, content)
        exchange.outcome.end(upstream.status_code)
        return Response(content, upstream.status_code, media_type=media_type)

    async def complete(
        self, replica: Replica, body: Mapping[str, Any], route: str, deadline_s: float
    ) -> tuple[dict[str, Any], RequestTiming]:
        """A request of the gateway's own, uncounted as traffic.

        Returns:
            The answer, streamed or not in the shape of one that was not, and its timing.

        Raises:
            APIError: 503 if the replica fails, 504 after the deadline, or its refusal (4xx).
        """
        stopwatch = Stopwatch()
        asked = {**body, "model": replica.variant}
        try:
            with _Counted(replica, None):
                async with asyncio.timeout_at(deadline_s):
                    if asked.get("stream"):
                        answer = await self._collect(replica, route, asked, stopwatch)
                    else:
                        response = await self.client.post(f"{replica.url}{route}", json=asked)
                        self._check_status(replica, response.status_code, response.content)
                        answer = answers.parsed(response.content)
        except TimeoutError:
            raise late(replica.variant) from None
        except BrokenError:
            raise unavailable(replica.variant) from None
        except httpx.HTTPError as error:
            self._broken(replica, error)
            raise unavailable(replica.variant) from None
        except ValueError as error:
            logger.warning("%s: sent an answer that is none: %s", replica.variant, error)
            raise unavailable(replica.variant) from None
        return answer, stopwatch.finish((answer.get("usage") or {}).get("completion_tokens"))

    async def _collect(
        self, replica: Replica, route: str, body: dict[str, Any], stopwatch: Stopwatch
    ) -> dict[str, Any]:
        """A stream's last answer: its texts joined in one choice."""
        texts: list[str] = []
        answer: dict[str, Any] = {"choices": [{"index": 0, "finish_reason": None}]}
        body = {**body, "stream_options": {"include_usage": True}}
        async with self.client.stream("POST", f"{replica.url}{route}", json=body) as upstream:
            if upstream.status_code != 200:
                self._check_status(replica, upstream.status_code, await upstream.aread())
            async for data in sse.data_of(upstream.aiter_bytes()):
                if data == sse.DONE:
                    continue
                chunk = answers.parsed(data)
                if chunk.get("error"):
                    self._check_status(replica, answers.status_of(chunk), data)
                stopwatch.observe(chunk)
                texts.append(answers.text_of(chunk))
                for choice in chunk.get("choices") or ():
                    if choice.get("finish_reason"):
                        answer["choices"][0]["finish_reason"] = choice["finish_reason"]
                answer["usage"] = chunk.get("usage") or answer.get("usage")
        answer["choices"][0]["text"] = "".join(texts)
        return answer

    async def _send(self, replica: Replica, exchange: Exchange) -> httpx.Response:
        request = self.client.build_request(
            "POST",
            f"{replica.url}{exchange.route}",
            json=exchange.body_for(replica.variant),
            headers={"X-Request-Id": exchange.facts["request_id"], **tracing.outgoing_headers()},
        )
        for is_last in (False, True):
            try:
                return await before(exchange.deadline_s, self.client.send(request, stream=True))
            except TimeoutError:
                raise late(replica.variant) from None
            except httpx.HTTPError as error:
                if is_last or not isinstance(error, DROPPED):
                    raise self._broken(replica, error) from None
        raise AssertionError("the loop returns or raises")

    async def _events(
        self, upstream: httpx.Response, replica: Replica, exchange: Exchange
    ) -> AsyncGenerator[bytes, None]:
        """The SSE events of a stream, ended by [DONE] or, once it has begun, by an error event."""
        has_begun = False
        try:
            async with aclosing(self._passed_on(upstream, replica, exchange)) as events:
                async for event in events:
                    has_begun = True
                    yield event
                return
        except (BrokenError, APIError) as error:
            if not has_begun:
                raise
            failure = error if isinstance(error, APIError) else unavailable(replica.variant)
        exchange.outcome.end(failure.status)
        yield sse.event(json.dumps(failure.body).encode())

    async def _passed_on(
        self, upstream: httpx.Response, replica: Replica, exchange: Exchange
    ) -> AsyncGenerator[bytes, None]:
        """The events up to [DONE]; what goes wrong is raised as in `forward`."""
        prompt_tokens = 0
        texts: list[str] = []
        events = sse.data_of(upstream.aiter_bytes())
        try:
            # The deadline bounds the waits for events and no yield: it must not cancel the sender.
            while (data := await before(exchange.deadline_s, anext(events, None))) is not None:
                replica.num_received += 1
                if data == sse.DONE:
                    timing = exchange.stopwatch.finish()
                    self._finished(replica.variant, exchange, timing, prompt_tokens, "".join(texts))
                    exchange.outcome.end(200)
                    yield sse.event(sse.DONE)
                    return
                chunk = answers.parsed(data)
                if chunk.get("error"):  # vLLM's way to say that its engine died, before a [DONE]
                    self._check_status(replica, answers.status_of(chunk), data)
                exchange.stopwatch.observe(chunk)
                if self.shadow.is_on:
                    texts.append(answers.text_of(chunk))
                if usage := chunk.get("usage"):
                    prompt_tokens = usage["prompt_tokens"]
                    if not exchange.has_usage and not chunk.get("choices"):
                        continue
                if not exchange.has_usage and "usage" in chunk:
                    del chunk["usage"]
                    data = json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode()
                yield sse.event(data)
        except TimeoutError:
            raise late(replica.variant) from None
        except httpx.HTTPError as error:
            raise self._broken(replica, error) from None
        except ValueError as error:
            logger.warning("%s: sent an event that is none: %s", replica.variant, error)
        raise BrokenError  # also if it ended without [DONE]

    def _finish_whole(self, replica: Replica, exchange: Exchange, content: bytes) -> None:
        replica.num_received += 1
        if exchange.route not in GENERATING:
            return
        try:
            answer = answers.parsed(content)
            usage = answer["usage"]
            if usage is None:
                raise ValueError("it has no usage")
        except (ValueError, KeyError) as error:
            logger.warning("%s: sent an answer that is none: %r", replica.variant, error)
            raise BrokenError from None
        timing = exchange.stopwatch.finish(usage["completion_tokens"])
        self._finished(
            replica.variant, exchange, timing, usage["prompt_tokens"], answers.text_of(answer)
        )

    def _finished(
        self,
        variant: str,
        exchange: Exchange,
        timing: RequestTiming,
        prompt_tokens: int,
        text: str,
    ) -> None:
        self.metrics.observe(variant, timing, prompt_tokens)
        exchange.facts |= {
            "prompt_tokens": prompt_tokens,
            "output_tokens": timing.output_tokens,
            "ttft_s": None if timing.ttft_s is None else round(timing.ttft_s, 6),
        }
        # The repeat does not queue, so what it is held against has no waiting in it either.
        alone = dataclasses.replace(timing, intended_send_s=exchange.sent_s)
        self.shadow.offer(exchange.route, exchange.body, variant, text, alone)

    def _broken(self, replica: Replica, error: httpx.HTTPError) -> BrokenError:
        logger.warning("%s: %s: %s", replica, type(error).__name__, error)
        note_failure(replica)
        self._on_lost(replica)
        return BrokenError()

    def _check_status(self, replica: Replica, status: int, content: bytes) -> None:
        """Raises a worker's refusal as it is, and its own failure without its inside."""
        if 400 <= status < 500:
            message = answers.message_of(content)
            raise APIError(400 if status == 422 else status, message, "invalid_request_error")
        if status != 200:
            self._doubt(replica, status, content)
            raise BrokenError

    def _doubt(self, replica: Replica, status: int, content: bytes) -> None:
        logger.warning("%s: %d: %s", replica, status, content[:300].decode(errors="replace"))
        note_doubt(replica)


class _Counted:
    """Counts a request at its replica while it runs."""

    def __init__(self, replica: Replica, metrics: Metrics | None) -> None:
        self._replica = replica
        self._gauge = metrics.in_flight.labels(replica.variant) if metrics else None

    def __enter__(self) -> None:
        self._replica.num_outstanding += 1
        if self._gauge:
            self._gauge.inc()

    def __exit__(self, *_: object) -> None:
        self._replica.num_outstanding -= 1
        if self._gauge:
            self._gauge.dec()


class _ProxiedStream(StreamingResponse):
    """Closes the upstream however the response ends; for a client that left, vLLM then aborts."""

    def __init__(
        self,
        first: bytes,
        rest: AsyncIterator[bytes],
        exchange: Exchange,
        media_type: str,
        on_close: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(_joined(first, rest), media_type=media_type)
        self.headers["Cache-Control"] = "no-cache"
        self.headers["X-Accel-Buffering"] = "no"  # nginx would collect the stream
        self._outcome = exchange.outcome
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._outcome.end(CLIENT_LEFT)  # unless it has ended otherwise
            await asyncio.shield(self._on_close())


async def _joined(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for event in rest:
        yield event


def late(variant: str) -> APIError:
    return APIError(
        504,
        f"variant {variant!r} did not answer in time; allow more with X-Request-Timeout, or ask "
        "for fewer tokens",
        "server_error",
        "timeout",
    )
