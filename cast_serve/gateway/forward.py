"""A replica and an exchange -> the replica's answer, whole or as a stream of events.

Nothing here chooses whom to ask. A replica that is lost before a byte of its answer was passed on
raises `BrokenError`, so that another may be asked; after that, the stream ends with an error event.
To count tokens every stream is asked for usage, and that chunk is taken out again where the client
did not ask.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, contextmanager
from typing import Any

import httpx
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from cast_serve import sse
from cast_serve.gateway.api import answers
from cast_serve.gateway.api.errors import APIError, unavailable
from cast_serve.gateway.exchange import GENERATING, Exchange, before
from cast_serve.gateway.middleware import tracing
from cast_serve.gateway.middleware.request_log import CLIENT_LEFT
from cast_serve.gateway.upstream.replica import Replica, note_doubt, note_failure, note_locked
from cast_serve.gateway.upstream.transport import WorkerTransport

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
        on_lost: called with a replica that was just marked down.
        worker_key: sent with every request; empty: none.
    """

    def __init__(self, on_lost: Callable[[Replica], None], worker_key: str = "") -> None:
        self.client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {worker_key}"} if worker_key else None,
            timeout=httpx.Timeout(None, connect=5),  # the request's deadline bounds the rest
            transport=WorkerTransport(
                limits=httpx.Limits(
                    max_connections=None,
                    max_keepalive_connections=None,
                    keepalive_expiry=KEEP_ALIVE_S,
                ),
                trust_env=False,  # proxies are for the outside, workers are ours
            ),
            trust_env=False,
        )
        self._on_lost = on_lost

    async def forward(
        self, replica: Replica, exchange: Exchange, stack: AsyncExitStack
    ) -> Response:
        """One try at one replica: its whole answer, or a stream whose first event has come.

        Args:
            replica: who is asked.
            exchange: a client's request.
            stack: what is held for the request; a stream takes it over and closes it at its end.

        Raises:
            BrokenError: if the replica was lost, or failed, before a byte was passed on.
            APIError: its refusal (4xx), or 504.
        """
        upstream = await self._send(replica, exchange, stack)
        media_type = upstream.headers.get("content-type", "application/json")
        if exchange.is_stream and upstream.status_code == 200:
            events = self._events(upstream, replica, exchange)
            await stack.enter_async_context(aclosing(events))
            first = await anext(events)
            return _ProxiedStream(first, events, exchange, media_type, stack.pop_all().aclose)
        content = await self._read(upstream, replica, exchange)
        if upstream.status_code >= 500:
            self._check_status(replica, upstream.status_code, content)
        if upstream.status_code >= 400:
            answers.check_shape(upstream.status_code, content)
        if upstream.status_code == 200 and exchange.route in GENERATING:
            self._finish_whole(replica, exchange, content)
        exchange.end(upstream.status_code)
        return Response(content, upstream.status_code, media_type=media_type)

    async def collect(self, replica: Replica, exchange: Exchange) -> dict[str, Any]:
        """The whole answer to an exchange of the gateway's own, on a generating route.

        Returns:
            The answer as a JSON object; a streamed one in the shape of one that was not.

        Raises:
            BrokenError, APIError: as `forward` does.
        """
        async with AsyncExitStack() as stack:
            upstream = await self._send(replica, exchange, stack)
            if not exchange.is_stream or upstream.status_code != 200:
                content = await self._read(upstream, replica, exchange)
                self._check_status(replica, upstream.status_code, content)
                return self._finish_whole(replica, exchange, content)
            choice: dict[str, Any] = {"index": 0, "finish_reason": None}
            usage = None
            async with aclosing(self._chunks(upstream, replica, exchange)) as chunks:
                async for _, chunk in chunks:
                    usage = chunk.get("usage") or usage
                    for part in chunk.get("choices") or ():
                        choice["finish_reason"] = (
                            part.get("finish_reason") or choice["finish_reason"]
                        )
            if not usage:
                logger.warning("%s: sent a stream without usage", replica)
                raise BrokenError
            choice["text"] = exchange.text
            return {"choices": [choice], "usage": usage}

    async def _send(
        self, replica: Replica, exchange: Exchange, stack: AsyncExitStack
    ) -> httpx.Response:
        """The head of the replica's answer; the stack closes the connection."""
        headers = tracing.outgoing_headers()
        if "request_id" in exchange.facts:
            headers["X-Request-Id"] = exchange.facts["request_id"]
        request = self.client.build_request(
            "POST",
            f"{replica.url}{exchange.route}",
            json=exchange.body_for(replica.variant),
            headers=headers,
        )
        stack.enter_context(_counted_as_outstanding(replica))
        exchange.sent_s = time.perf_counter()
        for is_last in (False, True):
            try:
                sent = self.client.send(request, stream=True)
                upstream = await before(exchange.deadline_s, sent)
            except TimeoutError:
                raise timed_out(replica.variant) from None
            except httpx.HTTPError as error:
                if is_last or not isinstance(error, DROPPED):
                    raise self._broken(replica, error) from None
            else:
                stack.push_async_callback(upstream.aclose)
                if upstream.status_code == 401:  # of the gateway's key: no fault of the client's
                    note_locked(replica)
                    self._on_lost(replica)
                    raise BrokenError
                return upstream
        raise AssertionError("the loop returns or raises")

    async def _read(self, upstream: httpx.Response, replica: Replica, exchange: Exchange) -> bytes:
        try:
            content = await before(exchange.deadline_s, upstream.aread())
        except TimeoutError:
            raise timed_out(replica.variant) from None
        except httpx.HTTPError as error:
            raise self._broken(replica, error) from None
        replica.num_received += 1
        return content

    async def _events(
        self, upstream: httpx.Response, replica: Replica, exchange: Exchange
    ) -> AsyncGenerator[bytes, None]:
        """The SSE events of a stream, ended by [DONE] or, once it has begun, by an error event."""
        has_usage = exchange.has_usage
        has_begun = False
        try:
            async with aclosing(self._chunks(upstream, replica, exchange)) as chunks:
                async for data, chunk in chunks:
                    if not has_usage and "usage" in chunk:
                        if chunk["usage"] and not chunk.get("choices"):
                            continue
                        del chunk["usage"]
                        data = json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode()
                    has_begun = True
                    yield sse.event(data)
            exchange.end(200)
            yield sse.event(sse.DONE)
            return
        except (BrokenError, APIError) as error:
            if not has_begun:
                raise
            failure = error if isinstance(error, APIError) else unavailable(replica.variant)
        exchange.end(failure.status)
        yield sse.event(json.dumps(failure.body).encode())

    async def _chunks(
        self, upstream: httpx.Response, replica: Replica, exchange: Exchange
    ) -> AsyncGenerator[tuple[bytes, dict[str, Any]], None]:
        """Each event up to [DONE], as it came and parsed; the exchange is then finished.

        Raises:
            BrokenError, APIError: as `forward` does.
        """
        usage: dict[str, Any] = {}
        texts: list[str] = []
        events = sse.data_of(upstream.aiter_bytes())
        try:
            # The deadline bounds the waits for events and no yield: it must not cancel the sender.
            while (data := await before(exchange.deadline_s, anext(events, None))) is not None:
                replica.num_received += 1
                if data == sse.DONE:
                    exchange.finish(replica.variant, usage, "".join(texts))
                    return
                chunk = answers.parsed(data)
                if chunk.get("error"):  # vLLM's way to say that its engine died, before a [DONE]
                    self._check_status(replica, answers.status_of(chunk), data)
                exchange.stopwatch.observe(chunk)
                usage = chunk.get("usage") or usage
                if exchange.keeps_text:
                    texts.append(answers.text_of(chunk))
                yield data, chunk
        except TimeoutError:
            raise timed_out(replica.variant) from None
        except httpx.HTTPError as error:
            raise self._broken(replica, error) from None
        except ValueError as error:
            logger.warning("%s: sent an invalid event: %s", replica.variant, error)
        raise BrokenError  # also if it ended without [DONE]

    def _finish_whole(self, replica: Replica, exchange: Exchange, content: bytes) -> dict[str, Any]:
        """The answer, parsed; the exchange is finished."""
        try:
            answer = answers.parsed(content)
            if not answer.get("usage"):
                raise ValueError("it has no usage")
        except ValueError as error:
            logger.warning("%s: sent an invalid answer: %s", replica.variant, error)
            raise BrokenError from None
        exchange.finish(replica.variant, answer["usage"], answers.text_of(answer))
        return answer

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


@contextmanager
def _counted_as_outstanding(replica: Replica) -> Iterator[None]:
    replica.num_outstanding += 1
    try:
        yield
    finally:
        replica.num_outstanding -= 1


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
        self._exchange = exchange
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.end(CLIENT_LEFT)  # unless it has ended otherwise
            await asyncio.shield(self._on_close())


async def _joined(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for event in rest:
        yield event


def timed_out(variant: str) -> APIError:
    return APIError(
        504,
        f"variant {variant!r} did not answer in time; allow more with X-Request-Timeout, or ask "
        "for fewer tokens",
        "server_error",
        "timeout",
    )
