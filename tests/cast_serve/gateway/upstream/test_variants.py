"""Variants: what is made of directories and URLs, picked, logged and stopped."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cast_serve import ports
from cast_serve.gateway.app import create_app
from cast_serve.gateway.settings import GatewaySettings
from cast_serve.gateway.upstream import variants
from cast_serve.gateway.upstream.config import WorkerConfig
from cast_serve.gateway.upstream.probes import Limits
from cast_serve.gateway.upstream.replica import Replica, stop_workers, worker_command
from cast_serve.gateway.upstream.variants import local_variants, remote_variants
from tests.cast_serve.gateway.upstream.scripted_worker import Worker, is_running
from tests.fake_hub import FakeHub

pytestmark = pytest.mark.anyio


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


def test_no_worker_gets_the_port_that_the_gateway_will_take(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    of_sparse = ports.free_port()
    of_gateway = ports.free_port([of_sparse])
    left = ports.free_port([of_sparse, of_gateway])
    monkeypatch.setattr(ports, "PORTS", [of_sparse, of_gateway, left])
    workers = {"dense": WorkerConfig(dir=model), "sparse": WorkerConfig(dir=model, port=of_sparse)}
    urls = [each.replicas[0].url for each in local_variants(workers, gateway_port=of_gateway)]
    assert urls == [f"http://127.0.0.1:{left}", f"http://127.0.0.1:{of_sparse}"]


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


def test_a_draft_is_a_flag_of_the_worker(model: Path, tmp_path: Path) -> None:
    worker = WorkerConfig(
        dir=model, draft=model, draft_tokens=2, draft_requests=4, vllm=("--seed", "1")
    )
    (variant,) = local_variants({"lossless": worker})
    (replica,) = variant.replicas
    flags = ["--draft", str(model), "--draft-tokens", "2", "--draft-requests", "4"]
    assert worker_command(replica)[-9:] == [*flags, "--", "--seed", "1"]
    replica.log = tmp_path / "log"
    new = variants.successor(replica, None, "new.log")
    assert new.worker_flags == replica.worker_flags


def test_a_draft_that_is_missing_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="variant a: draft_tokens 2 has no effect without draft"):
        local_variants({"a": WorkerConfig(dir=model, draft_tokens=2)})
    with pytest.raises(ValueError, match="variant a: draft_requests 1 has no effect without draft"):
        local_variants({"a": WorkerConfig(dir=model, draft_requests=1)})
    with pytest.raises(ValueError, match="variant a: .* holds no model"):
        local_variants({"a": WorkerConfig(dir=model, draft=tmp_path)})


def test_a_command_gets_its_port_and_keeps_to_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    worker = WorkerConfig(command=("true", "--port={port}"), cores="0,2", port=4001)
    replica = local_variants({"other": worker}, ["--seed", "3"])[0].replicas[0]
    assert (replica.model, replica.is_local) == (None, True)
    started = ["setpriv", "--pdeathsig", "TERM", "taskset", "-c", "0,2", "true", "--port=4001"]
    assert worker_command(replica) == started


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "variant a: give dir or command, and not both"),
        ({"dir": "x", "command": ("y",)}, "variant a: give dir or command, and not both"),
        ({"command": ("serve", "it")}, "command 'serve it' does not say on which port it listens"),
        ({"command": ("{port}",), "vllm": ("--seed", "3")}, "vllm and draft are for a dir"),
        ({"command": ("{port}",), "draft": "x"}, "vllm and draft are for a dir"),
        ({"command": ("no-such", "{port}")}, "variant a: there is no program no-such; install it"),
    ],
)
def test_a_variant_is_a_model_or_a_command(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        local_variants({"a": WorkerConfig(**given)})


def test_a_hubs_name_is_fetched(hub: FakeHub) -> None:
    hub.repos["org/model"] = {"config.json": b"{}", "model.safetensors": b""}
    (variant,) = local_variants({"dense": WorkerConfig(dir=Path("org/model"))})
    found = variant.replicas[0].model
    assert found is not None
    assert (found / "config.json").read_bytes() == b"{}"


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
    assert f"{text!r} is not a URL; write a=http://HOST:PORT" in str(error.value)


def test_a_variants_limits_are_those_of_its_tightest_replica() -> None:
    (variant,) = remote_variants({"dense": ["http://a", "http://b", "http://c"]})
    assert (variant.max_model_len, variant.vocabulary_size) == (None, None)
    a, b, _ = variant.replicas
    a.limits, b.limits = Limits(max_model_len=8192), Limits(4096, vocabulary_size=100)
    assert (variant.max_model_len, variant.vocabulary_size) == (4096, 100)


async def test_a_local_worker_gets_a_key_that_no_command_line_shows(
    local: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = GatewaySettings()
    for name in ("CAST_API_KEYS", "CAST_API_KEYS_FILE", "CAST_WORKER_KEY_FILE", "VLLM_API_KEY"):
        monkeypatch.setenv(name, "not-for-workers")
    app = create_app([local.variant], settings)
    key = local.replica.key
    assert len(key) >= 43  # 32 random bytes
    async with asyncio.timeout(40), app.router.lifespan_context(app):
        environment = Path(f"/proc/{local.pid}/environ")
        while not (found := environment.read_text()):  # until the new program has its own
            await asyncio.sleep(0.01)
        assert f"\0CAST_WORKER_KEY={key}\0" in f"\0{found}"
        assert "not-for-workers" not in found
        assert key not in Path(f"/proc/{local.pid}/cmdline").read_text()
    assert key not in repr(local.replica)
    assert variants.share_key([local.variant], "mine") == local.replica.key == "mine"
    assert variants.share_key([local.variant], "") != variants.share_key([local.variant], "")


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
    stop_workers([replica], grace_s=0.5)
    assert process.returncode is not None
    deadline = time.monotonic() + 5
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)
