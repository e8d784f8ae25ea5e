"""HTTP/1.1 responses in every framing, whole, in single bytes and broken off."""

import asyncio
from collections.abc import Callable

import pytest

from loadtest.send import connection
from loadtest.send.connection import Pool, TransportError

HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
LENGTH = HEAD + b"content-length: 11\r\n\r\nhello world"


def exchange(
    *responses: bytes,
    size: int = 1_000_000,
    on_body: Callable[[bytes], None] | None = None,
    is_closed_after: bool = True,
) -> tuple[list[int], bytes, list[bytes], int]:
    """Statuses, all bodies' bytes, requests and connections when a server says `responses`.

    It writes each in pieces of `size` bytes, and can close the connection after the last.
    """

    async def run() -> tuple[list[int], bytes, list[bytes], int]:
        requests: list[bytes] = []
        num_connections = 0
        left = list(responses)

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal num_connections
            num_connections += 1
            try:
                while left:
                    head = await reader.readuntil(b"\r\n\r\n")
                    length = head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]
                    requests.append(head + await reader.readexactly(int(length or b"0")))
                    response = left.pop(0)
                    for start in range(0, len(response), size):
                        writer.write(response[start : start + size])
                        await writer.drain()
                        await asyncio.sleep(0)
                    if b"connection: close" in response:
                        break
                if not is_closed_after:
                    await reader.read()
            except asyncio.IncompleteReadError:
                pass  # the client closed
            finally:
                writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            pool = Pool(f"http://127.0.0.1:{port}/base", {"Authorization": "Bearer key"})
            body = bytearray()
            feed = on_body or body.extend
            try:
                statuses = [
                    (await pool.exchange("POST", "/path", b"{}", feed)).status for _ in responses
                ]
            finally:
                pool.close()
            return statuses, bytes(body), requests, num_connections

    return asyncio.run(asyncio.wait_for(run(), 30))


@pytest.mark.parametrize("size", [1, 3, 1_000_000])
@pytest.mark.parametrize(
    "response",
    [
        LENGTH,
        CHUNKED + b"6\r\nhello \r\n5;note=1\r\nworld\r\n0\r\n\r\n",
        CHUNKED + b"B\r\nhello world\r\n0\r\nTrailer: a\r\nOther: b\r\n\r\n",
        HEAD + b"\r\nhello world",  # ends when the connection does
        b"HTTP/1.1 100 Continue\r\n\r\n" + LENGTH,
    ],
)
def test_framings(response: bytes, size: int) -> None:
    statuses, body, requests, _ = exchange(response, size=size)
    assert statuses == [200]
    assert body == b"hello world"
    (request,) = requests
    assert request.startswith(b"POST /base/path HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nAuthorization: Bearer key\r\n" in request
    assert request.endswith(b"\r\nContent-Length: 2\r\n\r\n{}")


def test_a_connection_serves_one_request_after_the_other() -> None:
    chunked = CHUNKED + b"b\r\nhello world\r\n0\r\n\r\n"
    empty = b"HTTP/1.1 204 No Content\r\n\r\n"
    error = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 1\r\n\r\n!"
    statuses, body, requests, num_connections = exchange(LENGTH, chunked, empty, error)
    assert statuses == [200, 200, 204, 503]
    assert body == b"hello worldhello world!"
    assert len(requests) == 4
    assert num_connections == 1


def test_a_server_that_closes_gets_a_new_connection() -> None:
    closing = HEAD + b"connection: close\r\nContent-Length: 1\r\n\r\na"
    statuses, body, _, num_connections = exchange(closing, LENGTH)
    assert (statuses, body, num_connections) == ([200, 200], b"ahello world", 2)


@pytest.mark.parametrize("more", [b"!", b"HTTP/1.1 200 OK\r\n", CHUNKED + b"1\r\na\r\n"])
def test_bytes_after_a_response_are_dropped_with_their_connection(more: bytes) -> None:
    statuses, body, _, num_connections = exchange(LENGTH + more, LENGTH)
    assert (statuses, body, num_connections) == ([200, 200], b"hello worldhello world", 2)


def test_an_old_idle_connection_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_MAX_IDLE_S", -1.0)
    assert exchange(LENGTH, LENGTH)[3] == 2


@pytest.mark.parametrize(
    ("response", "error"),
    [
        (b"", "disconnected"),
        (HEAD, "disconnected"),
        (HEAD + b"Content-Length: 5\r\n\r\nab", "disconnected"),
        (CHUNKED + b"5\r\nab", "disconnected"),
        (CHUNKED + b"2\r\nab\r\n", "disconnected"),
        (CHUNKED + b"xyz\r\nab\r\n", "malformed_response"),
        (CHUNKED + b"-1\r\nab\r\n", "malformed_response"),
        (HEAD + b"Content-Length: 2\r\n" + CHUNKED.removeprefix(HEAD), "malformed_response"),
        (HEAD.replace(b"\r\n", b"\n"), "malformed_response"),
        (b"hello\r\n\r\n", "malformed_response"),
        (b"HTTP/1.1 OK\r\n\r\n", "malformed_response"),
        (HEAD + b"Content-Length: many\r\n\r\n", "malformed_response"),
    ],
)
def test_broken_responses(response: bytes, error: str) -> None:
    with pytest.raises(TransportError, match=f"^{error}$"):
        exchange(response)


def test_what_the_reader_raises_ends_the_exchange() -> None:
    def refuse(_: bytes) -> None:
        raise RuntimeError("not this")

    with pytest.raises(RuntimeError, match="not this"):
        exchange(CHUNKED + b"2\r\nab\r\n", on_body=refuse, is_closed_after=False)


@pytest.mark.parametrize("url", ["127.0.0.1:1", "ftp://x", "http://", "http://[", "http://x:y"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"write http://HOST:PORT|Invalid IPv6|Port could not"):
        Pool(url, {})
