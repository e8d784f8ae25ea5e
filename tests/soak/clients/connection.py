"""An address -> an HTTP/1.1 connection of a client that may read slowly or leave at any point."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any


class ClosedError(Exception):
    """The gateway closed the connection: `has_begun` says whether a byte of an answer came."""

    def __init__(self, has_begun: bool) -> None:
        super().__init__("closed in mid answer" if has_begun else "closed without an answer")
        self.has_begun = has_begun


class Connection:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int, receive_buffer: int | None = None) -> "Connection":
        """Connects to 127.0.0.1.

        Args:
            port: the gateway's.
            receive_buffer: bytes that the kernel keeps for us; small ones make a slow reader felt.

        Raises:
            OSError: if nobody listens.
        """
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
            limit = receive_buffer or 1 << 16
            return cls(*await asyncio.open_connection(sock=sock, limit=limit))
        except BaseException:
            sock.close()
            raise

    async def send(
        self, method: str, path: str, headers: Mapping[str, str], content: bytes, missing: int = 0
    ) -> None:
        """Writes a request; `missing` bytes of its body are announced and not sent."""
        fields = {"Host": "x", "Content-Length": str(len(content) + missing), **headers}
        lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in fields.items()), "", ""]
        self._writer.write("\r\n".join(lines).encode() + content)
        with suppress(OSError):  # refused before it was read: the answer may be there all the same
            await self._writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the answer.

        Raises:
            ClosedError: if there is none.
        """
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            raise ClosedError(bool(error.partial)) from None
        except OSError:
            raise ClosedError(False) from None
        first, *lines = head.decode("latin-1").split("\r\n")[:-2]
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        self._headers = headers
        return int(first.split()[1]), headers

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it arrives.

        Raises:
            ClosedError: if it ends too early.
        """
        try:
            if self._headers.get("transfer-encoding") == "chunked":
                while size := int(await self._reader.readuntil(b"\r\n"), 16):
                    yield (await self._reader.readexactly(size + 2))[:-2]
                await self._reader.readexactly(2)
            elif "content-length" in self._headers:
                yield await self._reader.readexactly(int(self._headers["content-length"]))
            else:
                yield await self._reader.read()
        except (asyncio.IncompleteReadError, OSError):
            raise ClosedError(True) from None

    def close(self) -> None:
        """Leaves: at once, whatever was not read yet."""
        self._writer.close()


async def get(port: int, path: str, timeout_s: float = 15) -> tuple[int, bytes]:
    """Status and body of a GET on a connection of its own."""
    return await call(port, "GET", path, b"", timeout_s)


async def post(port: int, path: str, body: Mapping[str, Any]) -> tuple[int, bytes]:
    """Status and body of a POST on a connection of its own."""
    return await call(port, "POST", path, json.dumps(body).encode(), 15)


async def call(
    port: int, method: str, path: str, content: bytes, timeout_s: float
) -> tuple[int, bytes]:
    async with asyncio.timeout(timeout_s):
        connection = await Connection.open(port)
        try:
            await connection.send(method, path, {}, content)
            status, _ = await connection.head()
            return status, b"".join([piece async for piece in connection.pieces()])
        finally:
            connection.close()
