"""Prompts that name a load -> ready-made chunks: what a gateway carries, without a model.

Answers to the prompt 64x20ms begin once 64 such requests are there, with a token each. Four steps
later all get another one every 20 ms, in one step, as an engine that batches does it. A chunk has
vLLM's fields; its text is when its step began (CLOCK_MONOTONIC, which is the same in every process
of a machine).

    python -m benchmarks.gateway.fake_worker PORT
"""

import asyncio
import json
import re
import sys
import time
from dataclasses import dataclass
from typing import Any, cast

import httptools

MODEL = "chunks"
STAMP = b'"text":" '
STAMP_DIGITS = 17
PAUSE_STEPS = 3  # after the first token, for all answers to begin
_NAME = re.compile(r"(\d+)x(\d+)ms")
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@dataclass(frozen=True)
class Load:
    """So many streams, and the time from a token of each to its next."""

    streams: int
    step_ms: int

    @property
    def name(self) -> str:
        return f"{self.streams}x{self.step_ms}ms"

    @classmethod
    def parse(cls, name: str) -> "Load":
        """Of a prompt.

        Raises:
            ValueError: if it is none.
        """
        match = _NAME.fullmatch(name)
        if match is None or int(match[1]) < 1:
            raise ValueError(f"{name!r} is not a load; write, for example, 64x20ms")
        return cls(int(match[1]), int(match[2]))


class Worker:
    """Answers requests, and starts the streams of a load once all of them are there."""

    def __init__(self) -> None:
        self._waiting: dict[Load, list[Connection]] = {}
        self._running: set[asyncio.Task[None]] = set()

    def answer(self, connection: "Connection", path: bytes, body: bytes) -> None:
        if path == b"/v1/models":
            card = {"id": MODEL, "object": "model", "max_model_len": 1 << 20}
            return connection.answer(json.dumps({"object": "list", "data": [card]}).encode())
        if path != b"/v1/completions":
            return connection.answer(b"")  # /health and /metrics
        asked = json.loads(body)
        if not asked.get("stream"):  # the gateway's canary
            usage = {"prompt_tokens": 1, "completion_tokens": 1}
            choice = {"index": 0, "text": "a", "finish_reason": "length"}
            return connection.answer(json.dumps({"choices": [choice], "usage": usage}).encode())
        connection.transport.write(_HEAD)
        connection.has_usage = bool(asked.get("stream_options", {}).get("include_usage"))
        load = Load.parse(asked["prompt"])
        waiting = self._waiting.setdefault(load, [])
        waiting.append(connection)
        if len(waiting) == load.streams:
            del self._waiting[load]
            task = asyncio.create_task(self._stream(load, waiting, asked["max_tokens"]))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _stream(self, load: Load, connections: "list[Connection]", num_tokens: int) -> None:
        now = asyncio.get_running_loop().time
        step_s = load.step_ms / 1e3
        begun_s = now()
        for token in range(num_tokens):
            step = token + PAUSE_STEPS if token else 0
            await asyncio.sleep(begun_s + step * step_s - now())
            reason = "length" if token == num_tokens - 1 else None
            chunk = _chunk(f" {time.monotonic():0{STAMP_DIGITS}.6f}", reason)
            for connection in connections:
                connection.transport.write(chunk)
        usage = {"prompt_tokens": 1, "completion_tokens": num_tokens}
        with_usage = _chunked(_event({"id": "cmpl-0", "choices": [], "usage": usage}))
        end = _chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n"
        for connection in connections:
            connection.transport.write((with_usage if connection.has_usage else b"") + end)


class Connection(asyncio.Protocol):
    """One client; httptools' parser calls the methods on_..."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.has_usage = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._path = self._body = b""

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self._worker.answer(self, self._path, self._body)

    def answer(self, content: bytes) -> None:
        head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(content)}\r\n"
        self.transport.write(f"{head}content-type: application/json\r\n\r\n".encode() + content)


def _chunk(text: str, reason: str | None) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
    choice |= {"stop_reason": None, "prompt_token_ids": None, "token_ids": None}
    name = {"id": "cmpl-0a1b2c3d4e5f60718293a4b5c6d7e8f9", "object": "text_completion"}
    return _chunked(_event({**name, "created": 1764230000, "model": MODEL, "choices": [choice]}))


def _event(found: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(found, separators=(",", ":")).encode() + b"\n\n"


def _chunked(piece: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(piece), piece)


async def serve(port: int) -> None:
    """Serves until it is cancelled."""
    worker = Worker()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(worker), "127.0.0.1", port, backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))  # uvloop's timers round to milliseconds
