"""A replica and an exchange -> the replica's answer, whole or as a stream of events.

Nothing here chooses the replica. One that fails before a byte of its answer was passed on raises a
`BrokenError` that says whether to try another; after that, the stream ends with an error event.
Every stream is asked for usage, to count tokens; that chunk is removed again unless the client
asked for it.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
from fastapi.responses import Response

from cast_serve import sse
from cast_serve.gateway.api import answers
from cast_serve.gateway.api.errors import APIError, timed_out, unavailable
from cast_serve.gateway.exchange import GENERATING, Exchange
from cast_serve.gateway.middleware import tracing
from cast_serve.gateway.stream import END_S, ProxiedStream
from cast_serve.gateway.upstream.client import (
    Client,
    StaleError,
    UnsentError,
    is_packed,
    read_piece,
)
from cast_serve.gateway.upstream.replica import (
    LOCKED,
    Replica,
    note_failure,
    note_refusal,
)

logger = logging.getLogger(__name__)

Chunk = tuple[bytes, dict[str, Any]]
"""An event's data, as it came and parsed."""


class BrokenError(Exception):
    """A replica answered 5xx, aborted the request, or sent something that is not an answer.

    No byte was passed on, and the replica is still there.
    """


class UnreachedError(BrokenError):
    """The replica has not seen the request."""


class LostError(BrokenError):
    """The connection was lost after the request was sent, which may have killed the replica."""


@dataclass(eq=False, frozen=True)
class Forwarder:
    """Asks replicas.

    Attributes:
        on_lost: called with a replica that was just marked down.
        on_resend: called with a replica that gets a request again, since its kept connection had
            been closed.
        max_answer_bytes: of an answer that is not streamed.
    """

    client: Client
    on_lost: Callable[[Replica], None]
    on_resend: Callable[[Replica], None]
    max_answer_bytes: int

    async def forward(
        self, replica: Replica, exchange: Exchange, stack: AsyncExitStack
    ) -> Response:
        """One try at one replica: its whole answer, or a stream whose first event has come.

        Args:
            replica: the one to ask.
            exchange: a client's request.
            stack: what is held for the request; a stream takes it over and closes it at its end.

        Raises:
            BrokenError: if the replica was lost, or failed, before a byte was passed on.
            APIError: its refusal (4xx), 502 or 504.
        """
        upstream = await self._send(replica, exchange, stack)
        media_type = upstream.headers.get("content-type", "application/json")
        if exchange.is_stream and upstream.status == 200:
            events = self._events(upstream, replica, exchange)
            await stack.enter_async_context(aclosing(events))
            first = await anext(events)
            return ProxiedStream(first, events, exchange, media_type, stack.pop_all().aclose)
        content = await self._read(upstream, replica)
        if 400 <= upstream.status < 500:
            answers.check_shape(upstream.status, content)
        else:
            _check_status(replica, upstream.status, content)
        if upstream.status == 200 and exchange.route in GENERATING:
            self._finish_whole(replica, exchange, content)
        exchange.end(upstream.status)
        return Response(content, upstream.status, media_type=media_type)

    async def collect(self, replica: Replica, exchange: Exchange) -> dict[str, Any]:
        """The whole answer to an exchange of the gateway's own, on a generating route.

        Returns:
            The answer as a JSON object; a streamed one in the shape of one that was not.

        Raises:
            BrokenError, APIError: as `forward` does.
        """
        async with AsyncExitStack() as stack:
            upstream = await self._send(replica, exchange, stack)
            if not exchange.is_stream or upstream.status != 200:
                content = await self._read(upstream, replica)
                _check_status(replica, upstream.status, content)
                return self._finish_whole(replica, exchange, content)
            async with aclosing(self._chunks(upstream, replica, exchange)) as pieces:
                chunks = [chunk async for several in pieces for _, chunk in several]
            usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
            if not usages:
                logger.warning("%s: sent a stream without usage", replica)
                raise BrokenError
            parts = [part for chunk in chunks for part in chunk.get("choices") or ()]
            reasons = [part["finish_reason"] for part in parts if part.get("finish_reason")]
            reason = reasons[-1] if reasons else None
            choice = {"index": 0, "finish_reason": reason, "text": exchange.text}
            return {"choices": [choice], "usage": usages[-1]}

    async def _send(
        self, replica: Replica, exchange: Exchange, stack: AsyncExitStack
    ) -> aiohttp.ClientResponse:
        """The head of the replica's answer; the stack closes the connection."""
        headers = tracing.outgoing_headers()
        if "request_id" in exchange.facts:
            headers["X-Request-Id"] = exchange.facts["request_id"]
        content = _dumped(exchange.body_for(replica.variant))
        stack.enter_context(_counted_as_outstanding(replica))
        exchange.sent_s = time.perf_counter()
        upstream = await self._post(replica, exchange, content, headers)
        stack.callback(upstream.close)  # nothing, if it was read to its end
        if upstream.status == 401:  # of the gateway's key: no fault of the client's
            note_refusal(replica, LOCKED)
            self.on_lost(replica)
            raise UnreachedError
        if is_packed(upstream):
            logger.warning("%s: sent a compressed answer, which was not asked for", replica)
            raise BrokenError
        return upstream

    async def _post(
        self, replica: Replica, exchange: Exchange, content: bytes, headers: dict[str, str]
    ) -> aiohttp.ClientResponse:
        """Sends it; once more if the replica had just closed the kept connection."""
        url = f"{replica.url}{exchange.route}"
        try:
            try:
                return await self.client.post(url, content, headers, exchange.deadline_s)
            except StaleError:
                self.on_resend(replica)
            try:
                return await self.client.post(url, content, headers, exchange.deadline_s)
            except (StaleError, UnsentError) as error:  # the first one may have been read
                raise self._lost(replica, error) from None
        except UnsentError as error:
            logger.warning("%s: %s", replica, error)
            if error.is_refused:
                note_failure(replica)
                self.on_lost(replica)
            else:
                replica.is_doubted.set()
            raise UnreachedError from None
        except aiohttp.ClientError as error:
            raise self._lost(replica, error) from None
        except TimeoutError:
            raise timed_out(replica.variant) from None

    async def _read(self, upstream: aiohttp.ClientResponse, replica: Replica) -> bytes:
        content = bytearray()
        while piece := await self._piece(upstream, replica):
            content += piece
            if len(content) > self.max_answer_bytes:
                raise _too_large(replica.variant, self.max_answer_bytes)
        replica.num_received += 1
        return bytes(content)

    async def _piece(self, upstream: aiohttp.ClientResponse, replica: Replica) -> bytes:
        try:
            return await read_piece(upstream)
        except aiohttp.ClientError as error:
            raise self._lost(replica, error) from None
        except TimeoutError:
            raise timed_out(replica.variant) from None

    async def _events(
        self, upstream: aiohttp.ClientResponse, replica: Replica, exchange: Exchange
    ) -> AsyncGenerator[bytes, None]:
        """The SSE events of a stream, as many at once as came at once.

        The last is [DONE] or, if the stream breaks once it has begun, an error event.
        """
        has_usage = exchange.has_usage
        has_begun = False
        try:
            async with aclosing(self._chunks(upstream, replica, exchange)) as pieces:
                async for chunks in pieces:
                    if events := b"".join([_passed_on(chunk, has_usage) for chunk in chunks]):
                        has_begun = True
                        yield events
            exchange.end(200)
            yield sse.event(sse.DONE)
            with suppress(aiohttp.ClientError, TimeoutError):
                async with asyncio.timeout(END_S):
                    while await read_piece(upstream):
                        pass
            return
        except (BrokenError, APIError) as error:
            if not has_begun:
                raise
            failure = error if isinstance(error, APIError) else unavailable(replica.variant)
        exchange.end(failure.status)
        yield sse.event(json.dumps(failure.body).encode())

    async def _chunks(
        self, upstream: aiohttp.ClientResponse, replica: Replica, exchange: Exchange
    ) -> AsyncGenerator[list[Chunk], None]:
        """The chunks up to [DONE], in lists of what came at once; the exchange is then finished.

        Raises:
            BrokenError, APIError: as `forward` does, once all chunks before it were yielded.
        """
        reader = sse.Reader()
        usage: dict[str, Any] = {}
        texts: list[str] = []
        is_done = False
        while not is_done:
            piece = await self._piece(upstream, replica)
            if not piece:
                logger.warning("%s: ended a stream without [DONE]", replica)
                raise BrokenError
            chunks: list[Chunk] = []
            failure: Exception | None = None
            try:
                for data in reader.feed(piece):
                    replica.num_received += 1
                    if is_done := data == sse.DONE:
                        break
                    chunk = _checked(replica, data)
                    exchange.stopwatch.observe(chunk)
                    usage = chunk.get("usage") or usage
                    if exchange.keeps_text:
                        texts.append(answers.text_of(chunk))
                    chunks.append((data, chunk))
            except (BrokenError, APIError) as error:
                failure = error
            except ValueError as error:
                logger.warning("%s: sent an invalid event: %s", replica, error)
                failure = BrokenError()
            if chunks:
                yield chunks
            if failure is not None:
                raise failure
        exchange.finish(replica.variant, usage, "".join(texts))

    def _finish_whole(self, replica: Replica, exchange: Exchange, content: bytes) -> dict[str, Any]:
        """The answer, parsed; the exchange is finished."""
        try:
            answer = answers.parsed(content)
            if not answer.get("usage"):
                raise ValueError("it has no usage")
            _check_not_aborted(replica, answer)
        except ValueError as error:
            logger.warning("%s: sent an invalid answer: %s", replica.variant, error)
            raise BrokenError from None
        exchange.finish(replica.variant, answer["usage"], answers.text_of(answer))
        return answer

    def _lost(self, replica: Replica, error: Exception) -> LostError:
        """A lost connection only has the replica checked: its other requests may be fine."""
        logger.warning("%s: lost: %s: %s", replica, type(error).__name__, error)
        replica.is_doubted.set()
        return LostError()


def _checked(replica: Replica, data: bytes) -> dict[str, Any]:
    """A stream's chunk, parsed; raises the error it reports, or ValueError if it is not a chunk."""
    chunk = answers.parsed(data)
    if chunk.get("error"):  # vLLM's way to say that its engine died, before a [DONE]
        _check_status(replica, answers.status_of(chunk), data)
    _check_not_aborted(replica, chunk)
    return chunk


def _passed_on(chunk: Chunk, has_usage: bool) -> bytes:
    """The event for a client that asked for usage or did not."""
    data, found = chunk
    if has_usage or "usage" not in found:
        return sse.event(data)
    if found["usage"] and not found.get("choices"):
        return b""
    del found["usage"]
    return sse.event(_dumped(found))


def _dumped(found: dict[str, Any]) -> bytes:
    return json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode()


def _check_status(replica: Replica, status: int, content: bytes) -> None:
    """Raises a worker's refusal as it is; whatever else is not 200, without its inside."""
    if 400 <= status < 500:
        message = answers.message_of(content)
        raise APIError(400 if status == 422 else status, message, "invalid_request_error")
    if status != 200:
        logger.warning("%s: %d: %s", replica, status, content[:300].decode(errors="replace"))
        replica.is_doubted.set()
        raise BrokenError


def _check_not_aborted(replica: Replica, answer: dict[str, Any]) -> None:
    if answers.is_aborted(answer):
        logger.warning("%s: its engine aborted a request", replica)
        replica.is_doubted.set()
        raise BrokenError


@contextmanager
def _counted_as_outstanding(replica: Replica) -> Iterator[None]:
    replica.num_outstanding += 1
    try:
        yield
    finally:
        replica.num_outstanding -= 1


def _too_large(variant: str, max_bytes: int) -> APIError:
    """502. No other replica is tried: its answer would be just as large."""
    return APIError(
        502,
        f"the answer of variant {variant!r} is larger than {max_bytes} bytes; ask for fewer "
        "tokens, choices or log probabilities, stream it, or raise CAST_MAX_ANSWER_BYTES",
        "server_error",
        "answer_too_large",
    )
