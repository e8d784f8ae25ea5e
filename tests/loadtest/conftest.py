"""An application, or mock variants -> the URL of a server that runs in a thread."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI

from loadtest.mock_server import MockVariant, create_app
from loadtest.send.workload import Conversation, Turn

Serve = Callable[..., tuple[str, FastAPI]]
ServeApp = Callable[[FastAPI], str]


def conversations(texts: Iterable[str], output_tokens: int) -> tuple[Conversation, ...]:
    """One of a turn for each text, numbered in order."""
    return tuple(
        Conversation(number, (Turn(text, output_tokens),)) for number, text in enumerate(texts)
    )


@pytest.fixture
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Guard rails that pass a void run: a busy machine stalls for the 10 ms that make one."""
    path = tmp_path_factory.mktemp("guard") / "guard.toml"
    path.write_text("allow_void = true")
    return path


@pytest.fixture
def serve_app() -> Iterator[ServeApp]:
    """`url = serve_app(app)`, for as long as the test runs."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(app: FastAPI) -> str:
        # asyncio's timers are never early; uvloop's are, by half a millisecond.
        config = uvicorn.Config(app, port=0, log_level="warning", ws="none", loop="asyncio")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread))
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield start
    for server, thread in reversed(running):
        server.should_exit = True
        thread.join()


@pytest.fixture
def serve(serve_app: ServeApp) -> Serve:
    """`url, app = serve(dense=MockVariant(...), ...)`; `stall_s` is as create_app has it."""

    def start(
        stall_s: tuple[float, float] | None = None, **variants: MockVariant
    ) -> tuple[str, FastAPI]:
        app = create_app(variants, stall_s)
        return serve_app(app), app

    return start
