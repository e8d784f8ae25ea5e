"""Requests -> HTTP/1.1 connections to one server -> response bodies, handed on as they arrive.

Only what a load test needs, because it must cost little: a general client spends about 1 ms on a
request and 0.1 ms on each chunk of a stream, and a load test would then measure that. Here bytes go
from the socket to the stopwatch in one call. No redirects, no proxies, no pipelining.
"""

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

_MAX_IDLE_S = 2.0  # servers close idle connections, many after 5 s: a request must not meet that


def authorization(api_key: str | None) -> dict[str, str]:
    """The header that carries an API key; none without one."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


class TransportError(Exception):
    """There is no whole response; the message is the error's class."""


@dataclass(frozen=True)
class Response:
    """A response that is over: its status, and when its last byte arrived (perf_counter)."""

    status: int
    ended_s: float


class Connection(asyncio.Protocol):
    """Give it to `loop.create_connection`; it serves one request after the other.

    Attributes:
        is_open: whether it can take another request.
        idle_since_s: when its last response was over (perf_counter).
    """

    def __init__(self) -> None:
        self.is_open = False
        self.idle_since_s = time.perf_counter()
        self._buffer = bytearray()
        self._done: asyncio.Future[Response] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True

    def send(self, request: bytes, on_body: Callable[[bytes], None]) -> asyncio.Future[Response]:
        """Writes a request.

        Args:
            request: head and body.
            on_body: gets the body's bytes, piece by piece; what it raises ends the exchange.

        Returns:
            Done when the response is over; TransportError if it never is.
        """
        self._done = asyncio.get_running_loop().create_future()
        self._on_body = on_body
        self._status = 0  # until the head is here
        self._left: int | None = None  # body bytes to come; None: until the connection closes
        self._transport.write(request)
        return self._done

    def close(self) -> None:
        """Closes at once, whatever is under way."""
        self.is_open = False
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            self._read()
        except ValueError:
            self._fail(TransportError("malformed_response"))
        except Exception as error:
            self._fail(error)

    def eof_received(self) -> None:
        self.is_open = False

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self._done and not self._done.done():
            if self._status and not self._is_chunked and self._left is None and error is None:
                self._finish()
            else:
                self._fail(TransportError("disconnected"))

    def _read(self) -> None:
        if self._done is None or self._done.done():
            return self.close()  # nobody asked for this
        if not self._status and not self._read_head():
            return
        if self._is_chunked:
            self._read_chunks()
            return
        if body := bytes(self._buffer):
            self._buffer.clear()
            self._on_body(body)
        if self._left is not None:
            self._left -= len(body)
            if self._left <= 0:
                self._finish()

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        _, code, *_ = first.split(" ")
        status = int(code)
        if status < 200:  # 1xx: the real head follows
            return self._read_head()
        pairs = (line.partition(":") for line in lines)
        fields = {name.lower(): value.strip().lower() for name, _, value in pairs}
        self._is_chunked = fields.get("transfer-encoding") == "chunked"
        if status in (204, 304):
            self._left = 0
        elif "content-length" in fields:
            self._left = int(fields["content-length"])
        self._closes = fields.get("connection") == "close"
        self._status = status
        return True

    def _read_chunks(self) -> None:
        buffer = self._buffer
        while (line_end := buffer.find(b"\r\n")) >= 0:
            size = int(buffer[:line_end].split(b";")[0], 16)
            start, end = line_end + 2, line_end + 2 + size
            if size == 0:  # then trailers, if any, and an empty line
                if (end := buffer.find(b"\r\n\r\n")) >= 0:
                    del buffer[: end + 4]
                    self._finish()
                return
            if len(buffer) < end + 2:
                return
            chunk = bytes(buffer[start:end])
            del buffer[: end + 2]
            self._on_body(chunk)

    def _finish(self) -> None:
        assert self._done is not None
        self.idle_since_s = time.perf_counter()
        if self._closes or self._buffer:
            self.close()
        self._done.set_result(Response(self._status, self.idle_since_s))

    def _fail(self, error: Exception) -> None:
        self.close()
        if self._done and not self._done.done():
            self._done.set_exception(error)


class Pool:
    """Connections to one server; it opens another whenever none is idle.

    Args:
        url: the server's root.
        headers: sent with every request.

    Raises:
        ValueError: if `url` is none.
    """

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("write http://HOST:PORT")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._address = parts.hostname, parts.port or (443 if self._tls else 80)
        self._root = parts.path
        fields = {"Host": parts.netloc.rpartition("@")[2], **headers}
        self._fields = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._idle: list[Connection] = []

    async def exchange(
        self, method: str, path: str, body: bytes, on_body: Callable[[bytes], None]
    ) -> Response:
        """Sends a request and waits until its response is over.

        Args:
            method: GET or POST.
            path: below the server's root.
            body: JSON, or empty.
            on_body: gets the response's body, piece by piece; what it raises ends the exchange.

        Raises:
            TransportError: if there is no whole response.
        """
        head = f"{method} {self._root}{path} HTTP/1.1\r\n{self._fields}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        connection = self._take_idle() or await self._open()
        try:
            response = await connection.send(f"{head}\r\n".encode() + body, on_body)
        except asyncio.CancelledError:  # it took too long, or the run was interrupted
            connection.close()
            raise
        if connection.is_open:
            self._idle.append(connection)
        return response

    async def open_ahead(self, num: int) -> None:
        """Opens connections until `num` are idle; a server that is gone shows in the requests."""
        idle = [connection for _ in range(num) if (connection := self._take_idle())]
        self._idle += idle
        try:
            for _ in range(num - len(idle)):
                self._idle.append(await self._open())
        except TransportError:
            return

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
