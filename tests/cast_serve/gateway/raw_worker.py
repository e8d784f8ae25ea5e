"""A worker whose answer is whatever bytes a test writes, on a connection that it may cut."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

from cast_serve.gateway.app import Gateway, create_app
from cast_serve.gateway.settings import GatewaySettings
from cast_serve.gateway.upstream.variants import remote_variants
from tests.cast_serve.gateway.stack import Servers, wait_until

USAGE = {"prompt_tokens": 1, "completion_tokens": 1}
WHOLE = {"choices": [{"index": 0, "text": "one", "finish_reason": "length"}], "usage": USAGE}

Answer = Callable[["RawWorker", BaseHTTPRequestHandler, dict[str, Any]], None]
"""Writes to the handler's `wfile`; what it has not ended by `close_connection` is kept open."""


@dataclass
class RawWorker:
    """One that is well, by its /health and canaries, as long as it lives.

    Attributes:
        answer: to a completion that is not a canary.
        prompts: of each completion that it read.
    """

    answer: Answer
    prompts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.connections: set[socket.socket] = set()
        worker = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                worker.connections.add(self.connection)

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                send_json(self, {"data": []})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if body["prompt"] == "a":
                    return send_json(self, WHOLE)
                worker.prompts.append(body["prompt"])
                worker.answer(worker, self, body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @property
    def is_dead(self) -> bool:
        return self._server.socket.fileno() == -1

    def die(self) -> None:
        """Ends as a process does that is killed: all its sockets are closed."""
        cut(self._server.socket)  # a poll that waits for it would keep it open for a moment
        self._server.socket.close()
        for connection in self.connections:
            cut(connection)

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self.die()
        self._server.server_close()


def send_json(handler: BaseHTTPRequestHandler, answer: object, status: int = 200) -> None:
    content = json.dumps(answer).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def well(_: RawWorker, handler: BaseHTTPRequestHandler, __: dict[str, Any]) -> None:
    send_json(handler, WHOLE)


def cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # it has been cut
        return


@dataclass
class RawStack:
    """A gateway before raw workers: `dense`, the fallback, has one, `sparse` some."""

    gateway: Gateway
    client: httpx.Client
    dense: RawWorker
    sparse: list[RawWorker]

    def ask(self, prompt: str, **more: object) -> httpx.Response:
        body = {"model": "sparse", "prompt": prompt, **more}
        return self.client.post("/v1/completions", json=body)

    def retries(self, reason: str) -> float:
        """Of both variants."""
        lines = self.client.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith("cast_retries_total{")]
        return sum(float(line.split()[-1]) for line in found if f'reason="{reason}"' in line)

    def are_up(self) -> list[bool]:
        variants = self.gateway.variants
        return [r.is_up for name in ("dense", "sparse") for r in variants[name].replicas]


@contextmanager
def raw_workers(answer: Answer, num_sparse: int = 1, **settings: object) -> Iterator[RawStack]:
    """A gateway before these; its checks come late, so that only requests change what it knows."""
    with ExitStack() as stack:
        workers = [RawWorker(answer) for _ in range(num_sparse + 1)]
        for worker in workers:
            stack.callback(worker.stop)
        dense, *sparse = workers
        urls = {"dense": [dense.url], "sparse": [worker.url for worker in sparse]}
        variants = remote_variants(urls)
        defaults = {"fallback": "sparse=dense", "health_interval_s": 30, "request_timeout_s": 20}
        servers = stack.enter_context(Servers())
        app = create_app(variants, GatewaySettings(**(defaults | settings)))
        url = servers.start(app)
        wait_until(lambda: all(r.is_up for v in variants for r in v.replicas))
        client = stack.enter_context(httpx.Client(base_url=url, timeout=30))
        yield RawStack(app.state.gateway, client, dense, sparse)
