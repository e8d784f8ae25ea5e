"""A worker's bytes as they may come: in pieces, at once, broken, on a connection used before."""

import asyncio
import gc
import gzip
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest

from cast_serve.gateway.app import create_app
from cast_serve.gateway.settings import GatewaySettings
from cast_serve.gateway.upstream import client as client_module
from cast_serve.gateway.upstream.client import Client, fail_if_lost
from cast_serve.gateway.upstream.variants import remote_variants
from tests.cast_serve.gateway.stack import Servers, events, running, wait_until

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
USAGE = {"prompt_tokens": 1, "completion_tokens": 2}
ASKED = {"model": "dense", "prompt": "x", "stream": True}


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(text: str, **more: object) -> bytes:
    chunk = {"choices": [{"index": 0, "text": text}], **more}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


LAST = event("b", usage=None) + b"data: " + json.dumps({"choices": [], "usage": USAGE}).encode()
WHOLE = event("a") + LAST + b"\n\ndata: [DONE]\n\n"


@contextmanager
def raw_worker(pieces: list[bytes]) -> Iterator[str]:
    """A gateway before a worker that answers any stream with these bytes; then it closes."""
    serving = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = serving.accept()
            except OSError:
                return
            with connection:
                asked = connection.recv(1 << 16)
                while b'"stream"' not in asked and b"GET" not in asked and b'"a"' not in asked:
                    asked += connection.recv(1 << 16)
                if b'"stream"' in asked:
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    for piece in pieces:
                        connection.sendall(piece)
                        time.sleep(0.01)
                else:
                    content = json.dumps({"data": [], "usage": USAGE}).encode()
                    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\n"
                    connection.sendall(head.encode() + b"Connection: close\r\n\r\n" + content)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    variants = remote_variants({"dense": [f"http://127.0.0.1:{serving.getsockname()[1]}"]})
    settings = GatewaySettings(health_interval_s=30, request_timeout_s=10)
    try:
        with Servers() as servers:
            url = servers.start(create_app(variants, settings))
            wait_until(lambda: variants[0].is_up)
            yield url
    finally:
        serving.shutdown(socket.SHUT_RDWR)
        serving.close()
        thread.join(10)


def test_events_are_the_same_in_whatever_pieces_they_come() -> None:
    at_once = [HEAD + chunked(WHOLE) + b"0\r\n\r\n"]
    content = chunked(WHOLE) + b"0\r\n\r\n"
    by_7 = [HEAD, *(content[start : start + 7] for start in range(0, len(content), 7))]
    for pieces in (at_once, by_7):
        with raw_worker(pieces) as url:
            *found, done = events(httpx.post(f"{url}/v1/completions", json=ASKED, timeout=20))
        assert [json.loads(each)["choices"][0]["text"] for each in found] == ["a", "b"]
        assert not [each for each in found if "usage" in each]
        assert done == "[DONE]"


NO_LENGTH = b"zz\r\nnot a length\r\n"


@pytest.mark.parametrize(
    "broken",
    [
        NO_LENGTH,
        chunked(b"data: {\n\n"),
        b"",  # closed without an end
        chunked(
            b"data: " + json.dumps({"error": {"message": "x", "code": 500}}).encode() + b"\n\n"
        ),
    ],
)
@pytest.mark.parametrize("is_at_once", [False, True])
def test_what_came_before_a_break_is_passed_on(broken: bytes, is_at_once: bool) -> None:
    pieces = [HEAD, chunked(event("a")), broken]
    with raw_worker([b"".join(pieces)] if is_at_once else pieces) as url:
        found = events(httpx.post(f"{url}/v1/completions", json=ASKED, timeout=20))
    *before, failure = (json.loads(each) for each in found)
    assert failure["error"]["code"] == "variant_unavailable"
    texts = [each["choices"][0]["text"] for each in before]
    # aiohttp may drop what came in one piece with a length that is none.
    assert texts == ["a"] or (texts == [] and is_at_once and broken == NO_LENGTH)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_connection_serves_one_answer_after_the_other(is_stream: bool) -> None:
    with running(health_interval_s=30) as stack:
        worker = stack.gateway.variants["dense"].replicas[0].url
        for _ in range(5):
            found = stack.complete(model="dense", stream=is_stream)
            assert found.status_code == 200
        # One for the answers, and the probes' own.
        assert len(stack.servers.connections(worker)) <= 3


def test_a_large_body_arrives_whole() -> None:
    with running(max_body_bytes=1 << 22) as stack:
        prompt = "é" * 600_000  # above a megabyte, of which aiohttp warns if it comes as bytes
        found = stack.client.post("/tokenize", json={"model": "dense", "prompt": prompt})
        assert found.status_code == 200
        assert found.json()["tokens"] == [ord("é") % 100] * 600_000


def test_connections_are_kept_for_less_than_a_server_keeps_them() -> None:
    assert client_module.KEEP_ALIVE_S < 5  # vLLM's own limit


def test_an_idle_connection_that_is_reset_is_no_error_of_ours() -> None:
    """Nobody waits for it, so nothing is to be logged."""
    told: list[dict[str, Any]] = []
    num_connections = 0
    cut = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        for _ in range(3):
            await reader.readuntil(b"{}")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
            await asyncio.sleep(0.01)
            writer.write(b"ok")
        await cut.wait()
        no_time = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_time)
        writer.transport.abort()

    async def answer(client: Client, url: str) -> "asyncio.Future[None] | None":
        upstream = await client.post(url, b"{}", {}, asyncio.get_running_loop().time() + 20)
        assert upstream.connection is not None
        assert upstream.connection.protocol is not None
        closed = upstream.connection.protocol.closed
        end = fail_if_lost(upstream)
        assert await upstream.read() == b"ok"
        end()
        return closed

    async def ask() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        client = Client()
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        for _ in range(3):
            closed = await answer(client, url)
        cut.set()
        assert closed is not None
        await asyncio.wait({closed}, timeout=20)
        assert "ClientConnectionError" in repr(closed)
        del closed
        await answer(client, url)  # on another, and the first is forgotten
        gc.collect()
        assert (num_connections, told) == (2, [])
        await client.close()
        server.close()

    asyncio.run(ask())


def test_a_connection_is_not_used_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is used for goes on; a new request gets a new one, and in the end it is closed."""
    monkeypatch.setattr(client_module, "RENEW_S", 0.05)
    monkeypatch.setattr(client_module, "CLOSE_AFTER_S", 0.0)
    num_connections, closed, go_on = 0, [], asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        number = num_connections
        with suppress(asyncio.IncompleteReadError, ConnectionResetError):
            while True:
                await reader.readuntil(b"{}")
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no")
                await writer.drain()
                if number == 1:
                    await go_on.wait()
                writer.write(b"k")
        writer.close()
        await writer.wait_closed()
        closed.append(number)

    async def ask() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        client = Client()
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"

        async def post(wait_s: float) -> Any:
            return await client.post(url, b"{}", {}, asyncio.get_running_loop().time() + wait_s)

        slow = await post(20)
        for _ in range(2):  # at once after the other: one connection
            assert await (await post(0.5)).read() == b"ok"
        assert num_connections == 2
        await asyncio.sleep(0.1)
        assert await (await post(20)).read() == b"ok"
        assert num_connections == 3
        go_on.set()
        assert await slow.read() == b"ok"
        await client.close()
        while len(closed) < num_connections:
            await asyncio.sleep(0.01)
        server.close()

    asyncio.run(asyncio.wait_for(ask(), 20))
    assert num_connections == 3


PACKED = gzip.compress(json.dumps({"choices": [], "usage": USAGE, "pad": "x" * 10_000}).encode())


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_answer_that_is_packed_is_not_unpacked(is_stream: bool) -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(PACKED)}\r\n\r\n"
    with raw_worker([head.encode() + PACKED]) as url:
        asked = {**ASKED, "stream": is_stream}
        found = httpx.post(f"{url}/v1/completions", json=asked, timeout=20)
    assert (found.status_code, found.json()["error"]["code"]) == (503, "variant_unavailable")


def test_an_answer_has_a_size_at_most() -> None:
    with running(max_answer_bytes=5000, num_replicas=2, max_body_bytes=1 << 16) as stack:
        fine = stack.client.post("/tokenize", json={"model": "dense", "prompt": "a" * 1000})
        assert len(fine.json()["tokens"]) == 1000
        found = stack.client.post("/tokenize", json={"model": "dense", "prompt": "a" * 3000})
        assert (found.status_code, found.json()["error"]["code"]) == (502, "answer_too_large")
        assert "CAST_MAX_ANSWER_BYTES" in found.json()["error"]["message"]
        assert all(replica.is_up for replica in stack.gateway.variants["dense"].replicas)
