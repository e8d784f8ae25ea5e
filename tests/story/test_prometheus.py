"""Debian's Prometheus scrapes the gateway before real workers; promtool reads what is ours."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from cast_serve.ports import free_port
from tests.programs import need
from tests.story.conftest import ROOT, Served, complete, worker

pytestmark = [pytest.mark.model, pytest.mark.server, pytest.mark.timeout(900)]

Query = Callable[[str], list[float]]
"""PromQL -> the values of the series that it finds."""

DTYPE = "bfloat16"
SCRAPES_S = 60


def test_promtool_finds_nothing_wrong_with_our_metrics(served: Served) -> None:
    for name in ("dense", "sparse"):
        complete(served, name, "The sea", max_tokens=4)
    text = httpx.get(f"{served.url}/metrics").text
    ours = [line for line in text.splitlines() if "vllm:" not in line]
    assert any(line.startswith("cast_variant_info{") for line in ours)
    done = subprocess.run(
        [need("promtool"), "check", "metrics"],
        input="\n".join(ours) + "\n",
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@contextmanager
def prometheus(folder: Path, served: Served, more: dict[str, Any]) -> Iterator[Query]:
    """Prometheus over the gateway; fails at the end if it complained of anything."""
    target = served.url.removeprefix("http://")
    config = {
        "global": {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "1s"},
        "scrape_configs": [{"job_name": "cast-serve", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config | more))  # JSON is YAML
    port = free_port()
    command = [need("prometheus"), f"--config.file={folder}/prometheus.yml"]
    command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}"]
    log = folder / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)

    def query(text: str) -> list[float]:
        found = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": text})
        return [float(row["value"][1]) for row in found.json()["data"]["result"]]

    try:
        while True:
            assert process.poll() is None, log.read_text()
            try:
                httpx.get(f"http://127.0.0.1:{port}/-/ready").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield query
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()  # nothing, once it has ended
            process.wait()
    assert process.returncode == 0
    complaints = [
        line for line in log.read_text().splitlines() if "WARN" in line or "ERROR" in line
    ]
    assert not complaints


def test_prometheus_scrapes_without_a_warning(served: Served, tmp_path: Path) -> None:
    with prometheus(tmp_path, served, {}) as query:
        time.sleep(SCRAPES_S)
        assert query("min_over_time(up[50s])") == [1]
        assert len(query("cast_variant_info")) == 2
        assert len(query("vllm:num_requests_running")) == 2


def wait_for(is_true: Callable[[], bool], timeout_s: float, what: str) -> None:
    began = time.monotonic()
    while not is_true():
        assert time.monotonic() - began < timeout_s, f"{what}: not within {timeout_s} s"
        time.sleep(0.5)


def test_our_rules_tell_the_speed_up_and_a_worker_that_died(served: Served, tmp_path: Path) -> None:
    """The shipped rules with less patience: a worker that is started again is soon back."""
    text = (ROOT / "deploy/prometheus/rules.yaml").read_text()
    (tmp_path / "rules.yaml").write_text(re.sub(r"for: \d+m", "for: 2s", text))
    down = 'ALERTS{alertname="CastVariantDown", variant="sparse", alertstate="firing"}'
    with prometheus(tmp_path, served, {"rule_files": ["rules.yaml"]}) as query:
        for _ in range(8):
            for name in ("dense", "sparse"):  # streamed: only then there is a time per token
                body = {"model": name, "prompt": "The sea", "max_tokens": 16, "stream": True}
                httpx.post(
                    f"{served.url}/v1/completions", json=body, timeout=300
                ).raise_for_status()
            time.sleep(2)
        speedup = 'variant:cast_speedup:ratio5m{variant="sparse", metric="tpot", quantile="0.5"}'
        wait_for(lambda: bool(query(speedup)), 60, "a speed-up")
        # Of the same requests, but for those before the first scrape; each median is read from a
        # bucket whose end is 5/3 of its begin.
        (exact,) = query('cast_speedup_ratio{metric="tpot", quantile="0.5"}')
        assert exact / (5 / 3) ** 2 < query(speedup)[0] < exact * (5 / 3) ** 2
        assert query('up{job="cast-serve"}') == [1]
        assert query(down) == []
        os.kill(worker(served, "sparse"), signal.SIGKILL)
        wait_for(lambda: query(down) == [1], 60, "the alert")
        wait_for(lambda: query(down) == [], 300, "its end")
        assert query('cast_variant_up{variant="sparse"}') == [1]
