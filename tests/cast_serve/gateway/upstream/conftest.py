"""Variants whose workers are small scripts."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cast_serve.gateway.upstream import supervisor, variants
from cast_serve.gateway.upstream.config import WorkerConfig
from cast_serve.gateway.upstream.replica import Replica, stop_workers
from cast_serve.gateway.upstream.variants import local_variants, remote_variants
from tests.cast_serve.gateway.upstream.rolled import Rolled, served
from tests.cast_serve.gateway.upstream.scripted_worker import WORKER, Worker


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
    stop_workers([worker.replica], 1)
    variants.end_logs([worker.variant], is_kept=False)


@pytest.fixture
def remotes(quick: Path, tmp_path: Path) -> Iterator[list[Worker]]:
    """Two workers that are not ours to start."""
    workers, processes = [], []
    for name in ("dense", "sparse"):
        folder = tmp_path / name
        folder.mkdir()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        (variant,) = remote_variants({name: [f"http://127.0.0.1:{port}"]})
        workers.append(Worker(folder, variant))
        processes.append(
            subprocess.Popen([sys.executable, "-S", str(quick), str(port), str(folder)])
        )
    yield workers
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rolled]:
    with served(tmp_path, monkeypatch) as found:
        yield found
