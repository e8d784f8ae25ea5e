"""Requests -> HTTP/1.1 connections to one server -> response bodies, handed on as they arrive.

httptools (llhttp, in C) parses the responses; connections and their reuse are handled here. A
general client spends about 1 ms on a request and 0.1 ms on each chunk of a stream, and the load
test would measure that as the server's. Here bytes go from the socket to the stopwatch in one call.
No redirects, no proxies, no pipelining.
"""

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools

# Many servers close a connection that was idle for 5 s, and a request on it would fail. So one that
# was idle for longer than this is not used again.
_MAX_IDLE_S = 2.0


def authorization(api_key: str | None) -> dict[str, str]:
    """The header that carries an API key; no header without a key."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


class TransportError(Exception):
    """No complete response came; the message is the error class (loadtest/send/client.py)."""


@dataclass(frozen=True)
class Response:
    """A complete response.

    Attributes:
        status: of HTTP.
        ended_s: when its last byte arrived (perf_counter).
        is_fallback: whether our gateway says that another variant answered.
    """

    status: int
    ended_s: float
    is_fallback: bool


class Connection(asyncio.Protocol):
    """A protocol for `loop.create_connection` that sends one request after the other.

    httptools' parser calls the methods on_...

    Attributes:
        is_open: whether it can take another request.
        idle_since_s: when its last response was complete (perf_counter).
    """

    def __init__(self) -> None:
        self.is_open = False
        self.idle_since_s = time.perf_counter()
        self._done: asyncio.Future[Response] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True

    def send(self, request: bytes, on_body: Callable[[bytes], None]) -> asyncio.Future[Response]:
        """Writes head and body of a request; what `on_body` raises ends the exchange.

        Args:
            request: the bytes of head and body.
            on_body: gets the response's body, piece by piece.

        Returns:
            The response once it is complete; TransportError if the connection ends before that.
        """
        self._done = asyncio.get_running_loop().create_future()
        self.on_body = on_body
        self._status = 0  # until the head has arrived
        self._has_length = self._is_fallback = False
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(request)
        return self._done

    def close(self) -> None:
        """Closes at once; a response under way is lost."""
        self.is_open = False
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._done is None or self._done.done():
            return self.close()  # bytes that answer no request
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            self._fail(error.__context__ or error)  # __context__: what the callback raised
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail(TransportError("malformed_response"))

    def eof_received(self) -> None:
        self.is_open = False

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self._done and not self._done.done():
            # Without a length the body ends with the connection; the parser cannot be told of that.
            if self._status >= 200 and not self._has_length and error is None:
                self._finish()
            else:
                self._fail(TransportError("disconnected"))

    def on_message_begin(self) -> None:
        if self._done and self._done.done():  # a second response to one request
            raise TransportError("malformed_response")

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        is_chunked = name == b"transfer-encoding" and value.lower() == b"chunked"
        if is_chunked or name == b"content-length":
            self._has_length = True
        elif name == b"x-cast-fallback":
            self._is_fallback = True

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_message_complete(self) -> None:
        if self._status >= 200:  # the response itself follows a 1xx
            self._finish()

    def _finish(self) -> None:
        assert self._done is not None
        self.idle_since_s = time.perf_counter()
        if not self._parser.should_keep_alive():
            self.close()
        self._done.set_result(Response(self._status, self.idle_since_s, self._is_fallback))

    def _fail(self, error: BaseException) -> None:
        self.close()
        if self._done and not self._done.done():
            self._done.set_exception(error)


class Pool:
    """Connections to one server; it opens another whenever none is idle.

    Args:
        url: http or https; a path in it comes before that of each request.
        headers: sent with each request.

    Raises:
        ValueError: if `url` is not an http or https URL; the message is the remedy alone.
    """

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("write http://HOST:PORT or https://HOST:PORT")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._address = parts.hostname, parts.port or (443 if self._tls else 80)
        self._root = parts.path
        fields = {"Host": parts.netloc.rpartition("@")[2], **headers}
        self._fields = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._idle: list[Connection] = []

    async def exchange(
        self, method: str, path: str, body: bytes, on_body: Callable[[bytes], None]
    ) -> Response:
        """Sends a request and waits for the whole response.

        Args:
            method: GET or POST.
            path: from the slash after the URL's own path.
            body: JSON, or empty.
            on_body: gets the response's body, piece by piece; what it raises ends the exchange.

        Raises:
            TransportError: if no complete response came.
        """
        head = f"{method} {self._root}{path} HTTP/1.1\r\n{self._fields}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        connection = self._take_idle() or await self._open()
        try:
            response = await connection.send(f"{head}\r\n".encode() + body, on_body)
        except asyncio.CancelledError:  # a timeout, or the run was interrupted
            connection.close()
            raise
        if connection.is_open:
            self._idle.append(connection)
        return response

    async def open_ahead(self, num: int) -> None:
        """Opens connections until `num` are idle, or one cannot be opened."""
        ready: list[Connection] = []
        try:
            while len(ready) < num:
                ready.append(self._take_idle() or await self._open())
        except TransportError:
            pass  # the requests themselves will report it
        finally:
            self._idle += ready

    def close(self) -> None:
        """Closes the idle connections."""
        for connection in self._idle:
            connection.close()

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if time.perf_counter() - connection.idle_since_s > _MAX_IDLE_S:
                connection.close()
            if connection.is_open:
                return connection
        return None

    async def _open(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(Connection, *self._address, ssl=self._tls)
        except OSError as error:
            raise TransportError("connect_error") from error
        return connection
