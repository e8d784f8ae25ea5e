"""A worker's events -> the client's response, whose end is noted however it comes about."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from cast_serve import sse
from cast_serve.gateway.api.errors import CUT_OFF, APIError, timed_out
from cast_serve.gateway.exchange import Exchange
from cast_serve.gateway.middleware.heads import ABORT
from cast_serve.gateway.middleware.request_log import CLIENT_LEFT, OWN_ERROR

logger = logging.getLogger(__name__)

END_S = 0.1  # for what follows a stream's last event
# From a request's deadline to the end of a client that does not read; the time-out itself, as an
# event, is sent before.
WRITE_S = 0.5


class ProxiedStream(StreamingResponse):
    """Closes the upstream however the response ends; for a client that left, vLLM then aborts.

    The deadline is for the client too: one that does not take what has come by then is cut off, or
    it would keep its place.
    """

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
        has_begun = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        async def send_last(error: APIError) -> None:
            if has_begun:
                event = sse.event(json.dumps(error.body).encode())
                with suppress(TimeoutError):
                    async with asyncio.timeout(END_S):
                        await send({"type": "http.response.body", "body": event})

        try:
            async with asyncio.timeout_at(self._exchange.deadline_s + WRITE_S):
                await super().__call__(scope, receive, send_and_note)
        except TimeoutError:
            self._exchange.end(timed_out(self._exchange.variant).status)
            logger.warning(
                "%s: a client did not read its answer in time", self._exchange.facts["request_id"]
            )
            if abort := scope["state"].get(ABORT):
                abort()
        except asyncio.CancelledError:
            self._exchange.end(CUT_OFF.status)
            await send_last(CUT_OFF)
            raise
        except Exception:
            self._exchange.end(OWN_ERROR.status)
            await send_last(OWN_ERROR)
            raise
        finally:
            self._exchange.end(CLIENT_LEFT)  # if nothing else ended it
            await asyncio.shield(self._on_close())


async def _joined(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for event in rest:
        yield event
