"""Bounds on the heads of requests, in time and in bytes; streams to HTTP/1.0 clients.

uvicorn limits the time between requests, but not the time that a head may take, and with httptools,
whose responses cost less CPU time than h11's, not its bytes either. As the number of connections is
limited, a few thousand unfinished heads would lock out every other client. A reverse proxy does
this better, and more (docs/deploy.md has nginx's configuration); this is what the gateway needs to
stay up without one. uvicorn sends an answer without a length in chunks, which HTTP/1.0 does not
have: there the end of the connection ends it.
"""

import asyncio
import sys
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from cast_serve.gateway.api.errors import APIError, send_error
from cast_serve.gateway.api.paths import LIVENESS

ABORT = "cast_abort"  # in a request's state: closes its connection, whatever waits to be sent


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
        await send_error(send, error, (b"connection", b"close"))


def _head_bytes(scope: Scope) -> int:
    fields = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    return fields + len(scope["raw_path"]) + len(scope["query_string"])


class BoundedHead(HttpToolsProtocol):
    """uvicorn's protocol, which closes a connection whose head does not end.

    Args:
        timeout_s: from a connection's begin, or from the first byte of a later request, to the end
            of the head.
        max_bytes: of what may come without an end of the head or a byte of the body: heads, and the
            fields after a body in chunks.
    """

    def __init__(self, *args: Any, timeout_s: float, max_bytes: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        self._timer: asyncio.TimerHandle | None = None
        self._is_in_head = False
        self._num_pending = 0  # bytes
        self._has_progressed = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        previous = self.cycle
        self._has_progressed = False
        super().data_received(data)
        if self.cycle is not previous:  # a head is complete
            self._stop_timer()
        elif previous is None or previous.response_complete:
            self._start_timer()
        self._num_pending = 0 if self._has_progressed else self._num_pending + len(data)
        if self._num_pending > self._max_bytes:
            self.transport.close()

    def on_message_begin(self) -> None:
        self._is_in_head = True
        super().on_message_begin()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        is_last = self.cycle is not None and self.cycle.response_complete
        if is_last and self._is_in_head:  # the next head came behind the last request
            self._start_timer()

    def on_headers_complete(self) -> None:
        self._has_progressed = True
        self._is_in_head = False
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) != 1 and self.parser.get_http_version() == "1.1":
            raise ValueError(f"{len(hosts)} Host fields")  # 400, as RFC 9112 has it
        limit = self.limit_concurrency
        if self.url.partition(b"?")[0] == LIVENESS.encode():
            self.limit_concurrency = None  # or a busy gateway would be restarted
        previous = self.cycle
        try:
            super().on_headers_complete()
        finally:
            self.limit_concurrency = limit
        if self.cycle is not previous:
            self.cycle.scope["state"][ABORT] = self.transport.abort
            if self.parser.get_http_version() == "1.0":
                _send_until_close(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._has_progressed = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._has_progressed = True
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self._timeout_s, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _send_until_close(cycle: RequestResponseCycle) -> None:
    """Has an answer whose length is not known end with its connection, not with a last chunk."""
    send = cycle.send
    has_length = False

    async def send_plain(message: Any) -> None:
        nonlocal has_length
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", [])}
            if not (has_length := b"content-length" in names):
                cycle.chunked_encoding = False
                cycle.expected_content_length = sys.maxsize  # uvicorn checks it
        elif not has_length and not message.get("more_body", False):
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = send_plain  # type: ignore[method-assign]
