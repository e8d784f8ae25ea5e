"""The way to a worker: its time-out is for the whole answer."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import httpx
import pytest

from cast_serve.gateway.upstream.transport import WorkerTransport

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n"


@asynccontextmanager
async def dripping(pause_s: float) -> AsyncIterator[str]:
    """A server that sends 40 bytes, one after the other, and is left when it has."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD)
        try:
            for _ in range(40):
                writer.write(b"x")
                await asyncio.sleep(pause_s)
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
            ended.set()

    ended = asyncio.Event()
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        await ended.wait()
        server.close()


async def get(pause_s: float, timeout_s: float | None) -> bytes:
    async with (
        dripping(pause_s) as url,
        httpx.AsyncClient(transport=WorkerTransport(), timeout=timeout_s) as client,
    ):
        return (await client.get(url)).content


def test_an_answer_that_drips_ends_at_the_time_out() -> None:
    with pytest.raises(httpx.ReadTimeout, match="not whole in time"):
        asyncio.run(get(pause_s=0.05, timeout_s=0.3))


@pytest.mark.parametrize("timeout_s", [30, None])
def test_one_that_comes_in_time_is_whole(timeout_s: float | None) -> None:
    assert asyncio.run(get(pause_s=0.001, timeout_s=timeout_s)) == b"x" * 40
