"""A worker's bytes as they may come: in pieces, at once, broken, on a connection used before."""

import asyncio
import gzip
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from typing import Any

import httpx
import pytest

from cast_serve.gateway.upstream import client as client_module
from cast_serve.gateway.upstream.client import Client
from tests.cast_serve.gateway.raw_worker import RawWorker, raw_workers
from tests.cast_serve.gateway.stack import events, running

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
def raw_worker(pieces: list[bytes]) -> Iterator[httpx.Client]:
    """A gateway before workers that answer with these bytes and close the connection."""

    def answer(_: RawWorker, handler: BaseHTTPRequestHandler, __: dict[str, Any]) -> None:
        handler.close_connection = True
        for piece in pieces:
            handler.wfile.write(piece)
            time.sleep(0.01)

    with raw_workers(answer, fallback="", request_timeout_s=10) as stack:
        yield stack.client


def test_events_are_the_same_in_whatever_pieces_they_come() -> None:
    at_once = [HEAD + chunked(WHOLE) + b"0\r\n\r\n"]
    content = chunked(WHOLE) + b"0\r\n\r\n"
    by_7 = [HEAD, *(content[start : start + 7] for start in range(0, len(content), 7))]
    for pieces in (at_once, by_7):
        with raw_worker(pieces) as client:
            *found, done = events(client.post("/v1/completions", json=ASKED))
        assert [json.loads(each)["choices"][0]["text"] for each in found] == ["a", "b"]
        assert not [each for each in found if "usage" in each]
        assert done == "[DONE]"


@pytest.mark.parametrize(
    "broken",
    [
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
    with raw_worker([b"".join(pieces)] if is_at_once else pieces) as client:
        found = events(client.post("/v1/completions", json=ASKED))
    *before, failure = (json.loads(each) for each in found)
    assert failure["error"]["code"] == "variant_unavailable"
    texts = [each["choices"][0]["text"] for each in before]
    assert texts == ["a"]


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
    with raw_worker([head.encode() + PACKED]) as client:
        asked = {**ASKED, "stream": is_stream}
        found = client.post("/v1/completions", json=asked)
    assert (found.status_code, found.json()["error"]["code"]) == (503, "variant_unavailable")


def test_an_answer_has_a_size_at_most() -> None:
    with running(max_answer_bytes=5000, num_replicas=2, max_body_bytes=1 << 16) as stack:
        fine = stack.client.post("/tokenize", json={"model": "dense", "prompt": "a" * 1000})
        assert len(fine.json()["tokens"]) == 1000
        found = stack.client.post("/tokenize", json={"model": "dense", "prompt": "a" * 3000})
        assert (found.status_code, found.json()["error"]["code"]) == (502, "answer_too_large")
        assert "CAST_MAX_ANSWER_BYTES" in found.json()["error"]["message"]
        assert all(replica.is_up for replica in stack.gateway.variants["dense"].replicas)
