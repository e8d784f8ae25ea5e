"""A fake gateway that is served, and a browser to look at it."""

import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from tests.browser import browser, watched
from tests.cast_serve.gateway.dashboard.fake_gateway import FakeGateway

__all__ = ["browser", "watched"]


@pytest.fixture
def gateway() -> FakeGateway:
    return FakeGateway()


@pytest.fixture
def server(gateway: FakeGateway) -> Iterator[uvicorn.Server]:
    config = uvicorn.Config(gateway.app(), port=0, log_level="warning", ws="none")
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield server
    server.should_exit = True
    thread.join()


@pytest.fixture
def url(server: uvicorn.Server) -> str:
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
