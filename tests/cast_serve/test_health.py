"""The images' health check says by its exit code whether a URL answers."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 503)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def ask(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cast_serve.health", *words], capture_output=True, text=True
    )


def test_what_answers_is_healthy_even_with_a_proxy_set(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    done = ask(f"{url}/health")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_answers_503_is_not(url: str) -> None:
    done = ask(f"{url}/readyz")
    assert (done.returncode, done.stdout) == (1, "")
    assert "503" in done.stderr


@pytest.mark.parametrize(
    ("url", "said"), [("http://127.0.0.1:9/", "refused"), ("http://127.0.0.1:x/", "port")]
)
def test_what_cannot_be_asked_is_not(url: str, said: str) -> None:
    done = ask(url)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [(), ("127.0.0.1:8000",), ("http://a/", "http://b/")])
def test_wrong_use_is_said(words: tuple[str, ...]) -> None:
    done = ask(*words)
    assert done.returncode == 2
    assert "usage" in done.stderr
