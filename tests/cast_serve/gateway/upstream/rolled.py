"""A gateway before local workers that say their directory's name, for tests of rolls."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from cast_serve.gateway.app import Gateway, create_app
from cast_serve.gateway.settings import GatewaySettings
from cast_serve.gateway.upstream.config import WorkerConfig
from cast_serve.gateway.upstream.control import request_roll
from cast_serve.gateway.upstream.replica import Replica
from cast_serve.gateway.upstream.variants import local_variants
from tests.cast_serve.gateway.stack import Servers, wait_until
from tests.cast_serve.gateway.upstream.scripted_worker import is_running

NUM_WORDS = 10
# Says its directory's name, in streams ten times. Files there steer it: `fail` ends it at once,
# `unhealthy` keeps it from coming up, `hold` holds streams back. SIGTERM ends it at once, as vLLM.
WORKER = """
import json, os, pathlib, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

port, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
key = f"Bearer {os.environ['CAST_WORKER_KEY']}"
(folder / f"pid-{os.getpid()}").touch()
if (folder / "fail").exists():
    sys.exit("no such model")

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, found, status=200):
        content = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def event(self, text):
        content = f"data: {text}\\n\\n".encode()
        self.wfile.write(b"%x\\r\\n%s\\r\\n" % (len(content), content))

    def do_GET(self):
        is_unhealthy = self.path == "/health" and (folder / "unhealthy").exists()
        self.answer({"data": []}, 503 if is_unhealthy else 200)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != key:
            return self.answer({"error": "Unauthorized"}, 401)
        choice = {"index": 0, "text": folder.name + " ", "finish_reason": None}
        usage = {"prompt_tokens": 1, "completion_tokens": NUM_WORDS}
        if not body.get("stream"):
            return self.answer({"choices": [choice], "usage": usage})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(NUM_WORDS):
            self.event(json.dumps({"choices": [choice]}))
            time.sleep(0.01)
            while (folder / "hold").exists():
                time.sleep(0.01)
        self.event(json.dumps({"choices": [], "usage": usage}))
        self.event("[DONE]")
        self.wfile.write(b"0\\r\\n\\r\\n")

class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

Server(("127.0.0.1", port), Handler).serve_forever()
"""


@dataclass
class Rolled:
    """A gateway before local workers dense and sparse, and what it told of its rolls."""

    url: str
    gateway: Gateway
    folder: Path
    socket: Path
    said: list[str] = field(default_factory=list)

    def model(self, name: str) -> Path:
        return new_model(self.folder, name)

    def roll(self, name: str = "sparse", model: Path | str | None = None) -> dict[str, Any]:
        given = None if model is None else str(model)
        return request_roll(self.socket, name, given, self.said.append)

    def replica(self, name: str = "sparse") -> Replica:
        (replica,) = self.gateway.variants[name].replicas
        return replica

    def complete(self, name: str = "sparse") -> str:
        body = {"model": name, "prompt": "a"}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"]).strip()

    def stream(self, name: str = "sparse") -> list[str]:
        """Every word of a stream, and how it ended."""
        body = {"model": name, "prompt": "a", "stream": True}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=30)
        *chunks, last = [line[6:] for line in answer.text.splitlines() if line]
        return [json.loads(chunk)["choices"][0]["text"].strip() for chunk in chunks] + [last]

    def counter(self, outcome: str) -> float:
        return float(self.gateway.metrics.rolls.labels("sparse", outcome)._value.get())


def new_model(folder: Path, name: str) -> Path:
    model = folder / name
    model.mkdir()
    (model / "config.json").write_text("{}")
    return model


def processes(*models: Path) -> list[int]:
    """The workers of these directories that run."""
    pids = [int(file.name[4:]) for model in models for file in model.glob("pid-*")]
    return [pid for pid in pids if is_running(pid)]


@contextmanager
def served(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: object) -> Iterator[Rolled]:
    script = folder / "streaming.py"
    script.write_text(WORKER.replace("NUM_WORDS", str(NUM_WORDS)))

    def command(replica: Replica) -> list[str]:
        port = replica.url.rpartition(":")[2]
        return [sys.executable, "-S", str(script), port, str(replica.model)]

    monkeypatch.setattr("cast_serve.gateway.upstream.replica.worker_command", command)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    workers = {name: WorkerConfig(dir=new_model(folder, name)) for name in ("dense", "sparse")}
    defaults = {"control_socket": folder / "s", "health_interval_s": 0.05, "shutdown_grace_s": 1}
    app = create_app(local_variants(workers), GatewaySettings(**(defaults | settings)))
    gateway = app.state.gateway
    with Servers() as servers:
        url = servers.start(app)
        wait_until(lambda: gateway.is_ready, 30)
        yield Rolled(url, gateway, folder, gateway.control.path)
    assert not processes(*folder.iterdir())
