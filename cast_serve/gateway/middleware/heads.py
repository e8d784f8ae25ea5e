"""Heads of requests, bounded in time and in bytes; clients that stop reading, and HTTP/1.0.

uvicorn limits the time between requests, but waits without limit for the rest of a head. Since the
number of connections is limited, a few thousand unfinished heads would keep all other clients out.
And with httptools, whose responses cost less CPU time than h11's, it does not limit the bytes. Nor
does it limit how long an answer waits for a client that takes no more of it, in a place of a queue.
An answer without a length it sends in chunks, which HTTP/1.0 does not have: there the end of the
connection is the end of the answer (RFC 9112, 6.3).
"""

import asyncio
import json
import sys
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from cast_serve.gateway.api.errors import APIError, send_error
from cast_serve.gateway.api.paths import LIVENESS

STALL_S = 60.0  # nginx's send_timeout: a client that takes no byte for so long has left
LINGER_S = 1.0  # how long, and for how many bytes, a refused client may go on sending
LINGER_BYTES = 1 << 20
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
        await send_error(send, _too_large(self.max_bytes), (b"connection", b"close"))


def _too_large(max_bytes: int) -> APIError:
    return APIError(
        431,
        f"the head of the request is larger than {max_bytes} bytes; send less, or raise "
        "CAST_MAX_HEADER_BYTES",
        "invalid_request_error",
        "head_too_large",
    )


def _head_bytes(scope: Scope) -> int:
    fields = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    return fields + len(scope["raw_path"]) + len(scope["query_string"])


class BoundedHead(HttpToolsProtocol):
    """uvicorn's protocol with limits for heads that are not whole yet, and for stalled answers.

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
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._is_in_head = False
        self._num_pending = 0  # bytes
        self._has_progressed = False
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(self._timeout_s, transport.close)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            self._num_pending += len(data)
            if self._num_pending > LINGER_BYTES:
                self.transport.close()
            return
        previous = self.cycle
        self._has_progressed = False
        super().data_received(data)
        if self.cycle is not previous:  # a head is whole
            self._stop_timer()
        elif self._head_timer is None and (previous is None or previous.response_complete):
            self._head_timer = self.loop.call_later(self._timeout_s, self.transport.close)
        self._num_pending = 0 if self._has_progressed else self._num_pending + len(data)
        if self._num_pending > self._max_bytes and not self.transport.is_closing():
            self._refuse()

    def on_message_begin(self) -> None:
        self._is_in_head = True
        super().on_message_begin()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        is_last = self.cycle is not None and self.cycle.response_complete
        if is_last and self._is_in_head and self._head_timer is None:  # it came behind the last one
            self._head_timer = self.loop.call_later(self._timeout_s, self.transport.close)

    def on_headers_complete(self) -> None:
        self._has_progressed = True
        self._is_in_head = False
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) != 1 and self.parser.get_http_version() == "1.1":
            raise ValueError(f"{len(hosts)} Host fields")  # 400, as RFC 9112 has it
        limit = self.limit_concurrency
        if self.url.partition(b"?")[0] == LIVENESS.encode():
            self.limit_concurrency = None  # or a gateway that has much to do would be restarted
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

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_progress()

    def resume_writing(self) -> None:
        self._stop_stall_timer()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_stall_timer()
        super().connection_lost(exc)

    def _refuse(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            return self.transport.close()
        content = json.dumps(_too_large(self._max_bytes).body).encode()
        head = (
            "HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
            f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + content)
        # Closing while bytes of the client's are unread would reset the connection, and a reset
        # discards the answer at the client, so what follows is read and dropped.
        self._is_refused = True
        self.transport.write_eof()
        self._stop_timer()
        self._head_timer = self.loop.call_later(LINGER_S, self.transport.close)

    def _await_progress(self) -> None:
        """Looks again in a while; until `resume_writing` nothing is added to what is to be sent."""
        left = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(STALL_S, self._end_if_stalled, left)

    def _end_if_stalled(self, left: int) -> None:
        if self.transport.get_write_buffer_size() < left:
            self._await_progress()
        else:
            self.transport.abort()

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


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
