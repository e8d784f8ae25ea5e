"""Heads of requests, bounded in time and in bytes.

uvicorn limits the time between requests, but waits without limit for the rest of a head. Since the
number of connections is limited, a few thousand unfinished heads would keep all other clients out.
And it limits the bytes of a head only if they arrive in more than one piece.
"""

import asyncio
import json
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from cast_serve.gateway.api.errors import APIError


class HeadLimit:
    """The middleware: 431 for a head that is too large.

    Args:
        max_bytes: of a request's target and header fields together.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _head_bytes(scope) <= self.max_bytes:
            return await self.app(scope, receive, send)
        error = APIError(
            431,
            f"the head of the request is larger than {self.max_bytes} bytes; send less, or raise "
            "CAST_MAX_HEADER_BYTES",
            "invalid_request_error",
            "head_too_large",
        )
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 431, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(error.body).encode()})


def _head_bytes(scope: Scope) -> int:
    fields = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    return fields + len(scope["raw_path"]) + len(scope["query_string"])


class BoundedHead(H11Protocol):
    """uvicorn's protocol with a time limit for heads.

    Args:
        timeout_s: from a connection's begin, or from the first byte of a later request, to the end
            of the head.
    """

    def __init__(self, *args: Any, timeout_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timeout_s = timeout_s
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(self._timeout_s, transport.close)

    def data_received(self, data: bytes) -> None:
        previous = self.cycle
        super().data_received(data)
        if self.cycle is not previous:  # a head is whole
            self._stop_timer()
        elif self._head_timer is None and (previous is None or previous.response_complete):
            self._head_timer = self.loop.call_later(self._timeout_s, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
