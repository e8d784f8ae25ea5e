"""The sparse variant over several ranks answers as one rank does.

Three tensor-parallel ranks, on one node and over three, because SmolLM2 has 9 heads and vLLM cuts
along heads: two are refused. Two pipeline ranks, on one node, compiled.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from cast_serve.gateway.settings import GatewaySettings
from cast_serve.gateway.upstream.supervisor import STEP_FACTOR
from cast_serve.ports import free_port
from tests.story.conftest import FLAGS, PROMPTS, command, descendants

pytestmark = [pytest.mark.model, pytest.mark.server, pytest.mark.timeout(900)]

NUM_RANKS = 3
NUM_TOKENS = 16
FLOAT32 = [*FLAGS, "--dtype", "float32", "--logprobs-mode", "raw_logits"]
COMPILED = [flag for flag in FLOAT32 if flag != "--enforce-eager"]
IN_THREE = [*FLOAT32, "--tensor-parallel-size", str(NUM_RANKS)]


@contextmanager
def running(*words: object, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command of cast_serve in a session of its own, with one thread and unbound cores."""
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            command("cast_serve", *words),
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            env={**os.environ, **environment},
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_until_ready(url: str, path: str, process: subprocess.Popen[bytes], log: Path) -> None:
    while True:
        assert process.poll() is None, log.read_text()[-5000:]
        try:
            if httpx.get(f"{url}{path}", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)


def answer(url: str, prompt: str) -> dict[str, Any]:
    body = {"model": "sparse", "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0}
    body |= {"ignore_eos": True, "logprobs": 5}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return dict(response.json()["choices"][0])


def told(url: str, opening: str) -> str:
    """The one line of a worker's /metrics that begins so."""
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    (found,) = [line for line in lines if line.startswith(opening)]
    return found


@dataclass(frozen=True)
class OneRank:
    """What one rank says that it runs, and what it answers to the first prompts."""

    info: str
    answers: list[dict[str, Any]]


@pytest.fixture(scope="module")
def one_rank(twins: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> OneRank:
    log, port = tmp_path_factory.mktemp("one") / "log", free_port()
    worker = ("worker", twins["sparse"], "--name", "sparse", "--port", port, "--", *FLOAT32)
    with running(*worker, log=log) as process:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, "/health", process, log)
        return OneRank(
            told(url, "cast_variant_info{"), [answer(url, prompt) for prompt in PROMPTS[:6]]
        )


def check_same(url: str, expected: OneRank) -> None:
    assert len(expected.answers) == 6
    for prompt, wanted in zip(PROMPTS[:6], expected.answers, strict=True):
        found = answer(url, prompt)
        assert found["text"] == wanted["text"]
        assert found["logprobs"]["token_logprobs"] == pytest.approx(
            wanted["logprobs"]["token_logprobs"], abs=1e-3
        )


def test_ranks_of_one_node_and_a_rank_that_dies(
    twins: dict[str, Path], one_rank: OneRank, tmp_path: Path
) -> None:
    port, front, log, gateway_log = free_port(), free_port(), tmp_path / "log", tmp_path / "gateway"
    worker = ("worker", twins["sparse"], "--name", "sparse", "--port", port, "--", *IN_THREE)
    gateway = ("gateway", "--variant", f"sparse=http://127.0.0.1:{port}", "--port", front)
    with running(*worker, log=log) as process:
        wait_until_ready(f"http://127.0.0.1:{port}", "/health", process, log)
        assert 'num_sparse_layers="210"' in told(f"http://127.0.0.1:{port}", "cast_variant_info{")
        step_s = float(told(f"http://127.0.0.1:{port}", "cast_worker_step_seconds ").split()[-1])
        with running(*gateway, log=gateway_log) as gate:
            url = f"http://127.0.0.1:{front}"
            wait_until_ready(url, "/readyz", gate, gateway_log)
            check_same(url, one_rank)
            os.kill(rank_process(process.pid, 1), signal.SIGKILL)
            limit_s = 60 + max(GatewaySettings().hang_timeout_s, STEP_FACTOR * step_s)
            began = time.monotonic()
            while httpx.get(f"{url}/readyz", timeout=10).status_code == 200:
                assert time.monotonic() - began < limit_s, "ready with a dead rank"
                time.sleep(0.2)


def rank_process(pid: int, rank: int) -> int:
    """The process of a rank below the worker."""
    (found,) = [child for child, words in descendants(pid).items() if f"Worker_TP{rank}" in words]
    return found


def test_ranks_of_three_nodes(twins: dict[str, Path], one_rank: OneRank, tmp_path: Path) -> None:
    """Three nodes on one machine: three workers that meet on the loopback address."""
    port, meeting = free_port(), free_port()
    worker = ("worker", twins["sparse"], "--name", "sparse", "--port", port, "--", *IN_THREE)
    nodes = ("--nnodes", NUM_RANKS, "--master-addr", "127.0.0.1", "--master-port", meeting)
    logs = [tmp_path / f"node-{rank}" for rank in range(NUM_RANKS)]
    with (
        running(*worker, *nodes, "--node-rank", 0, log=logs[0]) as head,
        running(*worker, *nodes, "--node-rank", 1, "--headless", log=logs[1]),
        running(*worker, *nodes, "--node-rank", 2, "--headless", log=logs[2]),
    ):
        wait_until_ready(f"http://127.0.0.1:{port}", "/health", head, logs[0])
        check_same(f"http://127.0.0.1:{port}", one_rank)


def test_two_pipeline_ranks(twins: dict[str, Path], one_rank: OneRank, tmp_path: Path) -> None:
    """Each holds half of the layers: together they tell the layers and bytes of one rank."""
    log, port = tmp_path / "log", free_port()
    in_two = (*COMPILED, "--pipeline-parallel-size", 2)
    worker = ("worker", twins["sparse"], "--name", "sparse", "--port", port, "--", *in_two)
    with running(*worker, log=log) as process:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, "/health", process, log)
        assert "Worker_PP1" in " ".join(descendants(process.pid).values())
        assert told(url, "cast_variant_info{") == one_rank.info
        check_same(url, one_rank)
