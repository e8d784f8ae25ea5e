"""Fake workers and a gateway in front of them, over real sockets."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

import httpx
import uvicorn
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from cast_serve.gateway.app import Gateway, create_app
from cast_serve.gateway.settings import GatewaySettings
from cast_serve.gateway.upstream.variants import remote_variants
from tests.cast_serve.gateway import fake_worker


@dataclass
class Stack:
    """`workers` holds the first replica of each variant, `others` the second where there is one."""

    client: httpx.Client
    workers: dict[str, FastAPI]
    gateway: Gateway
    servers: "Servers"
    others: dict[str, FastAPI] = field(default_factory=dict)

    def complete(self, **body: object) -> httpx.Response:
        return self.client.post("/v1/completions", json={"prompt": "a b", **body})

    def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        text = self.client.get("/metrics").text
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


class Servers:
    """Applications, each on a free port in a thread of its own; at the end of `with` they stop.

    The threads are daemons, so that one that does not stop cannot keep pytest from ending.
    """

    def __init__(self) -> None:
        self.running: dict[str, tuple[uvicorn.Server, threading.Thread]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for url in reversed(self.running.copy()):  # a gateway before its workers
            self.stop(url, is_lost=False)

    def start(self, app: FastAPI) -> str:
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                port=0,
                log_level="critical",
                ws="none",
                http="httptools",
                timeout_graceful_shutdown=1,
            )
        )
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        wait_until(lambda: server.started or not thread.is_alive(), 60)
        assert server.started
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        self.running[url] = (server, thread)
        return url

    def connections(self, url: str) -> set[object]:
        """Those that are open at one."""
        server, _ = self.running[url.rstrip("/")]
        return set(server.server_state.connections)

    def stop(self, url: str, is_lost: bool = True) -> None:
        """Ends one: lost at once, with whatever it is answering, or in good order."""
        server, thread = self.running.pop(url)
        server.force_exit = is_lost
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), f"{url} does not stop"


@contextmanager
def running(num_replicas: int = 1, **settings: object) -> Iterator[Stack]:
    """A gateway before fake workers dense and sparse, ready."""
    rows = [
        {name: fake_worker.create_app(name) for name in ("dense", "sparse")}
        for _ in range(num_replicas)
    ]
    defaults = {"max_body_bytes": 10_000, "health_interval_s": 0.05, "shutdown_grace_s": 1}
    with Servers() as servers:
        urls = {name: [servers.start(row[name]) for row in rows] for name in ("dense", "sparse")}
        app = create_app(remote_variants(urls), GatewaySettings(**(defaults | settings)))
        with httpx.Client(base_url=servers.start(app), timeout=20) as client:
            gateway = app.state.gateway
            wait_until(lambda: all(r.is_up for v in gateway.variants.values() for r in v.replicas))
            yield Stack(client, rows[0], gateway, servers, rows[-1] if num_replicas > 1 else {})


def wait_until(is_true: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.02)


def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.text.splitlines() if line]


def url_of(stack: Stack, variant: str, replica: int = 0) -> str:
    return stack.gateway.variants[variant].replicas[replica].url


def num_requests(stack: Stack, variant: str, code: int, route: str = "/v1/completions") -> float:
    labels = (("code", str(code)), ("route", route), ("variant", variant))
    return stack.metrics().get(("cast_requests_total", labels), 0)
