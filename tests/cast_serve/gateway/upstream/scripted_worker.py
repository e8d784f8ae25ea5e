"""Small scripts in the place of vLLM's workers, and a watch over them, for tests."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from cast_serve.gateway.upstream import variants
from cast_serve.gateway.upstream.client import Client
from cast_serve.gateway.upstream.replica import Replica, Variant
from cast_serve.gateway.upstream.supervisor import Supervisor, WatchSettings

NUM_WORDS = 10
# It says its directory's name; a stream does so NUM_WORDS times. Files in the directory steer it:
# `fail` ends it at once, `child` gives it a child, `unhealthy`, `hold` keeps /health waiting,
# `hang` completions, `pause` streams; `status` is a completion's, `models` and `metrics` are what
# it says. It writes down its process ids and what it was asked, one line each.
WORKER = """
import json, os, pathlib, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

port, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
key = os.environ.get("CAST_WORKER_KEY")

def has(name):
    return (folder / name).exists()

def say(name, otherwise=""):
    return (folder / name).read_text() if has(name) else otherwise

def note(name, text):
    with open(folder / name, "a") as file:
        file.write(text + "\\n")

note("pids", str(os.getpid()))
print("worker starts", flush=True)
if has("fail"):
    sys.exit("no such model")
if has("child"):
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    note("children", str(child.pid))

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    num_reads = 0

    def log_message(self, *_):
        pass

    def answer(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def event(self, text):
        content = f"data: {text}\\n\\n".encode()
        self.wfile.write(b"%x\\r\\n%s\\r\\n" % (len(content), content))

    def do_GET(self):
        if self.path == "/health":
            note("looks", "")
            while has("hold"):
                time.sleep(0.01)
            self.answer(503 if has("unhealthy") else 200, "")
        elif self.path == "/v1/models":
            self.answer(200, say("models", '{"data": []}'))
        else:
            Handler.num_reads += 1
            self.answer(200, say("metrics").replace("NUM_READS", str(Handler.num_reads)))

    def do_POST(self):
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        body = json.loads(text)
        if key and self.headers["Authorization"] != f"Bearer {key}":
            return self.answer(401, "{}")
        if body.get("max_tokens") == 1:
            note("canaries", text)
        while has("hang"):
            time.sleep(0.01)
        choice = {"index": 0, "text": folder.name + " ", "finish_reason": None}
        usage = {"prompt_tokens": 1, "completion_tokens": NUM_WORDS}
        if not body.get("stream"):
            answer = {"choices": [choice], "usage": usage}
            return self.answer(int(say("status", "200")), json.dumps(answer))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(NUM_WORDS):
            self.event(json.dumps({"choices": [choice]}))
            time.sleep(0.01)
            while has("pause"):
                time.sleep(0.01)
        self.event(json.dumps({"choices": [], "usage": usage}))
        self.event("[DONE]")
        self.wfile.write(b"0\\r\\n\\r\\n")

class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

Server(("127.0.0.1", port), Handler).serve_forever()
""".replace("NUM_WORDS", str(NUM_WORDS))


class Worker:
    """One scripted worker, seen from the test."""

    def __init__(self, folder: Path, variant: Variant) -> None:
        self.folder = folder
        self.variant = variant
        self.replica = variant.replicas[0]

    def set(self, name: str, text: str = "") -> None:
        new = self.folder / f"{name}.new"  # renamed, for the worker not to read half of it
        new.write_text(text)
        new.rename(self.folder / name)

    def clear(self, name: str) -> None:
        (self.folder / name).unlink()

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def pid(self) -> int:
        assert self.replica.process is not None
        return self.replica.process.pid


class Watch:
    """A running watch, and what it told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, bool, int]] = []
        self.task: asyncio.Task[None] | None = None

    def note(self, replica: Replica) -> None:
        self.told.append((replica.variant, replica.is_up, replica.num_restarts))

    async def until(self, is_true: Callable[[], object]) -> None:
        assert self.task is not None
        async with asyncio.timeout(40):
            while not is_true():
                if self.task.done():
                    await self.task
                await asyncio.sleep(0.01)


@asynccontextmanager
async def closing(client: Client) -> AsyncIterator[Client]:
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def watching(
    *workers: Worker,
    interval_s: float = 0.03,
    startup_timeout_s: float = 40,
    hang_timeout_s: float = 40,
    on_change: Callable[[Replica], None] | None = None,
) -> AsyncIterator[Watch]:
    watch = Watch()
    served = [worker.variant for worker in workers]
    variants.start(served)
    async with closing(Client()) as client:
        settings = WatchSettings(interval_s, startup_timeout_s, hang_timeout_s)
        supervisor = Supervisor(client, settings, on_change or watch.note)
        watch.task = asyncio.create_task(supervisor.run(variants.replicas_of(served)))
        try:
            yield watch
        finally:
            watch.task.cancel()
            await asyncio.gather(watch.task, return_exceptions=True)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
