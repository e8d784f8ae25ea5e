"""Mock variants -> the URL of a mock server that runs in a thread."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import uvicorn
from fastapi import FastAPI

from loadtest.mock import MockVariant, create_app

Serve = Callable[..., tuple[str, FastAPI]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """`url, app = serve(dense=MockVariant(...), sparse=MockVariant(...))`."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(**variants: MockVariant) -> tuple[str, FastAPI]:
        app = create_app(variants)
        config = uvicorn.Config(app, port=0, log_level="warning", ws="none", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}", app

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join()
