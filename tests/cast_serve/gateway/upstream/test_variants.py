"""Variants and the watch over them, with small scripts in the place of vLLM's workers."""

import asyncio
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from cast_serve.gateway.app import Gateway, create_app
from cast_serve.gateway.settings import GatewaySettings
from cast_serve.gateway.upstream import supervisor, variants
from cast_serve.gateway.upstream.config import WorkerConfig
from cast_serve.gateway.upstream.probes import Limits
from cast_serve.gateway.upstream.replica import (
    Replica,
    Variant,
    note_failure,
    start_worker,
    worker_command,
)
from cast_serve.gateway.upstream.supervisor import VariantError
from cast_serve.gateway.upstream.variants import local_variants, remote_variants
from tests.fake_hub import FakeHub

pytestmark = pytest.mark.anyio

# Files in the folder steer it: `fail` ends it at once, `child` gives it a child, `unhealthy`,
# `hold` keeps /health waiting, `hang` keeps completions waiting, `status` is a completion's,
# `models` and `metrics` are what it says. It writes down what it was asked, one line each.
WORKER = """
import pathlib, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

port, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])

def has(name):
    return (folder / name).exists()

def say(name, otherwise=""):
    return (folder / name).read_text() if has(name) else otherwise

def note(name, text):
    with open(folder / name, "a") as file:
        file.write(text + "\\n")

print("worker starts", flush=True)
if has("fail"):
    sys.exit("no such model")
if has("child"):
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    note("children", str(child.pid))

class Handler(BaseHTTPRequestHandler):
    num_reads = 0

    def log_message(self, *_):
        pass

    def answer(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

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
        note("canaries", self.rfile.read(int(self.headers["Content-Length"])).decode())
        while has("hang"):
            time.sleep(0.01)
        self.answer(int(say("status", "200")), "{}")

ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


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


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scripts instead of vLLM, and short pauses; the path of the script."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)

    def command(replica: Replica) -> list[str]:
        port = replica.url.rpartition(":")[2]
        return [sys.executable, "-S", str(script), port, str(replica.model)]

    monkeypatch.setattr("cast_serve.gateway.upstream.replica.worker_command", command)
    monkeypatch.setattr(supervisor, "EXIT_POLL_S", 0.02)
    monkeypatch.setattr(supervisor, "CANARY_INTERVAL_S", 0.05)
    monkeypatch.setattr(supervisor, "FIRST_BACKOFF_S", 0.05)
    return script


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def local(model: Path) -> Iterator[Worker]:
    """A local worker, not started yet."""
    worker = Worker(model, *local_variants({"sparse": WorkerConfig(dir=model)}))
    yield worker
    variants.stop([worker.variant], 1)
    variants.end_logs([worker.variant], is_kept=False)


@pytest.fixture
def remotes(quick: Path, tmp_path: Path) -> Iterator[list[Worker]]:
    """Two workers that are not ours to start."""
    workers, processes = [], []
    for name in ("dense", "sparse"):
        folder = tmp_path / name
        folder.mkdir()
        port = variants._free_ports(1)[0]
        (variant,) = remote_variants({name: [f"http://127.0.0.1:{port}"]})
        workers.append(Worker(folder, variant))
        processes.append(
            subprocess.Popen([sys.executable, "-S", str(quick), str(port), str(folder)])
        )
    yield workers
    for process in processes:
        process.kill()
        process.wait()


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
async def watching(
    *workers: Worker,
    startup_timeout_s: float = 40,
    hang_timeout_s: float = 40,
    on_change: Callable[[Replica], None] | None = None,
) -> AsyncIterator[Watch]:
    watch = Watch()
    served = [worker.variant for worker in workers]
    variants.start(served)
    async with httpx.AsyncClient(trust_env=False) as client:
        watch.task = asyncio.create_task(
            variants.watch(
                served,
                client,
                interval_s=0.03,
                startup_timeout_s=startup_timeout_s,
                hang_timeout_s=hang_timeout_s,
                on_change=on_change or watch.note,
            )
        )
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


def test_local_variants_have_cores_and_ports_of_their_own(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 5})
    dense, sparse = (
        variant.replicas[0]
        for variant in local_variants(dict.fromkeys(("dense", "sparse"), WorkerConfig(dir=model)))
    )
    assert (dense.cores, sparse.cores) == ((0, 1), (2, 3))
    assert dense.url != sparse.url


def test_more_variants_than_cores_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    with pytest.raises(ValueError, match="2 variants need a core each, but this process has 1"):
        local_variants(dict.fromkeys(("dense", "sparse"), WorkerConfig(dir=model)))
    with pytest.raises(ValueError, match="1 variants need a core each, but .* has 0 left"):
        local_variants(
            {"dense": WorkerConfig(dir=model, cores="0"), "sparse": WorkerConfig(dir=model)}
        )


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="variant dense: .* holds no model"):
        local_variants({"dense": WorkerConfig(dir=tmp_path)})


def test_a_hubs_name_is_fetched(hub: FakeHub) -> None:
    hub.repos["org/model"] = {"config.json": b"{}", "model.safetensors": b""}
    (variant,) = local_variants({"dense": WorkerConfig(dir=Path("org/model"))})
    found = variant.replicas[0].model
    assert found is not None
    assert (found / "config.json").read_bytes() == b"{}"


def test_the_worker_is_told_its_name_port_cores_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    replica = Replica("sparse", "http://127.0.0.1:81", Path("m"), (2, 3), ("--enforce-eager",))
    words = " ".join(worker_command(replica)[1:])
    assert words == (
        "-m cast_serve worker m --name sparse --port 81 --cores 2,3 -- --enforce-eager"
    )


def test_remote_variants_have_a_replica_for_each_url() -> None:
    urls = {"dense": ["http://a:1/"], "sparse": ["https://b", "http://[::1]:2"]}
    dense, sparse = remote_variants(urls)
    assert [(r.variant, r.url) for r in dense.replicas] == [("dense", "http://a:1")]
    assert [r.url for r in sparse.replicas] == ["https://b", "http://[::1]:2"]
    assert sparse.replicas[0].model is None


@pytest.mark.parametrize("text", ["b", "ftp://b", "http://", "http://b:port", "/models/b"])
def test_what_is_no_url_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="variant a: ") as error:
        remote_variants({"a": ["http://fine", text]})
    assert f"{text!r} is no URL; write a=http://HOST:PORT" in str(error.value)


def test_pick_takes_the_least_busy_replica_that_is_up() -> None:
    (variant,) = remote_variants({"dense": ["http://a", "http://b", "http://c"]})
    a, b, c = variant.replicas
    assert variant.pick() is None
    assert not variant.is_up
    b.is_up = c.is_up = True
    assert variant.is_up
    assert variant.pick() is b
    b.num_outstanding = 2
    c.num_outstanding = 1
    assert variant.pick() is c
    a.is_up = True
    assert variant.pick() is a


def test_a_variants_limits_are_those_of_its_tightest_replica() -> None:
    (variant,) = remote_variants({"dense": ["http://a", "http://b", "http://c"]})
    assert (variant.max_model_len, variant.vocabulary_size) == (None, None)
    a, b, _ = variant.replicas
    a.limits, b.limits = Limits(max_model_len=8192), Limits(4096, vocabulary_size=100)
    assert (variant.max_model_len, variant.vocabulary_size) == (4096, 100)


async def test_limits_are_read_before_a_worker_is_up(remotes: list[Worker]) -> None:
    silent, talkative = remotes
    cards = [{"id": "adapter", "max_model_len": 1}, {"id": "sparse", "max_model_len": 2048}]
    talkative.set("models", json.dumps({"data": cards}))
    talkative.set("metrics", "cast_worker_vocabulary_size 49152.0\ncast_worker_step_seconds 0.5\n")
    silent.set("metrics", "<html>")
    limits: dict[str, Limits] = {}

    def note(replica: Replica) -> None:
        if replica.is_up:
            limits[replica.variant] = replica.limits

    async with watching(*remotes, on_change=note) as watch:
        await watch.until(lambda: len(limits) == 2)
    assert limits == {"dense": Limits(), "sparse": Limits(2048, 49152, 0.5)}


async def test_a_replica_that_does_not_answer_keeps_no_other_waiting(
    remotes: list[Worker],
) -> None:
    slow, quick = remotes
    slow.set("hold")
    async with watching(slow, quick) as watch:
        await watch.until(lambda: slow.lines("looks"))
        await watch.until(lambda: quick.replica.is_up)
        assert not slow.replica.is_up
        slow.clear("hold")
        await watch.until(lambda: slow.replica.is_up)


async def test_a_worker_that_dies_is_restarted_after_growing_pauses(
    local: Worker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    url = local.replica.url
    async with watching(local) as watch:
        for num_restarts in range(4):
            if num_restarts == 3:
                monkeypatch.setattr(supervisor, "STEADY_S", 0)
            await watch.until(lambda: local.replica.is_up)
            os.kill(local.pid, signal.SIGKILL)
            await watch.until(lambda count=num_restarts: local.replica.num_restarts > count)
        await watch.until(lambda: local.replica.is_up)
    assert local.replica.url == url
    assert watch.told[:4] == [
        *(("sparse", False, 0), ("sparse", True, 0)),
        *(("sparse", False, 0), ("sparse", False, 1)),
    ]
    ends = [text for text in caplog.messages if "ended with -9" in text]
    assert [text.partition("restart in ")[2].split(" s")[0] for text in ends] == [
        *("0.05", "0.1", "0.2"),
        "0.05",  # it was up long enough
    ]
    assert ends[0].endswith("its log: worker starts")
    assert "\n" not in "".join(ends)


async def test_what_a_dead_worker_left_behind_is_killed(local: Worker) -> None:
    local.set("child")
    async with watching(local) as watch:
        await watch.until(lambda: local.replica.is_up)
        child = int(local.lines("children")[0])
        assert is_running(child)
        os.kill(local.pid, signal.SIGKILL)
        await watch.until(lambda: local.replica.num_restarts)
        assert not is_running(child)


async def test_a_worker_that_ends_before_it_was_up_is_not_restarted(local: Worker) -> None:
    local.set("fail")
    async with watching(local) as watch:
        with pytest.raises(VariantError, match="variant sparse at .* ended with 1; ") as error:
            await watch.until(lambda: False)
    assert str(error.value).endswith("its log says:\nworker starts\nno such model")


async def test_a_worker_that_takes_too_long_to_start_is_given_up(local: Worker) -> None:
    local.set("unhealthy")
    async with watching(local, startup_timeout_s=1) as watch:
        with pytest.raises(VariantError, match="did not answer within 1 s"):
            await watch.until(lambda: False)


async def test_a_worker_that_does_not_come_back_is_given_up(local: Worker) -> None:
    async with watching(local) as watch:
        await watch.until(lambda: local.replica.is_up)
        local.set("fail")
        os.kill(local.pid, signal.SIGKILL)
        with pytest.raises(VariantError, match=r"ended with 1 \(5 starts in a row failed\)"):
            await watch.until(lambda: False)
    assert local.replica.num_restarts == 5


async def test_a_stopped_worker_is_killed_and_restarted(local: Worker) -> None:
    async with watching(local, hang_timeout_s=2) as watch:
        await watch.until(lambda: local.replica.is_up)
        stopped = local.pid
        os.kill(stopped, signal.SIGSTOP)
        await watch.until(lambda: not is_running(stopped))
        await watch.until(lambda: local.replica.is_up and local.replica.num_restarts)


@pytest.mark.parametrize("trouble", ["hang", "status"])
async def test_a_healthy_worker_that_answers_no_completion_is_restarted(
    local: Worker, trouble: str
) -> None:
    local.set("metrics", "vllm:generation_tokens_total 5.0\n")
    async with watching(local, hang_timeout_s=1) as watch:
        await watch.until(lambda: local.replica.is_up)
        local.set(trouble, "500")
        await watch.until(lambda: ("sparse", False, 1) in watch.told)
        local.clear(trouble)
        await watch.until(lambda: local.replica.is_up)
    down = watch.told.index(("sparse", False, 0), 1)
    assert watch.told[:down] == [("sparse", False, 0), ("sparse", True, 0)]


async def test_a_remote_replica_that_hangs_is_down_until_it_answers(remotes: list[Worker]) -> None:
    worker, _ = remotes
    async with watching(worker, hang_timeout_s=2) as watch:
        await watch.until(lambda: worker.replica.is_up)
        worker.set("hang")
        await watch.until(lambda: not worker.replica.is_up)
        num_canaries = len(worker.lines("canaries"))
        await watch.until(lambda: len(worker.lines("canaries")) > num_canaries)
        assert not worker.replica.is_up  # for all its good /health
        worker.clear("hang")
        await watch.until(lambda: worker.replica.is_up)
    assert worker.replica.num_restarts == 0


@pytest.mark.parametrize(
    "counter",
    [
        'vllm:iteration_tokens_total_count{engine="0"}',
        "vllm:generation_tokens_total",
        "vllm:prompt_tokens_total",
        "vllm:kv_cache_usage_perc",  # alone, while a long prompt is computed in chunks
    ],
)
async def test_a_worker_whose_counters_move_is_busy_and_not_hung(
    local: Worker, counter: str
) -> None:
    local.set("metrics", f"{counter} NUM_READS\n")
    async with watching(local, hang_timeout_s=0.5) as watch:
        await watch.until(lambda: local.replica.is_up)
        local.set("hang")
        num_canaries = len(local.lines("canaries"))
        await watch.until(lambda: len(local.lines("canaries")) >= num_canaries + 3)
    assert watch.told == [("sparse", False, 0), ("sparse", True, 0)]


async def test_a_worker_that_finishes_requests_during_a_canary_is_not_hung(local: Worker) -> None:
    async with watching(local, hang_timeout_s=0.5) as watch:
        await watch.until(lambda: local.replica.is_up)
        local.set("hang")
        before = len(local.lines("canaries"))
        for num_canaries in range(1, 4):
            await watch.until(lambda n=num_canaries: len(local.lines("canaries")) >= before + n)
            local.replica.num_received += 1
    assert watch.told == [("sparse", False, 0), ("sparse", True, 0)]


async def test_a_canary_is_one_token_and_no_traffic_and_any_refusal_is_progress(
    local: Worker,
) -> None:
    local.set("status", "400")
    async with watching(local, hang_timeout_s=5) as watch:
        await watch.until(lambda: len(local.lines("canaries")) >= 3)
    assert json.loads(local.lines("canaries")[0]) == {
        **{"model": "sparse", "prompt": "a"},
        "max_tokens": 1,
    }
    assert watch.told == [("sparse", False, 0), ("sparse", True, 0)]
    assert (local.replica.num_outstanding, local.replica.num_received) == (0, 0)


async def test_there_is_no_canary_while_requests_finish(local: Worker) -> None:
    async def finish() -> None:
        while True:
            local.replica.num_received += 1
            await asyncio.sleep(0.001)

    async with watching(local) as watch:
        traffic = asyncio.create_task(finish())
        await watch.until(lambda: local.replica.is_up)
        num_looks = len(local.lines("looks"))
        await watch.until(lambda: len(local.lines("looks")) >= num_looks + 10)
        assert len(local.lines("canaries")) == 1  # the one that it came up with
        traffic.cancel()
        await watch.until(lambda: len(local.lines("canaries")) > 1)


async def test_a_noted_failure_lasts_until_a_look_that_began_after_it(
    remotes: list[Worker],
) -> None:
    worker, _ = remotes
    num_looks_when_up: list[int] = []

    def note(replica: Replica) -> None:
        if replica.is_up:
            num_looks_when_up.append(len(worker.lines("looks")))

    async with watching(worker, on_change=note) as watch:
        await watch.until(lambda: worker.replica.is_up)
        worker.set("hold")
        num_looks = len(worker.lines("looks"))
        await watch.until(lambda: len(worker.lines("looks")) > num_looks)
        num_looks = len(worker.lines("looks"))
        note_failure(worker.replica)
        assert worker.variant.pick() is None
        worker.clear("hold")
        await watch.until(lambda: worker.replica.is_up)
    assert len(num_looks_when_up) == 2
    assert num_looks_when_up[1] > num_looks


async def test_every_noted_failure_and_return_is_told(remotes: list[Worker]) -> None:
    worker, _ = remotes
    async with watching(worker) as watch:
        for num_failures in range(5):
            await watch.until(lambda n=num_failures: len(watch.told) == 2 * n + 2)
            note_failure(worker.replica)
        await watch.until(lambda: len(watch.told) == 12)
    assert watch.told == [("dense", False, 0), ("dense", True, 0)] * 6


async def test_a_worker_is_up_once_it_has_answered_and_may_take_its_time(local: Worker) -> None:
    """A first answer that takes longer than a hang may is no reason to end it, nor to ask it."""
    local.set("hang")
    async with watching(local, hang_timeout_s=0.3) as watch:
        await watch.until(lambda: local.lines("canaries"))
        await asyncio.sleep(1)
        assert watch.told == [("sparse", False, 0)]
        local.clear("hang")
        await watch.until(lambda: local.replica.is_up)
    assert watch.told == [("sparse", False, 0), ("sparse", True, 0)]
    assert len(local.lines("canaries")) >= 1


async def test_a_worker_that_never_answers_is_given_up(local: Worker) -> None:
    local.set("hang")
    async with watching(local, startup_timeout_s=1, hang_timeout_s=0.1) as watch:
        with pytest.raises(VariantError, match=r"within 1 s \(CAST_STARTUP_TIMEOUT_S\)"):
            await watch.until(lambda: False)


async def test_the_hang_limit_is_that_of_the_machines_own_step(
    local: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    local.set("metrics", "cast_worker_step_seconds 0.2\n")
    async with watching(local, hang_timeout_s=0.1) as watch:
        await watch.until(lambda: local.replica.is_up)
        local.set("hang")
        begun_s = time.monotonic()
        await watch.until(lambda: not local.replica.is_up)
        assert time.monotonic() - begun_s >= 2
    assert "made no progress for 2 s (CAST_HANG_TIMEOUT_S is 0.1 s, raised to 10" in caplog.text


async def test_a_restart_that_fails_for_want_of_memory_is_tried_again(
    local: Worker, remotes: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    other, _ = remotes
    num_failures = 0

    def start(replica: Replica) -> None:
        nonlocal num_failures
        if num_failures < 2:
            num_failures += 1
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        start_worker(replica)

    async with watching(local, other) as watch:
        await watch.until(lambda: local.replica.is_up and other.replica.is_up)
        monkeypatch.setattr(supervisor, "start_worker", start)
        os.kill(local.pid, signal.SIGKILL)
        await watch.until(lambda: num_failures == 2 and local.replica.is_up)
        assert local.replica.num_restarts == 1
        other.set("unhealthy")
        await watch.until(lambda: not other.replica.is_up)


async def test_a_fault_of_the_watch_ends_neither_it_nor_the_worker(
    local: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    is_healthy = supervisor.probes.is_healthy
    num_faults = 0

    async def faulty(client: httpx.AsyncClient, url: str) -> bool:
        nonlocal num_faults
        if local.replica.is_up and num_faults < 3:
            num_faults += 1
            raise KeyError("of ours")
        return await is_healthy(client, url)

    monkeypatch.setattr(supervisor.probes, "is_healthy", faulty)
    async with watching(local) as watch:
        await watch.until(lambda: num_faults == 3)
        local.set("unhealthy")
        await watch.until(lambda: not local.replica.is_up)
    assert local.replica.num_restarts == 0
    assert caplog.text.count("watching it failed") == 3


async def test_a_gateway_whose_watch_ends_has_failed(
    remotes: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def watch(*_: object, **__: object) -> None:
        raise RuntimeError("gone")

    monkeypatch.setattr(variants, "watch", watch)
    gateway = Gateway([worker.variant for worker in remotes], GatewaySettings())
    ended = asyncio.Event()
    await gateway.watch(ended.set)
    assert ended.is_set()
    assert "RuntimeError('gone')" in str(gateway.failure)
    await gateway.proxy.close()


@pytest.mark.parametrize("is_clean", [True, False])
async def test_logs_stay_where_something_failed(
    local: Worker,
    is_clean: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if not is_clean:
        local.set("fail")
    ended = asyncio.Event()
    app = create_app([local.variant], GatewaySettings(health_interval_s=0.05), ended.set)
    async with asyncio.timeout(40), app.router.lifespan_context(app):
        while not (local.replica.is_up or ended.is_set()):
            await asyncio.sleep(0.01)
        assert len(list(tmp_path.glob("cast-serve-*/sparse.log"))) == 1
    kept = list(tmp_path.glob("cast-serve-*"))
    assert len(kept) == (not is_clean)
    for folder in kept:
        assert f"the workers' logs are kept in {folder}" in caplog.text


async def test_logs_in_a_folder_of_ones_own_stay(
    local: Worker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    local.replica.variant = "a/sparse"
    (tmp_path / "logs").mkdir()
    settings = GatewaySettings(log_dir=tmp_path / "logs")
    app = create_app([local.variant], settings, lambda: None)
    async with asyncio.timeout(40), app.router.lifespan_context(app):
        pass
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["a%2Fsparse.log"]
    assert f"the workers' logs are kept in {tmp_path / 'logs'}" in caplog.text


def test_stop_ends_the_whole_process_group_even_a_stubborn_one() -> None:
    script = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.stdout.close()
    replica = Replica("dense", "http://127.0.0.1:1", process=process)
    variants.stop([Variant("dense", [replica])], grace_s=0.5)
    assert process.returncode is not None
    deadline = time.monotonic() + 5
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)
