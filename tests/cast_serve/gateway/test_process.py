"""The gateway as a process of its own, as its operator starts it and an attacker meets it."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from tests import hostile
from tests.cast_serve.gateway import fake_worker
from tests.cast_serve.gateway.stack import Servers, events, wait_until

MAX_GROWTH_BYTES = 150 << 20


@dataclass
class Process:
    """A running `cast-serve gateway` before two fake workers."""

    port: int
    popen: subprocess.Popen[str]
    workers: dict[str, FastAPI]

    def __post_init__(self) -> None:
        self.address = ("127.0.0.1", self.port)
        self.url = f"http://127.0.0.1:{self.port}"

    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.popen.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def cpu_s(self) -> float:
        """CPU time that it has taken, user and system."""
        fields = Path(f"/proc/{self.popen.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def gateway(
    log: int = subprocess.DEVNULL, words: tuple[str, ...] = ("one", " two"), **environment: str
) -> Iterator[Process]:
    """Started without --port and --host: they come from the environment."""
    command = [sys.executable, "-m", "cast_serve", "gateway"]
    with ExitStack() as stack:
        servers = stack.enter_context(Servers())
        apps = {name: fake_worker.create_app(name, words) for name in ("dense", "sparse")}
        for name, app in apps.items():
            command += ["--variant", f"{name}={servers.start(app)}"]
        # After the workers have their ports: else one of them could be given this one.
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        settings = {"CAST_PORT": str(port), "CAST_HEALTH_INTERVAL_S": "0.1", **environment}
        popen = stack.enter_context(
            subprocess.Popen(command, env={**os.environ, **settings}, stderr=log, text=True)
        )
        stack.callback(popen.kill)  # nothing, once it has ended
        process = Process(port, popen, apps)
        wait_until(lambda: popen.poll() is not None or is_ready(process.url), 60)
        assert popen.poll() is None
        yield process
        popen.send_signal(signal.SIGTERM)
        assert popen.wait(30) == 0


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.HTTPError:
        return False


class Pulse:
    """Asks for /livez again and again, each time on the same connection.

    Attributes:
        slowest_s: of the slowest answer, in seconds that the gateway itself was at work: another
            process may keep the machine busy.
    """

    def __init__(self, process: Process) -> None:
        self.slowest_s = 0.0
        self._process = process
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> "Pulse":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _ask(self) -> None:
        with httpx.Client(timeout=30) as client:
            while not self._is_over.is_set():
                begun_s, cpu_s = time.monotonic(), self._process.cpu_s()
                assert client.get(f"{self._process.url}/livez").status_code == 200
                took_s, worked_s = time.monotonic() - begun_s, self._process.cpu_s() - cpu_s
                self.slowest_s = max(self.slowest_s, min(took_s, worked_s))
                time.sleep(0.005)


def test_no_body_holds_up_others_or_takes_much_memory() -> None:
    """The best of three tries counts: a busy machine lets threads of the gateway wait too."""
    wrong = []
    with gateway() as process, httpx.Client(base_url=process.url, timeout=30) as client:
        assert client.post("/v1/completions", json={"model": "dense", "prompt": "a"}).is_success
        start_bytes = process.resident_bytes()
        for name, path, content in hostile.heavy("dense"):
            for _ in range(3):
                with Pulse(process) as pulse:
                    found = client.post(path, content=content)
                if pulse.slowest_s < 0.5:
                    break
            growth_bytes = process.resident_bytes() - start_bytes
            is_answered = found.status_code < 500
            if not (is_answered and pulse.slowest_s < 0.5 and growth_bytes < MAX_GROWTH_BYTES):
                wrong.append((name, found.status_code, pulse.slowest_s, growth_bytes))
    assert wrong == []


def test_a_gateway_with_too_many_connections_is_alive() -> None:
    with gateway(CAST_MAX_CONNECTIONS="2") as process, ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(socket.create_connection(process.address))
        wait_until(lambda: httpx.get(f"{process.url}/readyz").status_code == 503)
        assert httpx.get(f"{process.url}/livez").status_code == 200


def test_a_log_that_cannot_be_written_keeps_no_answer_back(tmp_path: Path) -> None:
    with open(tmp_path / "log", "wb") as log, gateway(log.fileno()) as process:
        asked = {"model": "dense", "prompt": "a"}
        _, hard = resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (0, hard))  # as on a full disk
        size = (tmp_path / "log").stat().st_size
        for _ in range(3):
            assert httpx.post(f"{process.url}/v1/completions", json=asked).status_code == 200
        assert (tmp_path / "log").stat().st_size == size
        resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (hard, hard))
        assert httpx.post(f"{process.url}/v1/completions", json=asked).status_code == 200
        wait_until(lambda: b'"status": 200' in (tmp_path / "log").read_bytes()[size:])


def test_heads_that_never_end_are_closed_and_keep_nobody_out() -> None:
    limits = {"CAST_BODY_TIMEOUT_S": "1", "CAST_MAX_CONNECTIONS": "40"}
    with gateway(**limits) as process:
        silent = [socket.create_connection(process.address) for _ in range(15)]
        begun = [socket.create_connection(process.address) for _ in range(15)]
        later = [socket.create_connection(process.address) for _ in range(15)]
        for connection in begun:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: ")
        for connection in later:  # whose first request was whole
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /livez HT")
        for connection in (*silent, *begun, *later):
            connection.settimeout(20)
            while connection.recv(1000):  # empty once the gateway has closed it
                pass
            connection.close()
        with socket.create_connection(process.address) as connection:  # a head may come in pieces
            for part in (b"GET /livez HTTP", b"/1.1\r\nHost: x\r", b"\n\r\n"):
                connection.sendall(part)
                time.sleep(0.02)
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")


def answer_to(process: Process, *pieces: bytes) -> bytes:
    """What the gateway says to bytes until it closes the connection."""
    found = b""
    with (
        socket.create_connection(process.address, timeout=20) as connection,
        suppress(ConnectionError),  # closed before it had read everything
    ):
        for piece in pieces:
            connection.sendall(piece)
        while piece := connection.recv(1 << 16):
            found += piece
    return found


def test_bytes_without_an_end_are_not_collected() -> None:
    with gateway(CAST_MAX_HEADER_BYTES="4096", CAST_BODY_TIMEOUT_S="60") as process:
        start_bytes = process.resident_bytes()
        head = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
        for pieces in ([head, b"X-A: ", *[b"a" * 65536] * 100], [b"GET /", *[b"a" * 65536] * 100]):
            assert not answer_to(process, *pieces)
        chunked = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        endless = answer_to(process, chunked, b"1\r\n{\r\n0\r\nX-A: ", *[b"a" * 65536] * 100)
        assert b"200" not in endless[:12]
        assert process.resident_bytes() - start_bytes < 5 << 20
        assert httpx.get(f"{process.url}/livez").status_code == 200


def test_what_another_server_could_read_otherwise_is_refused() -> None:
    line = b"POST /v1/completions HTTP/1.1\r\n"
    with gateway() as process:
        for fields in (
            b"Content-Length: 2",  # no Host
            b"Host: x\r\nHost: y\r\nContent-Length: 2",
            b"Host: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked",
            b"Host: x\r\nContent-Length: 2\r\nContent-Length: 3",
            b"Host: x\r\nContent-Length: +2",
            b"Host: x\r\nContent-Length : 2",
            b"Host: x\r\nTransfer-Encoding: chunked, identity",
            b"Host: x\r\n folded: 1\r\nContent-Length: 2\nX: y",
        ):
            found = answer_to(process, line + fields + b"\r\n\r\n{}")
            assert found.startswith(b"HTTP/1.1 400"), fields
            assert found.count(b"HTTP/1.1") == 1, fields


@pytest.mark.parametrize("is_stream", [False, True])
def test_what_still_runs_when_the_grace_is_over_is_told(is_stream: bool) -> None:
    with gateway(CAST_SHUTDOWN_GRACE_S="1") as process, ThreadPoolExecutor(1) as pool:
        process.workers["dense"].state.gate.clear()
        body = {"model": "dense", "prompt": "a", "stream": is_stream}
        asked = pool.submit(httpx.post, f"{process.url}/v1/completions", json=body, timeout=30)
        wait_until(lambda: bool(process.workers["dense"].state.bodies))
        time.sleep(0.2)  # the first word of a stream
        process.popen.send_signal(signal.SIGTERM)
        found = asked.result(timeout=30)
        process.workers["dense"].state.gate.set()
        assert process.popen.wait(30) == 0
    if is_stream:
        *_, last = events(found)
        assert json.loads(last)["error"]["code"] == "shutting_down"
    else:
        assert (found.status_code, found.headers["Retry-After"]) == (503, "1")
        assert found.json()["error"]["code"] == "shutting_down"
        assert "X-Request-Id" in found.headers


def test_no_stream_breaks_when_the_gateway_is_ended() -> None:
    """SIGTERM under 64 streams, all of which have been read by then."""
    words = tuple(f"{number} " for number in range(16))
    with gateway(words=words) as process, ThreadPoolExecutor(64) as pool:
        worker = process.workers["dense"].state
        worker.gate.clear()
        body = {"model": "dense", "prompt": "a", "stream": True}
        url = f"{process.url}/v1/completions"
        asked = [pool.submit(httpx.post, url, json=body, timeout=60) for _ in range(64)]
        wait_until(lambda: len(worker.bodies) == 64, 60)
        process.popen.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        worker.gate.set()
        for answer in asked:
            *chunks, last = events(answer.result())
            texts = [json.loads(chunk)["choices"][0]["text"] for chunk in chunks]
            assert (tuple(texts), last) == (words, "[DONE]")
        assert process.popen.wait(30) == 0


@contextmanager
def asking(process: Process, *fields: str, version: str = "1.1") -> Iterator[socket.socket]:
    """A connection on which a stream was asked for."""
    body = b'{"model": "dense", "prompt": "a b", "stream": true}'
    with socket.create_connection(process.address, timeout=30) as client:
        more = "".join(f"{field}\r\n" for field in fields).encode()
        client.sendall(
            b"POST /v1/completions HTTP/%b\r\nHost: x\r\nContent-Type: application/json\r\n%b"
            b"Content-Length: %d\r\n\r\n%b" % (version.encode(), more, len(body), body)
        )
        yield client


def test_a_stream_to_http_1_0_ends_with_its_connection() -> None:
    with gateway() as process:
        with asking(process, version="1.0") as client:
            content = b"".join(iter(lambda: client.recv(1 << 16), b""))
        head, _, body = content.partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head.lower()
        assert b"connection: close" in head.lower()
        *words, done = body.split(b"\n\n")[:-1]
        texts = [json.loads(word[len(b"data: ") :])["choices"][0]["text"] for word in words]
        assert (texts, done) == (["one", " two"], b"data: [DONE]")


LONG = ("x" * 100_000,) * 200  # a stream larger than all buffers between the two


def test_the_deadline_is_also_that_of_a_client_that_does_not_read() -> None:
    with (
        gateway(words=LONG, CAST_MAX_RUNNING="1") as process,
        asking(process, "X-Request-Timeout: 1"),
    ):
        wait_until(lambda: bool(process.workers["dense"].state.bodies))
        body = {"model": "dense", "prompt": "a"}
        found = httpx.post(f"{process.url}/tokenize", json=body, timeout=30)
        assert found.status_code == 200
        counted = 'cast_requests_total{code="504",route="/v1/completions",variant="dense"} 1.0'
        assert counted in httpx.get(f"{process.url}/metrics").text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("has_second", [False, True])
def test_an_end_with_requests_that_wait_is_told_without_a_traceback(
    number: signal.Signals, has_second: bool, tmp_path: Path
) -> None:
    """20 wait for one place. The grace, or the patience of who sends a second signal, ends."""
    log = tmp_path / "log"
    grace = "60" if has_second else "1"
    limits = {"CAST_MAX_RUNNING": "1", "CAST_SHUTDOWN_GRACE_S": grace}
    body = {"model": "dense", "prompt": "a"}
    with (
        open(log, "w") as file,
        gateway(file.fileno(), **limits) as process,
        ThreadPoolExecutor(21) as pool,
    ):
        process.workers["dense"].state.gate.clear()
        url = f"{process.url}/v1/completions"
        asked = [pool.submit(httpx.post, url, json=body, timeout=60) for _ in range(21)]
        queued = 'cast_requests_queued{variant="dense"} 20.0'
        wait_until(lambda: queued in httpx.get(f"{process.url}/metrics").text)
        process.popen.send_signal(number)
        if has_second:
            time.sleep(0.3)
            process.popen.send_signal(number)
        answers = [each.result() for each in asked]
        process.workers["dense"].state.gate.set()
        assert process.popen.wait(30) == 0
    assert {found.status_code for found in answers} == {503}
    assert {found.json()["error"]["code"] for found in answers} == {"shutting_down"}
    assert "Traceback" not in log.read_text()


OTHER = """\
import os, sys
import uvicorn
from tests.cast_serve.gateway.fake_worker import create_app

print("cores", sorted(os.sched_getaffinity(0)), flush=True)
uvicorn.run(create_app(sys.argv[1], ("I", " am", " another")), port=int(sys.argv[2]))
"""


def test_a_variant_may_be_another_server_which_up_starts_and_ends(tmp_path: Path) -> None:
    """It answers, keeps to its cores, and does not outlive a gateway that is killed."""
    core = min(os.sched_getaffinity(0))
    command = json.dumps([sys.executable, "-c", OTHER, "other", "{port}"])
    config = tmp_path / "serve.toml"
    config.write_text(
        f'[gateway]\nlog_dir = "."\n[variant.other]\ncores = "{core}"\ncommand = {command}\n'
    )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    up = [sys.executable, "-m", "cast_serve", "up", "--port", str(port), "--config", str(config)]
    with subprocess.Popen(up, stderr=subprocess.DEVNULL) as popen:
        try:
            wait_until(lambda: popen.poll() is not None or is_ready(url), 60)
            body = {"model": "other", "prompt": "Hello"}
            answer = httpx.post(f"{url}/v1/completions", json=body).json()
            assert answer["choices"][0]["text"] == "I am another"
            log = tmp_path / "other.log"
            assert f"cores [{core}]" in log.read_text()
        finally:
            popen.kill()
        wait_until(lambda: "Finished server process" in log.read_text(), 30)
