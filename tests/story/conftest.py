"""The demo model, pruned and compressed, served beside its dense twin by `cast-serve up`."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parent.parent.parent
MODEL = ROOT / "data/models/smollm2-135m-dense"
FLAGS = ["--enforce-eager", "--max-model-len", "1024", "--logprobs-mode", "raw_logits"]


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", *(str(word) for word in words)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@dataclass
class Served:
    url: str
    process: subprocess.Popen[bytes]
    log: Path
    dtype: str


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model pruned by magnitude: compressed, and with the same zeros stored densely."""
    assert MODEL.is_dir(), f"{MODEL} is missing; run scripts/data"
    folder = tmp_path_factory.mktemp("story")
    pruned, sparse, dense = (folder / name for name in ("pruned", "sparse", "dense"))
    oneshot = ("oneshot", "--model", MODEL, "--method", "magnitude", "--out", pruned)
    subprocess.run(command("cast_train", *oneshot), check=True)
    convert = ("convert", pruned, sparse, "--dense-twin", dense)
    subprocess.run(command("cast_serve", *convert), check=True)
    return {"sparse": sparse, "dense": dense}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def served(
    request: pytest.FixtureRequest,
    twins: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    """Both, first in float32, where the two must agree closely, then as they are served."""
    port = free_port()
    log = tmp_path_factory.mktemp("logs") / "up.log"
    variants = [part for name, path in twins.items() for part in ("--variant", f"{name}={path}")]
    flags = [*FLAGS, "--dtype", request.param]
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            command("cast_serve", "up", *variants, "--port", port, "--", *flags),
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            env={**os.environ, "CAST_STARTUP_TIMEOUT_S": "400"},
        )
    served = Served(f"http://127.0.0.1:{port}", process, log, request.param)
    try:
        while not _is_ready(served.url):
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)
        yield served
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.HTTPError:
        return False
