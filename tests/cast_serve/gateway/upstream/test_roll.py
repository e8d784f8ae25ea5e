"""Rolls: another directory under a variant that serves, and no request lost.

CAST_ROLLS=20 has the test under load roll so many times; without, 3.
"""

import json
import os
import socket
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from cast_serve.gateway.app import Gateway, create_app
from cast_serve.gateway.settings import GatewaySettings
from cast_serve.gateway.upstream import control
from cast_serve.gateway.upstream.config import WorkerConfig
from cast_serve.gateway.upstream.control import Control, request_roll
from cast_serve.gateway.upstream.replica import Replica
from cast_serve.gateway.upstream.variants import local_variants, remote_variants
from tests.cast_serve.gateway import fake_worker
from tests.cast_serve.gateway.stack import Servers, wait_until
from tests.cast_serve.gateway.upstream.scripted_worker import is_running

NUM_ROLLS = int(os.environ.get("CAST_ROLLS", "3"))
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
        (replica,) = self.gateway.proxy.variants[name].replicas
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
        return float(self.gateway.proxy.metrics.rolls.labels("sparse", outcome)._value.get())


def new_model(folder: Path, name: str) -> Path:
    model = folder / name
    model.mkdir()
    (model / "config.json").write_text("{}")
    return model


def processes(*models: Path) -> list[int]:
    """The workers of these directories that run."""
    pids = [int(file.name[4:]) for model in models for file in model.glob("pid-*")]
    return [pid for pid in pids if is_running(pid)]


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rolled]:
    with served(tmp_path, monkeypatch) as found:
        yield found


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
    servers = Servers()
    url = servers.start(app)
    gateway = app.state.gateway
    try:
        wait_until(lambda: gateway.is_ready, 30)
        yield Rolled(url, gateway, folder, gateway.control.path)
    finally:
        for running in list(servers.running):
            servers.stop(running, is_lost=False)
        assert not processes(*folder.iterdir())


def test_rolls_under_load_lose_no_request(stack: Rolled) -> None:
    is_over = threading.Event()
    ends: Counter[tuple[str, str]] = Counter()
    wrong: list[Any] = []

    def keep_asking(name: str) -> None:
        while not is_over.is_set():
            try:
                *words, last = stack.stream(name)
                if last != "[DONE]" or len(words) != NUM_WORDS or len(set(words)) != 1:
                    wrong.append((name, words, last))
                whole = stack.complete(name)
            except Exception as error:
                wrong.append((name, repr(error)))
                continue
            ends.update([(name, words[0]), (name, whole)])

    def keep_looking() -> None:
        while not is_over.is_set():
            for path in ("/metrics", "/v1/models", "/readyz", "/v1/comparison"):
                status = httpx.get(stack.url + path, timeout=30).status_code
                if status != 200:
                    wrong.append((path, status))

    models = [stack.model(f"new-{number}") for number in range(NUM_ROLLS)]
    with ThreadPoolExecutor(9) as pool:
        asking = [pool.submit(keep_asking, name) for name in ("dense", "sparse") * 4]
        asking.append(pool.submit(keep_looking))
        try:
            for before, model in zip([stack.folder / "sparse", *models], models, strict=False):
                done = stack.roll("sparse", model)
                assert stack.complete() == model.name
                assert not processes(before)
                assert (done["model"], done["before"]) == (str(model), str(before))
        finally:
            is_over.set()
        for each in asking:
            each.result()
    assert wrong == []
    assert {name for variant, name in ends if variant == "dense"} == {"dense"}
    answered_by = {name for variant, name in ends if variant == "sparse"}
    assert {"sparse", models[0].name} < answered_by <= {"sparse", *(m.name for m in models)}
    assert sum(ends.values()) > 8 * NUM_ROLLS
    assert (stack.counter("done"), stack.counter("failed")) == (NUM_ROLLS, 0)
    text = httpx.get(f"{stack.url}/metrics").text
    assert f'cast_variant_rolls_total{{outcome="done",variant="sparse"}} {NUM_ROLLS}.0' in text
    assert '_total{outcome="failed",variant="dense"} 0.0' in text
    shown = httpx.get(f"{stack.url}/v1/comparison").json()
    assert shown["models"]["sparse"]["path"] == str(models[-1])


@pytest.mark.anyio
async def test_a_scrape_during_a_switch_is_answered(stack: Rolled) -> None:
    proxy = stack.gateway.proxy
    variant, other = proxy.variants["sparse"], Replica("sparse", "http://127.0.0.1:1")

    async def switch_meanwhile(replica: Replica) -> str:
        variant.replicas[0] = other
        return "x 1\n"

    old = stack.replica()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(proxy, "_metrics_of", switch_meanwhile)
            text = await proxy.exposition()
    finally:
        variant.replicas[0] = old
    assert 'x{replica="0",variant="sparse"} 1.0' in text.decode()


def test_the_old_worker_ends_after_its_requests_and_new_ones_do_not_wait(stack: Rolled) -> None:
    old, new = stack.folder / "sparse", stack.model("new")
    stack.complete()
    (old / "hold").touch()
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(stack.stream)
        wait_until(lambda: stack.replica().num_outstanding == 1)
        roll = pool.submit(stack.roll, "sparse", new)
        wait_until(lambda: stack.replica().model == new, 30)
        assert [stack.complete() for _ in range(3)] == ["new"] * 3
        assert not roll.done()
        assert processes(old)
        with pytest.raises(ValueError, match="variant 'sparse' is being rolled; wait for its end"):
            stack.roll("dense")
        (old / "hold").unlink()
        assert long.result() == ["sparse"] * NUM_WORDS + ["[DONE]"]
        assert roll.result()["drained_requests"] == 1
    assert not processes(old)
    loading, serves = stack.said
    assert f"sparse: loading {new}, log " in loading
    assert serves == "it serves sparse now; the old worker finishes its 1 requests"
    shown = httpx.get(f"{stack.url}/v1/comparison").json()["variants"]
    assert shown["sparse"]["e2e_s"]["n"] == 4  # the first request's is forgotten


def test_the_same_directory_again(stack: Rolled) -> None:
    (before,) = processes(stack.folder / "sparse")
    done = stack.roll()
    assert done["model"] == done["before"] == str(stack.folder / "sparse")
    (after,) = processes(stack.folder / "sparse")
    assert before != after
    assert stack.complete() == "sparse"


# httpx leaves a connection to a killed process to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_does_not_start_leaves_the_old_one_serving(stack: Rolled) -> None:
    new = stack.model("new")
    (new / "fail").touch()
    with pytest.raises(
        RuntimeError, match=r"ended with 1; its log says:\nno such model\n"
    ) as error:
        stack.roll("sparse", new)
    assert str(error.value).endswith(f"{stack.folder / 'sparse'} is served as before")
    assert stack.complete() == "sparse"
    assert (stack.counter("done"), stack.counter("failed")) == (0, 1)
    assert stack.gateway.failure is None
    (new / "fail").unlink()
    assert stack.roll("sparse", new)["model"] == str(new)
    assert stack.complete() == "new"
    replica = stack.replica()
    os.kill(processes(new)[0], 9)  # the new one is watched as the old one was
    wait_until(lambda: replica.num_restarts == 1 and replica.is_up, 30)
    assert stack.complete() == "new"


def test_a_worker_that_does_not_come_up_in_time_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path, monkeypatch, startup_timeout_s=10) as stack:
        new = stack.model("new")
        (new / "unhealthy").touch()
        monkeypatch.setattr(
            stack.gateway.supervisor,
            "_settings",
            type(stack.gateway.supervisor._settings)(0.05, 0.5, 8),
        )
        with pytest.raises(RuntimeError, match="did not answer within"):
            stack.roll("sparse", new)
        assert not processes(new)
        assert stack.complete() == "sparse"


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("other", None, "there is no variant 'other'; served are ['dense', 'sparse']"),
        ("sparse", "/nowhere", "variant sparse: /nowhere is no directory"),
        ("sparse", "EMPTY", "holds no model (no config.json)"),
    ],
)
def test_what_cannot_be_rolled(stack: Rolled, name: str, model: str | None, message: str) -> None:
    if model == "EMPTY":
        (stack.folder / "empty").mkdir()
        model = str(stack.folder / "empty")
    with pytest.raises(ValueError, match=r".") as error:
        stack.roll(name, model)
    assert message in str(error.value)
    assert stack.complete() == "sparse"


def ask(stack: Rolled, content: bytes) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(stack.socket))
    connection.sendall(content)
    return connection


@pytest.mark.parametrize(
    "content", [b"\n", b"{}\n", b"[1]\n", b'{"variant": 1\n', b"\xff\n", b"5\n"]
)
def test_what_is_no_request_is_answered(stack: Rolled, content: bytes) -> None:
    with ask(stack, content) as connection, connection.makefile() as lines:
        (line,) = lines
    assert "this is no request for a roll" in json.loads(line)["error"]


def test_a_client_that_leaves_takes_its_roll_along(stack: Rolled) -> None:
    new = stack.model("new")
    (new / "unhealthy").touch()
    with ask(stack, json.dumps({"variant": "sparse", "model": str(new)}).encode() + b"\n"):
        wait_until(lambda: bool(processes(new)))
    wait_until(lambda: not processes(new))
    wait_until(lambda: stack.counter("failed") == 1)
    assert stack.complete() == "sparse"
    (new / "unhealthy").unlink()
    assert stack.roll("sparse", new)["model"] == str(new)


def test_a_client_that_leaves_while_the_old_worker_drains_changes_nothing(stack: Rolled) -> None:
    old, new = stack.folder / "sparse", stack.model("new")
    (old / "hold").touch()
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(stack.stream)
        wait_until(lambda: stack.replica().num_outstanding == 1)
        with ask(stack, json.dumps({"variant": "sparse", "model": str(new)}).encode() + b"\n"):
            wait_until(lambda: stack.replica().model == new, 30)
        time.sleep(0.2)
        assert processes(old)
        (old / "hold").unlink()
        assert long.result() == ["sparse"] * NUM_WORDS + ["[DONE]"]
    wait_until(lambda: not processes(old))


def test_a_gateway_that_stops_ends_both_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor(1) as pool:
        with served(tmp_path, monkeypatch) as stack:
            new = stack.model("new")
            (new / "unhealthy").touch()
            roll = pool.submit(stack.roll, "sparse", new)
            wait_until(lambda: bool(processes(new)))
        # `served` has found no process left
        with pytest.raises(RuntimeError, match="the gateway is stopping"):
            roll.result()
        assert not stack.socket.exists()


def test_only_the_gateways_user_may_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with served(tmp_path, monkeypatch, control_socket=None, port=12345) as stack:
        assert stack.socket == control.default_path(12345)
        assert stat.S_IMODE(stack.socket.stat().st_mode) == 0o600
        assert stat.S_IMODE(stack.socket.parent.stat().st_mode) == 0o700
        assert stack.roll()["variant"] == "sparse"


def test_a_folder_that_others_may_open_gets_no_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = control.default_path(1).parent
    folder.mkdir(mode=0o755)
    with served(tmp_path, monkeypatch, control_socket=None) as stack:
        assert stack.complete() == "sparse"
        assert not stack.socket.exists()
        with pytest.raises(ValueError, match="no `cast-serve up` of this user's answers at"):
            stack.roll()
    assert (
        f"{folder} is not this user's alone; remove it, or set CAST_CONTROL_SOCKET" in caplog.text
    )


@pytest.mark.anyio
async def test_a_socket_that_another_gateway_has_is_left_to_it(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first, second = (Control(path, 1, None) for _ in range(2))  # type: ignore[arg-type]
    await first.open()
    with pytest.raises(OSError, match="another gateway listens at"):
        await second.open()
    assert path.is_socket()
    first._server.close()  # as one that was killed: the file stays
    await second.open()
    second._server.close()


def test_servers_that_run_elsewhere_are_not_ours_to_roll(tmp_path: Path) -> None:
    servers = Servers()
    urls = {"dense": [servers.start(fake_worker.create_app("dense"))]}
    app = create_app(remote_variants(urls), GatewaySettings(control_socket=tmp_path / "s"))
    url = servers.start(app)
    assert not (tmp_path / "s").exists()
    for running in (url, *urls["dense"]):
        servers.stop(running, is_lost=False)
