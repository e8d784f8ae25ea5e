"""What the gateway asks a worker for itself: bounded in time and bytes, and never unpacked."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from cast_serve.gateway.upstream.client import (
    MAX_REPLY_BYTES,
    Client,
    Reply,
    SilentError,
    WorkerError,
)
from tests.cast_serve.gateway.upstream.scripted_worker import closing


@asynccontextmanager
async def server(answer: bytes, pause_s: float = 0, at_once: int = 1 << 20) -> AsyncIterator[str]:
    """One that answers with these bytes, so many at once with a pause between; its URL."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering.append(asyncio.current_task())
        await reader.readuntil(b"\r\n\r\n")
        try:
            for start in range(0, len(answer), at_once):
                writer.write(answer[start : start + at_once])
                await writer.drain()
                await asyncio.sleep(pause_s)
        except ConnectionError:  # the client has left
            pass
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    answering: list[asyncio.Task[None] | None] = []
    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    await asyncio.gather(*filter(None, answering))


def asked(
    content: bytes,
    head: str = "HTTP/1.1 200 OK",
    pause_s: float = 0,
    at_once: int = 1 << 20,
    timeout_s: float = 20,
) -> Reply:
    """A question's answer, by a worker that sends it so."""

    async def ask() -> Reply:
        answer = f"{head}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
        async with server(answer, pause_s, at_once) as url, closing(Client()) as client:
            return await client.ask(f"{url}/health", timeout_s)

    return asyncio.run(ask())


def test_an_answer_that_drips_ends_at_the_time_out() -> None:
    with pytest.raises(SilentError, match="no whole answer within 0.3 s"):
        asked(b"x" * 40, pause_s=0.05, at_once=4, timeout_s=0.3)


def test_one_that_comes_in_time_is_whole() -> None:
    assert asked(b"x" * 40, pause_s=0.001, at_once=4) == Reply(200, b"x" * 40)
    assert asked(b"", "HTTP/1.1 503 X").status == 503


def test_an_answer_has_a_size_at_most() -> None:
    assert len(asked(b"x" * MAX_REPLY_BYTES).content) == MAX_REPLY_BYTES
    with pytest.raises(WorkerError, match=f"more than {MAX_REPLY_BYTES} bytes"):
        asked(b"x" * (MAX_REPLY_BYTES + 1))


def test_what_is_packed_is_not_unpacked() -> None:
    with pytest.raises(WorkerError, match="the answer is compressed"):
        asked(b"ok", "HTTP/1.1 200 OK\r\nContent-Encoding: gzip")
    assert asked(b"ok", "HTTP/1.1 200 OK\r\nContent-Encoding: identity").content == b"ok"


@pytest.mark.parametrize(
    "answer", [b"", b"no HTTP\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9"]
)
def test_what_is_not_an_answer_is_an_error_of_the_workers(answer: bytes) -> None:
    async def ask() -> None:
        async with server(answer) as url, closing(Client()) as client:
            await client.ask(url, 20)

    with pytest.raises(WorkerError):
        asyncio.run(ask())


@pytest.mark.parametrize(
    ("content", "why"), [(b"", "Expecting"), (b"{", "Expecting"), (b"[" * 100_000, "too deeply")]
)
def test_what_is_not_json_is_a_value_error(content: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Reply(200, content).json()
